"""A cell's step on a mesh of threads, by plain torch: fast, and what test_mesh.py does with real processes."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from saescale.trainers.architectures import pairwise
from saescale.trainers.architectures.architecture import Batch
from saescale.trainers.architectures.sae import step_of
from saescale.trainers.kernels import choose, eager
from saescale.trainers.mesh import distributed
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.mesh import One
from saescale.trainers.mesh.traffic import sent
from saescale.trainers.preprocess import Centre
from saescale.trainers.training.training_cell import TrainingCell
from tests.trainers import mesh_processes as mesh
from tests.trainers.mesh_threads import on_threads

STEPS = 8
WAYS = {"dense": 0.0, "sparse": 1.0}  # the share of all pairs above which steps are dense


class Given(One):
    """The group of a thread."""

    def __init__(self, of: distributed.ProcessMesh) -> None:
        self.of = of

    def mesh(self, n_latents: int) -> distributed.ProcessMesh:
        return self.of


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's threads do not like to be called by several."""
    monkeypatch.setattr(choose, "kernels", lambda device: eager)


@pytest.mark.parametrize(
    ("architecture", "shards", "replicas"),
    [
        *(("topk", *layout) for layout in ((2, 1), (3, 2), (1, 2), (4, 2))),
        ("batchtopk", 3, 2), ("batchtopk", 1, 2), ("matryoshka", 3, 2), ("hierarchical_topk", 3, 2),
    ],
)  # fmt: skip
def test_a_mesh_steps_as_one_process_does(architecture: str, shards: int, replicas: int) -> None:
    """With AuxK on fewer dead latents than k_aux, all on one shard, and on more; nothing [batch, N] is ever made."""
    fields = mesh.of(architecture)
    one = mesh.alone(STEPS, fields)
    assert 0 < one.idle[0] < mesh.K_AUX < max(one.idle)
    answers = on_threads(
        Layout(shards, replicas), mesh.N, lambda of: mesh.take_steps(Given(of), STEPS, None, fields)
    )  # fmt: skip
    for answer in answers:
        assert answer.error is None
        assert (answer.losses, answer.dead, answer.pairs) == (answers[0].losses, answers[0].dead, one.pairs)
        assert answer.guarded > 100
    assert answers[0].losses == pytest.approx(one.losses, rel=1e-5)
    for name, t in mesh.whole(answers, shards).items():
        assert float((t - one.params[name]).norm()) <= 1e-3 * float(one.params[name].norm()), name
    assert answers[0].dead == pytest.approx(one.dead, abs=1e-6)
    assert answers[0].idle == one.idle


