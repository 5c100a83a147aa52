"""FLOPs are what torch counts: of the dense reference, and of a step that touches pairs alone and gets its gradient."""

import json

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from saescale.trainers.architectures import pairwise
from saescale.trainers.architectures.architecture import Batch, Reconstruction, Shape, Worked
from saescale.trainers.architectures.dead import DeadLatents
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.mesh.mesh import ALONE
from saescale.trainers.preprocess import measure_centre, normalise
from saescale.trainers.training.training_cell import TrainingCell
from tests.trainers.test_sparse_steps import COEFFICIENT, CONDITIONS, VARIANCE, optimiser_of, reference, rows, sae_of

SHAPE, TOKENS = Shape(20, 48), 30
NAMES = ["topk", "frozen_decoder", "frozen_encoder", "relu", "prolu", "gated", "jumprelu"]


def case(name: str) -> tuple[SAE, Tensor]:
    return sae_of(name, SHAPE, 3, k=5, k_aux=0, bandwidth=0.3), rows(TOKENS, SHAPE.d_model, 3)


def trained(sae: SAE) -> list[str]:
    return list(optimiser_of(sae).moments)


@pytest.mark.parametrize("name", NAMES)
def test_dense_flops_are_those_of_the_reference(name: str) -> None:
    sae, x = case(name)
    names = trained(sae)
    with FlopCounterMode(display=False) as counter:
        _, losses, exact = reference(sae, x)
        torch.autograd.grad(losses.total, [exact[of] for of in names])
    assert sae.architecture.flops(SHAPE, sae.settings, Worked(TOKENS)).dense == counter.get_total_flops()


class ByPairs:
    """A step in float64, token by token, whose every product with a row is one of torch's, which counts it."""

    def __init__(self, sae: SAE, x: Tensor, trained: list[str]) -> None:
        self.params = {name: tensor.double() for name, tensor in sae.params.items()}
        self.x, self.trained = x.double(), trained
        self.scores = (self.x - self.params["b_pre"]) @ self.params["W_enc"].T
        self.W_dec, self.W_enc = (torch.zeros(SHAPE.n_latents, SHAPE.d_model, dtype=torch.float64) for _ in range(2))

    def error(self, token: int, rows: Tensor, z: Tensor) -> Tensor:
        """The gradient by x_hat, z being the activations of `rows`."""
        x_hat = (z[None] @ self.params["W_dec"][rows])[0] + self.params["b_pre"]
        return 2 * (x_hat - self.x[token]) / self.x.numel() / VARIANCE

    def by_z(self, rows: Tensor, error: Tensor) -> Tensor:
        return (self.params["W_dec"][rows] @ error[:, None])[:, 0]

    def add(self, token: int, rows: Tensor, z: Tensor, error: Tensor, encoder: Tensor, dz: Tensor) -> None:
        """To the gradients of W_dec, by `rows`, and of W_enc, by the rows `encoder`."""
        if "W_dec" in self.trained:
            self.W_dec[rows] += z[:, None] @ error[None]
        if "W_enc" in self.trained:
            self.W_enc[encoder] += dz[:, None] @ (self.x[token] - self.params["b_pre"])[None]


def plain(step: ByPairs, token: int, latents: Tensor, name: str) -> None:
    """TopK, the frozen ones, ReLU and ProLU."""
    active = latents.nonzero()[:, 0]
    z = latents[active]
    error = step.error(token, active, z)
    dz = step.by_z(active, error)
    if name in ("relu", "prolu"):
        dz = dz + COEFFICIENT / TOKENS
    if name == "prolu":
        dz = dz + dz * z
    step.add(token, active, z, error, active, dz)


def jumping(step: ByPairs, token: int, latents: Tensor, bandwidth: float) -> None:
    pre, theta = step.scores[token] + step.params["b_enc"], step.params["threshold"].relu()
    seen = ((latents > 0) | ((pre - theta).abs() < bandwidth / 2)).nonzero()[:, 0]
    active = latents.nonzero()[:, 0]
    error = step.error(token, active, latents[active])
    G = torch.zeros_like(latents).index_copy(0, seen, step.by_z(seen, error))  # of pairs below theta too
    step.add(token, active, latents[active], error, active, G[active])


