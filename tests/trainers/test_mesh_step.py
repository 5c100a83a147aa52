"""A cell's step on a mesh of threads, by plain torch: fast, and what test_mesh.py does with real processes."""

import pytest

from saescale.trainers.kernels import choose, eager
from saescale.trainers.mesh import distributed
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.mesh.mesh import One
from tests.trainers import mesh_processes as mesh
from tests.trainers.mesh_threads import on_threads

STEPS = 8


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


@pytest.mark.parametrize(("shards", "replicas"), [(2, 1), (3, 2), (1, 2)])
def test_a_mesh_steps_as_one_process_does(shards: int, replicas: int) -> None:
    """With AuxK on fewer dead latents than k_aux, all on one shard, and on more; nothing [batch, N] is ever made."""
    one = mesh.alone(STEPS)
    assert 0 < one.idle[0] < mesh.K_AUX < max(one.idle)
    answers = on_threads(Layout(shards, replicas), mesh.N, lambda of: mesh.take_steps(Given(of), STEPS))
    for answer in answers:
        assert answer.error is None
        assert (answer.losses, answer.dead, answer.pairs) == (answers[0].losses, answers[0].dead, one.pairs)
        assert answer.guarded > 100
    assert answers[0].losses == pytest.approx(one.losses, rel=1e-5)
    assert answers[0].dead == pytest.approx(one.dead, abs=1e-6)
    assert answers[0].idle == one.idle


def test_nan_on_one_shard_is_the_same_error_on_all() -> None:
    answers = on_threads(Layout(2, 2), mesh.N, lambda of: mesh.take_steps(Given(of), 4, 1))
    assert {answer.error for answer in answers} == {
        "at step 3: training loss nan with lr 0.003: diverged; try a smaller lr"
    }