@pytest.mark.parametrize("architecture", mesh.PENALISED)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("shards", "replicas"), [(1, 2), (3, 2)])
def test_thresholds_decide_within_a_shard(
    architecture: str, way: str, shards: int, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense steps and sparse ones, evaluations too; the same pairs as one process, and nothing [batch, N]."""
    monkeypatch.setattr(pairwise, "DENSE_ABOVE", WAYS[way])
    fields, layout = mesh.of(architecture), Layout(shards, replicas)
    one = mesh.alone(STEPS, fields)
    by_pairs, dense = one.pairs[:5], one.pairs[5:]
    assert (dense if way == "dense" else by_pairs)[1] > STEPS * mesh.BATCH
    assert not any(by_pairs if way == "dense" else dense)
    answers = on_threads(layout, mesh.N, lambda of: mesh.take_steps(Given(of), STEPS, None, fields))
    for rank, answer in enumerate(answers):
        assert answer.error is None
        assert (answer.losses, answer.dead, answer.pairs) == (answers[0].losses, answers[0].dead, one.pairs)
        assert answer.guarded > 100
        for name, t in answer.params.items():
            assert torch.equal(t, answers[rank % shards].params[name]), name
    assert answers[0].losses == pytest.approx(one.losses, rel=1e-6)
    assert answers[0].dead == pytest.approx(one.dead, abs=1e-6)
    for name, t in mesh.whole(answers, shards).items():
        off = float((t - one.params[name]).norm()) / float(one.params[name].norm())
        # A replica has all pairs in the order of one process; of a dense step it has a sum of gradients.
        assert off <= (0 if way == "sparse" and shards == 1 else 1e-5), name


@pytest.mark.parametrize("architecture", mesh.PENALISED)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("shards", "replicas"), [(3, 1), (2, 2)])
def test_what_thresholds_say_is_what_plans_say(
    architecture: str, way: str, shards: int, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all latents are active, so that it is known of how many pairs replicas tell each other."""
    monkeypatch.setattr(pairwise, "DENSE_ABOVE", WAYS[way])
    layout, cell = Layout(shards, replicas), mesh.cell_of(**mesh.of(architecture))

    def step(of: distributed.ProcessMesh) -> dict[str, int]:
        training = TrainingCell(cell, Centre(torch.zeros(mesh.D), 1 / mesh.D), torch.device("cpu"), of)
        for name in ("b_enc", "b_gate", "b_mag"):
            if name in training.sae.params:
                training.sae.params[name] += 10.0
        if architecture == "prolu":  # whose bias makes no pre-activation positive
            training.sae.params["W_enc"].zero_().add_(1.0)
        of.traffic.clear()
        training.train_on(Batch.of(torch.full((mesh.BATCH, mesh.D), mesh.D**-0.5), torch.zeros(mesh.D), False))
        assert training.error is None
        return dict(of.traffic.bytes)

    answer = on_threads(layout, mesh.N, step)[0]
    said = step_of(architecture, mesh.N).said(cell.whole_settings, mesh.N)  # type: ignore[attr-defined]
    assert 0 < said.dense < 1
    planned = sent(layout, mesh.D, mesh.N, said._replace(pairs=mesh.N, dense=float(way == "dense")), mesh.BATCH)
    assert planned.selection == 0
    # Beside them counts.
    assert answer.pop("sum_shards") == pytest.approx(planned.reductions, rel=0.02)
    assert answer.pop("gather_all") == 16 * (layout.ranks - 1)
    told = answer.pop("gather_replicas" if way == "sparse" else "sum_replicas", 0)
    # Beside both matrices there are three vectors at most.
    assert told == planned.replicas if way == "sparse" else planned.replicas <= told <= 1.15 * planned.replicas
    assert sum(answer.values()) <= 16  # squared errors, for the other replicas


class Live(TorchDispatchMode):
    """The most float32 tensors [BATCH, columns] that there were at a time; a mask is a quarter of one."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.most, self._live = columns, 0.0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape == (mesh.BATCH, self.columns) and out._base is None:
            self._live[out] = out.element_size() / 4
            self.most = max(self.most, sum(self._live.values()))
        return out


@pytest.mark.parametrize("architecture", mesh.PENALISED)
def test_a_dense_step_has_as_many_tensors_as_plans_count_with(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairwise, "DENSE_ABOVE", 0.0)
    cell = mesh.cell_of(**mesh.of(architecture))

    def most(of: distributed.ProcessMesh) -> float:
        training = TrainingCell(cell, Centre(torch.zeros(mesh.D), 1 / mesh.D), torch.device("cpu"), of)
        with Live(of.size) as live:
            training.train_on(Batch.of(mesh.batches(1)[0], torch.zeros(mesh.D), False))
        return live.most

    wide = step_of(architecture, mesh.N).wide  # type: ignore[attr-defined]
    assert on_threads(Layout(2), mesh.N, most) == [wide, wide]


def test_fewer_rows_than_replicas_are_evaluated() -> None:
    """In the last chunk of held-out rows there may be so few; sparse and dense."""
    x = mesh.batches(1)[0][:1]

    def work(of: distributed.ProcessMesh | None) -> list[float]:
        cell = TrainingCell(
            mesh.cell_of(**mesh.of("jumprelu")), Centre(torch.zeros(mesh.D), 1 / mesh.D), torch.device("cpu"),
            *([] if of is None else [of]),
        )  # fmt: skip
        found = []
        for threshold in (0.2, 0.001):
            cell.sae.params["threshold"].fill_(threshold)
            made = cell.sae.reconstruct(Batch.of(x, torch.zeros(mesh.D), False))
            found += [float(made.squared), int(made.active), made.dense]
        return found

    wanted = work(None)
    assert (wanted[2], wanted[5]) == (False, True)
    for found in on_threads(Layout(2, 2), mesh.N, work):
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("shards", "replicas"), [(3, 1), (2, 2)])
def test_dead_latents_whose_scores_are_negative_have_no_part(shards: int, replicas: int) -> None:
    """AuxK selects its latents, decodes none of them and moves none."""
    one, before = mesh.alone(2, sunk=9.0), mesh.alone(0, sunk=9.0)
    answers = on_threads(
        Layout(shards, replicas), mesh.N, lambda of: mesh.take_steps(Given(of), 2, None, None, 9.0)
    )  # fmt: skip
    params = mesh.whole(answers, shards)
    for answer in answers:
        assert (answer.losses, answer.pairs, answer.idle) == (answers[0].losses, one.pairs, [5, 5])
    assert one.pairs[2] == 0  # of AuxK
    assert answers[0].losses == pytest.approx(one.losses, rel=1e-5)
    for name in ("W_enc", "W_dec", "b_enc"):
        # Rows of the decoder are brought to norm 1 again.
        assert torch.allclose(params[name][:5], before.params[name][:5], rtol=1e-6), name


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka", "hierarchical_topk"])
@pytest.mark.parametrize(("shards", "replicas"), [(3, 1), (2, 2)])
def test_what_a_step_says_is_what_plans_say(architecture: str, shards: int, replicas: int) -> None:
    """No more than BatchTopK's widths, of which only the mean is known before."""
    fields = mesh.of(architecture) | {"settings": {"k_aux": 0}}
    layout = Layout(shards, replicas)
    answer = on_threads(layout, mesh.N, lambda of: mesh.take_steps(Given(of), 3, None, fields))[0]
    cell = mesh.cell_of(**fields)
    said = step_of(architecture, mesh.N).said(cell.whole_settings, mesh.N)  # type: ignore[attr-defined]
    planned = sent(layout, mesh.D, mesh.N, said, mesh.BATCH)
    # Beside them d_model numbers for b_pre's gradient and counts.
    assert answer.sent["sum_shards"] == pytest.approx(planned.reductions, rel=0.02)
    if architecture == "hierarchical_topk":
        assert answer.sent["select"] == planned.selection
        assert answer.sent.get("gather_replicas", 0) == pytest.approx(planned.replicas, rel=0.5)
    else:
        # What ties and a second look take, and less where fewer digits decide.
        assert 0 < answer.sent["select"] <= 4 * planned.selection
        assert answer.sent["gather_all"] < 1024
        assert planned.replicas <= answer.sent.get("gather_replicas", 0) <= 6 * planned.replicas


@pytest.mark.parametrize("fields", [{}, *(mesh.of(architecture) for architecture in mesh.PENALISED)])
def test_nan_on_one_shard_is_the_same_error_on_all(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that decide by thresholds are at dense steps when it comes."""
    monkeypatch.setattr(pairwise, "DENSE_ABOVE", 0.0)
    answers = on_threads(Layout(2, 2), mesh.N, lambda of: mesh.take_steps(Given(of), 4, 1, fields))
    assert {answer.error for answer in answers} == {
        "at step 3: training loss nan with lr 0.003: diverged; try a smaller lr"
    }
