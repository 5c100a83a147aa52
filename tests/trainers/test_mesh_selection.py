"""Exact top-k over shards, on given scores: the same selection as a plain sort in one process, bit for bit.

Processes are threads here, so that many cases cost nothing; test_mesh.py has real ones.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saescale.storage.errors import SaescaleError
from saescale.trainers.architectures import looked
from saescale.trainers.architectures.batchtopk_sparse import batch_top_k
from saescale.trainers.kernels import choose, eager
from saescale.trainers.kernels.interface import Selected
from saescale.trainers.mesh import distributed, radix
from saescale.trainers.mesh import keys as mesh_keys
from saescale.trainers.mesh.channel import Channel, Traffic
from saescale.trainers.mesh.distributed import ProcessMesh
from saescale.trainers.mesh.keys import NONE, candidates, keys_of, kth_largest, reference
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.mesh import ALONE
from tests.trainers.mesh_threads import on_threads

BATCH = 12


def scores_of(kind: str, n: int) -> torch.Tensor:
    """[BATCH, n], of that kind."""
    scores = torch.randn(BATCH, n, generator=torch.Generator().manual_seed(n))
    if kind == "bf16":  # 8 significant bits: most are tied
        return (scores * 3).bfloat16().float()
    if kind == "equal":
        return torch.full_like(scores, 0.5)
    if kind == "one_shard":  # all winners among the last latents
        return torch.arange(n).float().expand(BATCH, n) + 1
    if kind == "negative":
        return -scores.abs() - 0.1
    if kind == "zeros":
        return torch.where(torch.arange(n) % 2 == 0, 0.0, -0.0).expand(BATCH, n).contiguous()
    return scores


def local_of(scores: torch.Tensor, mesh: ProcessMesh, k: int) -> Selected:
    """What a shard's own kernel would select: its k largest positive ones, ties to the lower index, then padding."""
    own = scores[:, mesh.first : mesh.first + mesh.size]
    k = min(k, mesh.size)
    chosen = reference(own, k) & (own > 0)
    indices = torch.full((BATCH, k), -1, dtype=torch.int32)
    z = torch.zeros(BATCH, k)
    for row in range(BATCH):
        there = chosen[row].nonzero().flatten()
        indices[row, : len(there)], z[row, : len(there)] = there.int(), own[row, there]
    return Selected(indices, z)


def chosen_by(layout: Layout, scores: torch.Tensor, k: int) -> torch.Tensor:
    """bool [BATCH, n]: what the shards together select."""
    n = scores.shape[1]

    def work(mesh: ProcessMesh) -> torch.Tensor:
        selected = mesh.select(local_of(scores, mesh, k), k)
        assert bool((selected.z[selected.indices >= 0] > 0).all())
        assert not bool(selected.z[selected.indices < 0].any())
        padded = torch.zeros(BATCH, mesh.size + 1, dtype=torch.bool)
        padded.scatter_(1, torch.where(selected.indices < 0, mesh.size, selected.indices).long(), True)
        return padded[:, :-1]

    return torch.cat(on_threads(layout, n, work), dim=1)


@pytest.mark.parametrize("kind", ["random", "bf16", "equal", "one_shard", "negative", "zeros"])
@pytest.mark.parametrize("way", ["gathered", "radix"])
def test_shards_select_what_one_process_does(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "KEYS", 0 if way == "radix" else 10**9)
    # No multiple of the shards; k larger than a shard; k of nearly all.
    for n, k in ((37, 5), (37, 11), (10, 9), (7, 1)):
        scores = scores_of(kind, n)
        wanted = reference(scores, k) & (scores > 0)
        for shards in (2, 3, 4, 5):
            assert torch.equal(chosen_by(Layout(shards), scores, k), wanted), (n, k, shards)


@pytest.mark.parametrize("kind", ["random", "bf16", "equal", "one_shard", "negative", "one_row"])
def test_a_batch_is_selected_from_as_in_one_process(kind: str) -> None:
    """BatchTopK: one selection over the rows of all replicas and the latents of all shards, ties to the lower row, then
    to the lower latent; against a plain sort of all scores."""
    for n, k in ((37, 3), (37, 9), (10, 8), (7, 1)):
        scores = scores_of(kind, n)
        if kind == "one_row":  # nearly all winners are of one token
            scores = scores.abs() * torch.where(torch.arange(BATCH) == 5, 100.0, 1.0)[:, None]
        flat = [(-score, place) for place, score in enumerate(scores.flatten().tolist()) if score > 0]
        wanted = torch.zeros(BATCH * n, dtype=torch.bool)
        wanted[[place for _, place in sorted(flat)[: k * BATCH]]] = True
        for shards, replicas in ((1, 2), (3, 2), (5, 3)):
            layout = Layout(shards, replicas)
            found = on_threads(layout, n, partial(_batch_chosen, scores=scores, k=k))
            rows = [torch.cat(found[r * shards : (r + 1) * shards], dim=1) for r in range(replicas)]
            assert torch.equal(torch.cat(rows), wanted.view(BATCH, n)), (n, k, layout)


