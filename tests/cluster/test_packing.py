"""Packs: everything once, equal cost, longest first, memory kept, only what can go on together."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saescale.cluster.crew.shares import cpus_each, threads_for, without
from saescale.cluster.sweep.packing import cost, pack_cells
from saescale.storage.errors import SaescaleError
from saescale.trainers.cell import Cell
from saescale.trainers.training.memory import StreamSize, pack_memory


def cell(n_latents: int, k: int = 4, **fields: object) -> Cell:
    defaults = {
        "store": "s", "d_model": 64, "tokens": 65_536, "batch_tokens": 1024, "lr": 1e-3, "settings": {"k_aux": 8},
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
    started=st.lists(st.sampled_from([[], [10], [20, 10], [30, 20], [50, 40]]), min_size=40, max_size=40),
)
def test_every_cell_once_within_memory_longest_first(
    sizes: list[int], workers: int, memory_cells: float, started: list[list[int]]
) -> None:
    cells = [cell(n, seed=i) for i, n in enumerate(sizes)]
    steps = {c.cell_id: found for c, found in zip(cells, started, strict=False)}
    memory = memory_cells * max(needs([c]) for c in cells)
    packs = pack_cells(cells, steps, workers, memory, needs)
    assert sorted(c.cell_id for pack in packs for c in pack) == sorted(c.cell_id for c in cells)
    assert all(needs(pack) <= memory for pack in packs)
    costs = [sum(cost(c) for c in pack) for pack in packs]
    assert costs == sorted(costs, reverse=True)
    for pack in packs:
        # Two checkpoints are kept, so whoever has one only is as near to the start.
        common = set.intersection(*({*steps[c.cell_id], *([0] if len(steps[c.cell_id]) < 2 else [])} for c in pack))
        assert common


def test_packs_are_bounded_in_what_is_done_between_two_looks_for_a_stop() -> None:
    """Ten thousand tiny cells were four packs, which saved one after another before any of them had ended."""
    tiny = [cell(32, seed=i) for i in range(1000)]
    packs = pack_cells(tiny, {}, workers=4, memory=1e15, needs=lambda cells: 0.0)
    assert [len(packs), *sorted({len(pack) for pack in packs})] == [16, 62, 63]
    each = cost(cell(4096)) / cell(4096).steps
    large = [cell(4096, seed=i) for i in range(12)]
    packs = pack_cells(large, {}, workers=1, memory=1e15, needs=lambda cells: 0.0, batch_flops=3 * each)
    assert [len(pack) for pack in packs] == [3, 3, 3, 3]
    # One that is larger than that stands alone, and is trained.
    packs = pack_cells(large, {}, workers=1, memory=1e15, needs=lambda cells: 0.0, batch_flops=each / 2)
    assert len(packs) == 12


def test_a_pack_that_was_killed_while_it_was_saved_stays_together() -> None:
    cells = [cell(64, seed=i) for i in range(4)]
    steps = {c.cell_id: [30, 20] if i < 2 else [20, 10] for i, c in enumerate(cells)}
    assert len(pack_cells(cells, steps, workers=1, memory=1e12, needs=needs)) == 1
    first = {c.cell_id: [10] for c in cells[:2]}  # the others were not saved at all
    assert len(pack_cells(cells, first, workers=1, memory=1e12, needs=needs)) == 1


def test_the_quickstart_grid_is_balanced_over_two_workers() -> None:
    cells = [cell(n, k) for n in (512, 1024, 2048, 4096) for k in (8, 16, 32, 64)]
    packs = pack_cells(cells, {}, workers=2, memory=1e12, needs=needs)
    costs = [sum(cost(c) for c in pack) for pack in packs]
    assert len(packs) == 4
    assert max(costs) < 1.1 * min(costs)


def test_one_worker_trains_the_whole_grid_from_one_pass() -> None:
    cells = [cell(n, k) for n in (512, 1024, 2048, 4096) for k in (8, 16, 32, 64)]
    assert len(pack_cells(cells, {}, workers=1, memory=1e12, needs=needs)) == 1


def test_different_streams_are_never_packed_together() -> None:
    cells = [cell(64, batch_tokens=b, stream_seed=s, seed=i) for i in range(3) for b in (512, 1024) for s in (0, 1)]
    for pack in pack_cells(cells, {}, workers=1, memory=1e12, needs=needs):
        assert len({(c.batch_tokens, c.stream_seed) for c in pack}) == 1


def test_a_cell_that_fits_nowhere_is_named() -> None:
    with pytest.raises(SaescaleError, match=r"cell n4096-k4-.* needs .* GiB and a worker has 0\.0 GiB"):
        pack_cells([cell(64), cell(4096)], {}, workers=1, memory=2**20, needs=needs)


@pytest.mark.parametrize(
    ("cores", "workers", "threads"),
    [([2], 1, 2), ([2], 2, 1), ([2], 5, 1), ([1, 1], 2, 1), ([16, 16], 2, 16), ([16, 16], 3, 8), ([16, 4], 3, 5)],
)
def test_threads_fill_the_nodes_without_sharing_cores(cores: list[int], workers: int, threads: int) -> None:
    assert threads_for(cores, workers) == threads


def test_a_worker_without_kernels_is_planned_with_its_dense_gradient() -> None:
    large = [cell(65_536, seed=i, d_model=768) for i in range(2)]
    of = {kind: pack_memory(large, 2_048, StreamSize(1_024, 16_384), kind) for kind in ("cuda", "eager")}
    assert of["eager"].training - of["cuda"].training > 4 * 65_536 * 768
    memory = (of["eager"].total + of["cuda"].total) / 2
    packs = [
        pack_cells(large, {}, 1, memory, lambda c, k=kind: pack_memory(c, 2_048, StreamSize(1_024, 16_384), k).total)
        for kind in ("cuda", "eager")
    ]  # fmt: skip
    assert [len(pack) for pack in packs] == [1, 2]


@pytest.mark.parametrize(
    ("nodes", "processes", "gpus", "each"),
    [
        ([{"CPU": 2}], 2, 0.0, 1.0),
        ([{"CPU": 1}, {"CPU": 1}], 5, 0.0, 1 / 3),
        # A head without GPUs has no say in what stands beside each GPU.
        ([{"CPU": 16}, {"CPU": 96, "GPU": 8}], 8, 1.0, 12.0),
        ([{"CPU": 64}, {"CPU": 8, "GPU": 8}], 8, 1.0, 1.0),
        ([{"CPU": 0}, {"CPU": 4, "GPU": 8}], 16, 0.5, 0.25),
        ([{"CPU": 0}], 3, 0.0, 1.0),
    ],
)
def test_what_each_worker_claims_leaves_room_for_all(
    nodes: list[dict[str, float]], processes: int, gpus: float, each: float
) -> None:
    assert cpus_each(nodes, processes, gpus) == each


def test_what_others_claim_is_taken_from_the_nodes_that_have_most() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 16.0}, {"CPU": 8.0, "GPU": 2.0}]
    left = without(nodes, {"CPU": 18.0, "GPU": 2.0})
    assert left == [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 0.0, "GPU": 0.0}, {"CPU": 6.0, "GPU": 0.0}]
    assert nodes[1] == {"CPU": 16.0}


def test_cells_over_a_live_source_are_in_no_more_packs_than_go_on_at_a_time() -> None:
    """What begins later needs all blocks once more."""
    cells = [cell(64, seed=i) for i in range(12)]
    assert len(pack_cells(cells, {}, workers=3, memory=1e12, needs=needs)) == 6
    assert len(pack_cells(cells, {}, workers=3, memory=1e12, needs=needs, live={"s"})) == 3
