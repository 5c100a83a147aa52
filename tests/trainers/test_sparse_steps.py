"""Every sparse path held to its architecture's dense reference, in float64: losses, gradients, counts, updates."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from saescale.trainers.architectures import ARCHITECTURES, batchtopk_sparse, pairwise
from saescale.trainers.architectures.architecture import (
    Batch,
    Conditions,
    Forward,
    Losses,
    Params,
    Shape,
    State,
    find_architecture,
)
from saescale.trainers.architectures.dead import DeadLatents, fired
from saescale.trainers.architectures.dense import DenseStep
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.kernels import cpu, eager
from saescale.trainers.mesh.mesh import ALONE
from saescale.trainers.precision import Precision
from saescale.trainers.preprocess import Centre
from saescale.trainers.training.optimiser import Adam
from tests.trainers.implementations import NAMES, implementation

SPARSE = [name for name in ARCHITECTURES.names() if getattr(find_architecture(name), "step", None) and name != "topk"]
PAIRWISE = [name for name in SPARSE if isinstance(find_architecture(name).step, pairwise.PairwiseStep)]
VARIANCE, COEFFICIENT, WINDOW = 0.7, 0.03, 1_000
CONDITIONS = Conditions(VARIANCE, WINDOW, 0.5, COEFFICIENT)
Tensors = dict[str, torch.Tensor]


def settings_of(name: str, **given: Any) -> Any:
    own = find_architecture(name).Settings
    return own(**{key: value for key, value in given.items() if key in own.model_fields})


def sae_of(name: str, shape: Shape, seed: int, precision: Precision = "fp32", **given: Any) -> SAE:
    """Away from its start: untied, with biases."""
    generator = torch.Generator().manual_seed(seed)
    chosen = settings_of(name, **given)
    centre = Centre(torch.randn(shape.d_model, generator=generator) * 0.1, VARIANCE)
    params = {}
    for key, made in find_architecture(name).parameters(shape, chosen, centre, seed).items():
        moved = 0.1 * torch.randn(made.data.shape, generator=generator) if made.trained else 0.0
        params[key] = made.data + moved
    return SAE(name, shape, chosen, params, precision)


def optimiser_of(sae: SAE) -> Adam:
    centre = Centre(torch.zeros(sae.shape.d_model), VARIANCE)
    return Adam(sae.params, sae.architecture.parameters(sae.shape, sae.settings, centre, 0), 3e-3, 0.9)


def rows(batch: int, d_model: int, seed: int) -> torch.Tensor:
    x = torch.randn(batch, d_model, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def some_dead(n_latents: int, share: float, seed: int) -> DeadLatents:
    dead = DeadLatents(n_latents)
    chance = torch.rand(n_latents, generator=torch.Generator().manual_seed(seed))
    dead.tokens_since[chance < share] = 10 * WINDOW
    return dead


def reference(sae: SAE, x: torch.Tensor, idle: torch.Tensor | None = None) -> tuple[Forward, Losses, Params]:
    """In float64; `idle` are the dead latents before the batch."""
    exact = {name: tensor.double().requires_grad_() for name, tensor in sae.params.items()}
    run = getattr(sae.architecture, "training_forward", sae.architecture.forward)
    forward = run(exact, x.double(), sae.settings)
    dead = ~fired(forward.latents.detach()) if idle is None else idle & ~fired(forward.latents.detach())
    state = State(VARIANCE, dead, CONDITIONS.progress, COEFFICIENT)
    return forward, sae.architecture.losses(exact, forward, x.double(), sae.settings, state), exact


def decisions(sae: SAE, x: torch.Tensor, dead: DeadLatents) -> tuple[torch.Tensor, ...]:
    """What rounding must not change for two ways to agree: who is active, who fires, whom AuxK or a threshold takes."""
    forward, _, _ = reference(sae, x, dead.after(WINDOW))
    pre = forward.pre_activations.detach()
    made = [forward.latents > 0, fired(forward.latents)]
    if hasattr(sae.settings, "bandwidth"):
        off = (pre - sae.params["threshold"].relu().double()).abs()
        made += [off < sae.settings.bandwidth / 2]
    if getattr(sae.settings, "k_aux", 0):
        idle = dead.after(WINDOW) & ~fired(forward.latents)
        best = pre.masked_fill(~idle, -torch.inf).topk(min(sae.settings.k_aux, pre.shape[1]), dim=1).indices
        made += [torch.zeros_like(pre).scatter_(1, best, 1.0) * idle]
    if hasattr(sae.settings, "experts"):
        made += [pre[:, -sae.settings.experts :].argmax(dim=1)]
        pre = pre[:, : -sae.settings.experts]
    made += [pre > 0]
    if hasattr(sae.settings, "levels"):
        made += [forward.latents.topk(k, dim=1).indices.sort(dim=1).values for k in sae.settings.levels()[:-1]]
    return tuple(made)


def clear_cut(sae: SAE, x: torch.Tensor, dead: DeadLatents) -> bool:
    before = decisions(sae, x, dead)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        moved = {n: t + 3e-6 * torch.randn(t.shape, generator=generator) for n, t in sae.params.items()}
        after = decisions(sae.like(moved), x, dead)
        if not all(torch.equal(one, two) for one, two in zip(before, after, strict=True)):
            return False
    return True


def moved_by(sae: SAE, gradient: Any) -> Tensors:
    """The gradient that a step of plain gradient descent shows: Adam without memory, of tiny second moments."""
    twin = SAE(sae.name, sae.shape, sae.settings, {n: t.clone() for n, t in sae.params.items()}, sae.precision)
    optimiser = optimiser_of(twin)
    updates = {
        name: update._replace(
            adam=update.adam._replace(lr=1.0, beta1=0.0, beta2=1.0, eps=1.0, correction1=1.0, correction2=0.0),
            unit_rows=False,
        )
        for name, update in optimiser.next().items()
    }
    before = {name: tensor.clone() for name, tensor in twin.params.items()}
    twin.step.update(twin.params, twin.operands, gradient, updates, ALONE)
    return {name: (before[name] - twin.params[name]).double() for name in updates}


@pytest.mark.parametrize("name", SPARSE)
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(2, 40), d_model=st.integers(2, 30), n_latents=st.integers(4, 120), k=st.integers(1, 12),
    k_aux=st.integers(0, 30), dead_share=st.floats(0, 1), seed=st.integers(0, 1_000), half=st.booleans(),
)  # fmt: skip
def test_losses_gradients_and_counts_equal_the_float64_reference(
    name: str, batch: int, d_model: int, n_latents: int, k: int, k_aux: int, dead_share: float, seed: int, half: bool
) -> None:
    variant, experts = "relu" if half else "ste", 4 if half else 2
    if name == "switch":
        n_latents, k = experts * (n_latents // 4), min(k, n_latents // 4)
    sae = sae_of(
        name,
        Shape(d_model, n_latents),
        seed,
        k=min(k, n_latents),
        k_aux=k_aux,
        variant=variant,
        bandwidth=0.2,
        experts=experts,
    )
    x, origin = rows(batch, d_model, seed), 0.1 * torch.randn(d_model, generator=torch.Generator().manual_seed(seed))
    dead = some_dead(n_latents, dead_share, seed)
    assume(clear_cut(sae, x, dead))
    before = copy.deepcopy(dead)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairwise, "DENSE_ABOVE", 1.0)
        step = sae.step.measure(sae.params, sae.operands, Batch.of(x, origin, False), sae.settings, CONDITIONS, dead,
                                ALONE)  # fmt: skip
    assert not hasattr(step.gradient, "of_trained")  # it went the sparse way
    forward, losses, exact = reference(sae, x, before.after(WINDOW))
    gradients = torch.autograd.grad(losses.total, list(exact.values()), materialize_grads=True)

    assert step.main == pytest.approx(float(losses.main.detach()), rel=1e-4)
    assert set(step.parts) == set(losses.parts)
    for part, value in losses.parts.items():
        assert float(step.parts[part]) == pytest.approx(float(value.detach()), rel=1e-3, abs=1e-5), part
    pairs = int((forward.latents > 0).sum())
    wanted = (batch, pairs + losses.beside.selected, losses.beside.selected_aux, losses.beside.dead)
    assert step.worked.read()[:4] == wanted
    if step.active is not None:
        assert step.active == pytest.approx(pairs / batch)
    assert torch.equal(dead.tokens_since, torch.where(fired(forward.latents), 0, before.tokens_since + batch))
    got = moved_by(sae, step.gradient)
    for parameter, wanted_gradient in zip(exact, gradients, strict=True):
        if parameter in got:
            scale = float(wanted_gradient.abs().max()) + 1e-6
            # A difference of float32 parameters, which are of the order of 1, shows 1e-7 of them.
            off = float((got[parameter] - wanted_gradient).abs().max())
            assert off < 1e-3 * scale + 3e-7, (parameter, off, scale)


@pytest.mark.parametrize("name", SPARSE)
def test_several_steps_equal_those_of_the_dense_path(name: str) -> None:
    """Through the optimiser, with unit rows and the average of the weights; and evaluation after them."""
    fast = sae_of(name, Shape(16, 64), 1, k=5, k_aux=6)
    slow = SAE(name, fast.shape, fast.settings, {n: t.clone() for n, t in fast.params.items()})
    slow.step = DenseStep(slow.architecture, 64)
    optimisers, dead = (optimiser_of(fast), optimiser_of(slow)), (some_dead(64, 0.3, 0), some_dead(64, 0.3, 0))
    batch = Batch.of(rows(50, 16, 0), torch.zeros(16), False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairwise, "DENSE_ABOVE", 1.0)
        for number in range(4):
            batch = Batch.of(rows(50, 16, number), 0.1 * torch.ones(16), False)
            for sae, optimiser, counters in zip((fast, slow), optimisers, dead, strict=True):
                made = sae.step.measure(
                    sae.params, sae.operands, batch, sae.settings, CONDITIONS, counters, ALONE
                )  # fmt: skip
                sae.step.update(sae.params, sae.operands, made.gradient, optimiser.next(), ALONE)
        for parameter, tensor in fast.params.items():
            assert torch.allclose(tensor, slow.params[parameter], atol=3e-5), parameter
        ours, theirs = (sae.like(optimiser.averaged()) for sae, optimiser in zip((fast, slow), optimisers, strict=True))
        theirs.step = slow.step
        for sae in (ours, theirs):
            sae.calibrate(batch)
        for parameter, tensor in ours.params.items():
            assert torch.allclose(tensor, theirs.params[parameter], atol=3e-5), parameter
        got, wanted = ours.reconstruct(batch), theirs.reconstruct(batch)
    assert torch.allclose(got.error, wanted.error, atol=2e-4)
    assert int(got.active) == pytest.approx(int(wanted.active), abs=2)
    assert 0 < int(got.active) < 50 * 64


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_where_many_are_active_the_step_is_the_dense_one(name: str, precision: Precision) -> None:
    """And its operands follow; the counts and the loss are those of the sparse way."""
    made = {}
    for share in (0.0, 1.0):
        sae, dead = sae_of(name, Shape(12, 80), 2, precision, k=5), DeadLatents(80)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pairwise, "DENSE_ABOVE", share)
            batch = Batch.of(rows(40, 12, 1), torch.zeros(12), precision == "bf16")
            step = sae.step.measure(sae.params, sae.operands, batch, sae.settings, CONDITIONS, dead, ALONE)
            assert hasattr(step.gradient, "of_trained") == (share == 0.0)
            sae.step.update(sae.params, sae.operands, step.gradient, optimiser_of(sae).next(), ALONE)
            quality = sae.reconstruct(batch)
        made[share] = (step.main, step.worked.read().selected, float(quality.squared))
        if precision == "bf16":
            assert torch.equal(sae.operands["W_enc"], sae.params["W_enc"].bfloat16())
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert made[0.0] == pytest.approx(made[1.0], rel=tolerance)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("parameter", ["W_enc", "W_dec"])
def test_one_bad_weight_is_noticed(name: str, parameter: str) -> None:
    sae = sae_of(name, Shape(8, 32), 0, k=4)
    sae.params[parameter][3] = float("nan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairwise, "DENSE_ABOVE", 1.0)
        batch = Batch.of(rows(40, 8, 0), torch.zeros(8), False)
        dead = DeadLatents(32)
        step = sae.step.measure(sae.params, sae.operands, batch, sae.settings, CONDITIONS, dead, ALONE)
        assert not torch.tensor(step.main).isfinite()
        assert not sae.reconstruct(batch).squared.isfinite()


# --- the choice of a batch's largest


@pytest.mark.parametrize("kernels", [cpu, eager])
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 20), n_latents=st.integers(1, 60), k=st.integers(1, 8), seed=st.integers(0, 1_000),
    uneven=st.sampled_from([0.0, 1.0, 5.0]), ties=st.booleans(),
)  # fmt: skip
def test_a_batch_keeps_its_largest_exactly(
    kernels: Any, batch: int, n_latents: int, k: int, seed: int, uneven: float, ties: bool
) -> None:
    """Also where one token has far more of them than was looked at first; ties to the lower token, then latent."""
    k = min(k, n_latents)
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.eye(batch), torch.zeros(n_latents)
    pre = torch.randn(batch, n_latents, generator=generator)
    pre += uneven * torch.randn(batch, 1, generator=generator)
    if ties:
        pre = (2 * pre).round() / 2
    got = batchtopk_sparse.batch_top_k(kernels, x, pre.T.contiguous(), bias, k)

    order = sorted((-float(value), place) for place, value in enumerate(pre.flatten()) if value > 0)
    wanted = {divmod(place, n_latents): -value for value, place in order[: k * batch]}
    found = {
        (token, int(latent)): float(z)
        for token, (indices, values) in enumerate(zip(got.indices, got.z, strict=True))
        for latent, z in zip(indices, values, strict=True)
        if latent >= 0
    }
    assert found == wanted
    for indices, values in zip(got.indices.tolist(), got.z.tolist(), strict=True):
        real = [index for index in indices if index >= 0]
        assert indices == sorted(real) + [-1] * (len(indices) - len(real))
        assert all((value > 0) == (index >= 0) for index, value in zip(indices, values, strict=True))


# --- the kernels that these paths have beside TopK's


@pytest.mark.parametrize("which", [name for name in NAMES if name != "cuda, interpreted"])
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 9), d_model=st.integers(1, 20), n_latents=st.integers(1, 70), seed=st.integers(0, 1_000),
    low=st.floats(-2, 2), half=st.booleans(),
)  # fmt: skip
def test_what_exceeds_a_threshold_is_selected(
    which: str, batch: int, d_model: int, n_latents: int, seed: int, low: float, half: bool
) -> None:
    kernels, device = implementation(which)
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers, whose products and sums are exact in either type.
    x, W = (
        torch.randint(-3, 4, shape, generator=generator).float() for shape in ((batch, d_model), (n_latents, d_model))
    )
    bias, threshold = (torch.randn(n_latents, generator=generator) for _ in range(2))
    threshold += low
    dtype = torch.bfloat16 if half else torch.float32
    pre = x @ W.T + bias
    above = pre > threshold
    arguments = [t.to(device) for t in (x.to(dtype), W.to(dtype), bias, threshold)]
    pairs = int(above.sum())
    got = kernels.select_above(*arguments, pairs)
    assert kernels.select_above(*arguments, pairs - 1) is None or pairs == 0
    assert got is not None
    assert got.indices.dtype == torch.int32
    assert got.z.shape == got.indices.shape == (batch, max(1, int(above.sum(dim=1).max())))
    if d_model < 20 or not half:  # beyond 256 a whole number may be rounded in bfloat16
        for token in range(batch):
            count = int(above[token].sum())
            assert got.indices[token].tolist() == above[token].nonzero().flatten().tolist() + [-1] * (
                got.indices.shape[1] - count
            )
            assert torch.equal(got.z[token, :count].cpu(), pre[token, above[token]])
            assert not got.z[token, count:].any()


@pytest.mark.parametrize("which", [name for name in NAMES if name != "cuda, interpreted"])
@pytest.mark.parametrize("width", [1, 3, 8, 13])
def test_the_gradient_by_z_is_a_product_of_error_and_decoder_row(which: str, width: int) -> None:
    kernels, device = implementation(which)
    generator = torch.Generator().manual_seed(width)
    error, W_dec = torch.randn(7, 11, generator=generator), torch.randn(40, 11, generator=generator)
    indices = torch.stack([torch.randperm(40, generator=generator)[:width] for _ in range(7)]).int()
    indices[torch.rand(7, width, generator=generator) < 0.3] = -1
    got = kernels.gradient_by_z(error.to(device), indices.to(device), W_dec.to(device), 0.3).cpu()
    for token in range(7):
        for place in range(width):
            n = int(indices[token, place])
            wanted = 0.3 * float(error[token].double() @ W_dec[n].double()) if n >= 0 else 0.0
            assert float(got[token, place]) == pytest.approx(wanted, abs=1e-5)