def _batch_chosen(mesh: ProcessMesh, scores: torch.Tensor, k: int) -> torch.Tensor:
    """bool [rows, latents] of this process."""
    mine, own = mesh.rows(BATCH), slice(mesh.first, mesh.first + mesh.size)
    given = scores[mine, own]
    selected = batch_top_k(eager, torch.eye(len(given)), given.T.contiguous(), torch.zeros(mesh.size), k, None, mesh)
    chosen = torch.zeros(len(given), mesh.size + 1, dtype=torch.bool)
    chosen.scatter_(1, torch.where(selected.indices < 0, mesh.size, selected.indices).long(), True)
    assert torch.equal(selected.z > 0, selected.indices >= 0)
    # As wide as that of the other replicas, or they could not have it.
    assert mesh.gather_replicas(selected.z).shape == (BATCH, selected.z.shape[1])
    return chosen[:, :-1]


@pytest.mark.parametrize("way", ["sparse", "dense", "one shard has most of them"])
@pytest.mark.parametrize("layout", [Layout(3), Layout(1, 2), Layout(3, 2)])
def test_what_exceeds_thresholds_is_one_decision_of_all(
    way: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a step is dense goes by the pairs of all, as in one process, and by what a single one would have to hold.
    Else each has its own, as wide as those of other replicas."""
    monkeypatch.setattr(choose, "kernels", lambda device: eager)
    n, scores = 37, scores_of("random", 37)
    above = scores > 1.5
    above[0, 1:] = True  # so that replicas differ in their widest row
    if way == "one shard has most of them":
        above = (torch.arange(n) < n // 3).expand(BATCH, n) & (torch.arange(BATCH)[:, None] < BATCH // 2)
    most = int(above.sum()) - (way == "dense")
    scores = torch.where(above, scores.abs() + 0.1, -1.0)

    def work(mesh: ProcessMesh) -> Selected | None:
        rows, own = mesh.rows(BATCH), slice(mesh.first, mesh.first + mesh.size)
        nothing = torch.zeros(mesh.size)
        operands = torch.eye(BATCH)[rows], scores[:, own].T.contiguous(), nothing, nothing
        return looked.select_above(*operands, 2 * most // layout.ranks, most, mesh)

    found = on_threads(layout, n, work)
    if way == "dense" or (way == "one shard has most of them" and layout != Layout(1, 2)):
        assert found == [None] * layout.ranks
        return
    for rank, selected in enumerate(found):
        shard, replica = layout.place(rank)
        first, size = layout.share(n, shard)
        got = torch.zeros(BATCH // layout.replicas, size + 1)
        got.scatter_(1, torch.where(selected.indices < 0, size, selected.indices).long(), selected.z)
        assert torch.equal(got[:, :-1], scores[layout.rows(BATCH, replica), first : first + size].clamp_min(0))
        assert selected.z.shape[1] == found[shard].z.shape[1]


@pytest.mark.parametrize("kind", ["random", "bf16", "equal", "negative", "zeros"])
def test_the_order_is_total_and_the_counts_find_the_same_key(kind: str) -> None:
    """Of scores of any sign; the counts stop early, so their key lies between the k-th and the one below it."""
    scores, k = scores_of(kind, 40), 7
    whole = keys_of(scores, torch.arange(40).expand_as(scores))
    assert all(len(set(row)) == 40 for row in whole.tolist())
    assert torch.equal(whole >= kth_largest(whole, k)[:, None], reference(scores, k))

    def work(mesh: ProcessMesh) -> torch.Tensor:
        return radix.kth_of_all(mesh._of_shards, whole[:, mesh.first : mesh.first + mesh.size], k)

    for least in on_threads(Layout(3), 40, work):
        assert torch.equal(whole >= least[:, None], reference(scores, k))


floats = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, torch.inf, -torch.inf, 2.0**-149, -(2.0**-149), 2.0**-126, 1.0, 1.0 + 2.0**-23]),
    st.just(torch.finfo(torch.float32).max),
)


@given(st.lists(floats, min_size=1, max_size=40), st.integers(0, 2**32 - 41), st.integers(1, 40))
def test_keys_have_the_order_of_any_floats(values: list[float], first: int, k: int) -> None:
    """NaN, infinities, both zeros and subnormals among them, latents up to the last one that a key has room for."""
    scores = torch.tensor(values)
    keys = keys_of(scores, first + torch.arange(len(values)))
    nan = [math.isnan(value) for value in values]
    order = sorted(range(len(values)), key=lambda i: (not nan[i], 0.0 if nan[i] else -values[i], i))
    assert keys.argsort(descending=True).tolist() == order
    assert len(set(keys.tolist())) == len(values)
    assert int(keys.amin()) > NONE
    of_positive = [value if value > 0 else 0.0 for value in scores.tolist()]
    if not scores.isnan().any():
        assert mesh_keys.scores_of(keys).tolist() == of_positive
    # Counting finds the same as sorting, whatever the digits are.
    one = Channel(None, 0, 1, Traffic(), lambda kind: None)
    for bits in (4, 8):
        least = radix.kth_of_all(one, keys[None], k, bits)
        assert int((keys >= least).sum()) == min(k, len(values))


@pytest.mark.parametrize(("k", "rounds"), [(6, 1), (3, 2), (1, 16)])
def test_counting_ends_when_all_that_agree_are_wanted(k: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys share their first digit, three of them the second too; these are told apart by their last one."""
    keys = torch.tensor([[*(0x1100000000000000 + i for i in range(3)), *(0x1000000000000000 + i for i in range(3))]])
    told = []
    whole = radix.sum_in_order
    monkeypatch.setattr(radix, "sum_in_order", lambda *given: (told.append(1), whole(*given))[1])
    one = Channel(None, 0, 1, Traffic(), lambda kind: None)
    least = radix.kth_of_all(one, keys, k)
    assert len(told) == rounds
    assert int((keys >= least).sum()) == k


def test_nan_is_above_all_and_has_no_key_of_a_candidate() -> None:
    keys = keys_of(torch.tensor([torch.inf, torch.nan, -torch.nan, 1.0, -torch.inf]), torch.arange(5))
    assert keys.argsort(descending=True).tolist() == [1, 2, 0, 3, 4]
    local = Selected(torch.tensor([[3, 1, -1]], dtype=torch.int32), torch.tensor([[1.0, torch.nan, 0.0]]))
    assert (candidates(local, 10) == NONE).tolist() == [[False, True, True]]


def test_nan_on_one_shard_stays_there() -> None:
    """It reaches the loss of all by the sum of the reconstructions."""

    def work(mesh: ProcessMesh) -> torch.Tensor:
        z = torch.full((2, 3), torch.nan if mesh.shard == 1 else 1.0)
        return mesh.select(Selected(torch.full((2, 3), -1 if mesh.shard == 1 else 0, dtype=torch.int32), z), 3).z

    found = on_threads(Layout(2), 8, work)
    assert found[1].isnan().all()
    assert found[0].isfinite().all()


def test_sums_are_in_the_order_of_the_shards_and_the_same_everywhere() -> None:
    parts = [torch.randn(3, 5_001, generator=torch.Generator().manual_seed(s)) * 10**s for s in range(4)]
    wanted = ((parts[0] + parts[1]) + parts[2]) + parts[3]

    def work(mesh: ProcessMesh) -> tuple[torch.Tensor, torch.Tensor, int]:
        own = parts[mesh.shard]
        sent = mesh.traffic.bytes["sum_shards"]
        large = mesh.sum_shards(own)
        return large, mesh.sum_shards(own[:, :7]), mesh.traffic.bytes["sum_shards"] - sent

    for large, small, sent in on_threads(Layout(4), 4, work):
        assert torch.equal(large, wanted)
        assert torch.equal(small, wanted[:, :7])
        # Twice three quarters of the large one, and the small one to each of the others.
        assert sent == 2 * 3 * -(-3 * 5_001 // 4) * 4 + 3 * 21 * 4


def test_every_latent_and_row_has_one_place() -> None:
    for n, shards in ((16, 4), (17, 4), (19, 4), (5, 5), (3, 1)):
        shares = [Layout(shards).share(n, shard) for shard in range(shards)]
        assert [latent for first, size in shares for latent in range(first, first + size)] == list(range(n))
        assert [size for _, size in shares] == sorted((size for _, size in shares), reverse=True)
    layout = Layout(2, 3)
    assert sorted(layout.rank(*layout.place(rank)) for rank in range(6)) == list(range(6))
    rows = [layout.rows(10, replica) for replica in range(3)]
    assert [row for part in rows for row in range(10)[part]] == list(range(10))
    assert (ALONE.whole(5), ALONE.here(5), ALONE.rows(9)) == (5, 5, slice(0, 9))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((0, 1, 64, 8), "0 shards x 1 replicas is none"),
        ((65, 1, 64, 8), "65 shards exceed n_latents = 64"),
        ((1, 3, 64, 8), "a batch of 8 tokens cannot be cut into 3 equal slices"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(given: tuple[int, int, int, int], said: str) -> None:
    with pytest.raises(SaescaleError, match=said):
        Layout.checked(*given)
