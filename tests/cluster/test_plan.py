"""Packs: everything once, equal cost, longest first, memory kept, only what can go on together."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.plan import cost, plan_packs
from cluster.pool import threads_for
from storage.errors import SaescaleError
from trainers.cell import Cell
from trainers.memory import StreamSize, pack_memory


def cell(n_latents: int, k: int = 4, **fields: object) -> Cell:
    defaults = {
        "store": "s", "d_model": 64, "tokens": 65_536, "batch_tokens": 1024, "lr": 1e-3, "k_aux": 8,
        "dead_after_tokens": 1000,
    }  # fmt: skip
    return Cell.model_validate(defaults | {"n_latents": n_latents, "k": k} | fields)


def needs(cells: Sequence[Cell]) -> float:
    return pack_memory(cells, eval_tokens=2_048, stream=StreamSize(1_024, 16_384)).total


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(8, 4096), min_size=1, max_size=40),
    workers=st.integers(1, 8),
    memory_cells=st.floats(1.0, 10.0),
    started=st.lists(st.integers(0, 2), min_size=40, max_size=40),
)
def test_every_cell_once_within_memory_longest_first(
    sizes: list[int], workers: int, memory_cells: float, started: list[int]
) -> None:
    cells = [cell(n, seed=i) for i, n in enumerate(sizes)]
    steps = {c.cell_id: 10 * s for c, s in zip(cells, started, strict=False)}
    memory = memory_cells * max(needs([c]) for c in cells)
    packs = plan_packs(cells, steps, workers, memory, needs)
    assert sorted(c.cell_id for pack in packs for c in pack) == sorted(c.cell_id for c in cells)
    assert all(needs(pack) <= memory for pack in packs)
    costs = [sum(cost(c) for c in pack) for pack in packs]
    assert costs == sorted(costs, reverse=True)
    assert all(len({steps[c.cell_id] for c in pack}) == 1 for pack in packs)


def test_the_quickstart_grid_is_balanced_over_two_workers() -> None:
    cells = [cell(n, k) for n in (512, 1024, 2048, 4096) for k in (8, 16, 32, 64)]
    packs = plan_packs(cells, {}, workers=2, memory=1e12, needs=needs)
    costs = [sum(cost(c) for c in pack) for pack in packs]
    assert len(packs) == 4
    assert max(costs) < 1.1 * min(costs)


def test_different_streams_are_never_packed_together() -> None:
    cells = [cell(64, batch_tokens=b, stream_seed=s, seed=i) for i in range(3) for b in (512, 1024) for s in (0, 1)]
    for pack in plan_packs(cells, {}, workers=1, memory=1e12, needs=needs):
        assert len({(c.batch_tokens, c.stream_seed) for c in pack}) == 1


def test_a_cell_that_fits_nowhere_is_named() -> None:
    with pytest.raises(SaescaleError, match=r"cell n4096-k4-.* needs .* GiB and a worker has 0\.0 GiB"):
        plan_packs([cell(64), cell(4096)], {}, workers=1, memory=2**20, needs=needs)


@pytest.mark.parametrize(
    ("cores", "workers", "threads"),
    [([2], 1, 2), ([2], 2, 1), ([2], 5, 1), ([1, 1], 2, 1), ([16, 16], 2, 16), ([16, 16], 3, 8), ([16, 4], 3, 5)],
)
def test_threads_fill_the_nodes_without_sharing_cores(cores: list[int], workers: int, threads: int) -> None:
    assert threads_for(cores, workers) == threads


def test_plain_torch_is_given_smaller_packs_than_kernels() -> None:
    cells = [cell(4096, seed=i, batch_tokens=16_384) for i in range(8)]
    of = {
        kind: lambda pack, kind=kind: pack_memory(pack, 2_048, StreamSize(1_024, 16_384), kind).total
        for kind in ("cuda", "eager")
    }
    memory = of["eager"](cells[:3])
    packs = {kind: plan_packs(cells, {}, 1, memory, needed) for kind, needed in of.items()}
    assert len(packs["eager"]) > len(packs["cuda"])
    assert all(of["eager"](pack) <= memory for pack in packs["eager"])