def gating(step: ByPairs, token: int, latents: Tensor) -> None:
    gate = (step.scores[token] + step.params["b_gate"]).relu()
    active, opened = latents.nonzero()[:, 0], gate.nonzero()[:, 0]
    error = step.error(token, active, latents[active])
    by_score = torch.zeros_like(gate)
    by_score[active] = step.by_z(active, error) * step.params["r_mag"].exp()[active]
    missed = step.error(token, opened, gate[opened])
    by_score[opened] += step.by_z(opened, missed) + COEFFICIENT / TOKENS
    step.add(token, active, latents[active], error, opened, by_score[opened])


@pytest.mark.parametrize("name", NAMES)
def test_sparse_flops_are_those_of_a_step_by_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "DENSE_ABOVE", 1.0)
    sae, x = case(name)
    forward, losses, exact = reference(sae, x)
    wanted = dict(
        zip(exact, torch.autograd.grad(losses.total, list(exact.values()), materialize_grads=True), strict=True)
    )
    names = trained(sae)
    with FlopCounterMode(display=False) as counter:
        step = ByPairs(sae, x, names)
        for token, latents in enumerate(forward.latents.detach()):
            if name == "jumprelu":
                jumping(step, token, latents, sae.settings.bandwidth)
            elif name == "gated":
                gating(step, token, latents)
            else:
                plain(step, token, latents, name)
    for parameter in {"W_dec", "W_enc"} & set(names):
        assert torch.allclose(getattr(step, parameter), wanted[parameter], rtol=1e-6, atol=1e-9), parameter

    batch = Batch.of(x, torch.zeros(SHAPE.d_model), False)
    did = sae.step.measure(
        sae.params, sae.operands, batch, sae.settings, CONDITIONS, DeadLatents(SHAPE.n_latents), ALONE
    )  # fmt: skip
    assert not did.dense
    assert sae.architecture.flops(SHAPE, sae.settings, did.worked.read()).sparse == counter.get_total_flops()


def test_a_cell_counts_the_way_of_each_step_and_what_its_controller_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    d_model, n_latents, batch, steps = 32, 128, 64, 60
    cell = Cell(
        store="s", d_model=d_model, n_latents=n_latents, k=4, architecture="relu", tokens=steps * batch,
        batch_tokens=batch, lr=1e-2, dead_after_tokens=10**6, ema=0.9,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(6, d_model, generator=generator)
    data = [normalise(torch.rand(batch, 6, generator=generator) @ directions) for _ in range(steps)]
    real = SAE.reconstruct
    looks: list[int] = []
    ways: set[tuple[bool, bool]] = set()

    def reconstruct(self: SAE, batch: Batch) -> Reconstruction:
        found = real(self, batch)
        looks.append(int(found.active))
        return found

    monkeypatch.setattr(SAE, "reconstruct", reconstruct)
    centre = measure_centre(torch.cat(data))
    training, a_score = TrainingCell(cell, centre, torch.device("cpu")), n_latents * d_model * batch
    for number, x in enumerate(data):
        if number == steps // 2:
            state, tensors = json.loads(json.dumps(training.state())), training.tensors()
            training = TrainingCell(cell, centre, torch.device("cpu"))
            training.restore(tensors, state)
        looks.clear()
        pre = normalise(x) @ training.sae.params["W_enc"].T + training.sae.params["b_enc"]
        pre = pre - training.sae.params["W_enc"] @ training.sae.params["b_pre"]
        pairs, before = int((pre > 0).sum()), training.flops
        training.train_on(Batch.of(x, centre.b_pre, False))
        # More than an eighth of all pairs: dense.
        dense = pairs > batch * n_latents / 8
        wanted = 12 * a_score if dense else 2 * a_score + 8 * pairs * d_model
        for active in looks:
            wanted += 4 * a_score if active > batch * n_latents / 8 else 2 * a_score + 2 * active * d_model
        ways.add((dense, bool(looks)))
        assert training.flops.sparse - before.sparse == pytest.approx(wanted, rel=1e-3)  # a pair that is about 0
        assert training.flops.dense - before.dense == (12 + 4 * len(looks)) * a_score
    assert ways >= {(True, False), (False, True), (False, False)}
