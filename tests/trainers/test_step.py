"""A training step held to the dense reference: losses, every gradient, dead latents, the optimiser's order."""

import copy

import numba
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from saescale.trainers.architectures import topk
from saescale.trainers.architectures.architecture import ACTIVE_ABOVE, Batch, Conditions, Parameter, State
from saescale.trainers.architectures.dead import DeadLatents, fired
from saescale.trainers.architectures.dense import DenseStep
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.kernels.interface import Selected
from saescale.trainers.mesh.mesh import ALONE
from saescale.trainers.precision import Precision
from saescale.trainers.training.optimiser import EPS, Adam
from tests.trainers.topk_case import (
    Tensors,
    adam_of,
    dense,
    in_float64,
    new_sae,
    random_sae,
    reference_step,
    take_step,
    update,
)


def assert_same_gradients(got: Tensors, exact: Tensors, tolerance: float) -> None:
    for name, wanted in exact.items():
        scale = float(wanted.abs().max()) + 1e-12
        assert float((got[name] - wanted).abs().max()) / scale < tolerance, name


def is_clear_cut(sae: SAE, x: torch.Tensor, dead: DeadLatents, margin: float = 2e-5) -> bool:
    """Whether rounding to float32 cannot change which latents are selected, are above zero, or have fired."""
    forward = in_float64(sae).forward(x.double())
    pre = forward.pre_activations
    idle = dead.after(1000) & ~fired(forward.latents)
    ranks = [(pre, sae.settings.k), (pre[:, idle], sae.settings.k_aux)]
    if sae.settings.multi_topk:
        ranks.append((pre, topk.MULTI_TOPK_FACTOR * sae.settings.k))
    for entries, k in ranks:
        if 0 < k < entries.shape[1]:
            ranked = entries.sort(dim=1, descending=True).values
            close = ranked[:, k - 1] - ranked[:, k] < margin
            if bool((close & (ranked[:, k - 1] > -margin)).any()):
                return False
    return float(pre.abs().min()) > margin and float((pre - ACTIVE_ABOVE).abs().min()) > margin


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(2, 40),
    d_model=st.integers(2, 40),
    n_latents=st.integers(1, 150),
    k_share=st.floats(0, 1),
    k_aux=st.integers(0, 40),
    multi=st.booleans(),
    dead_share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_losses_and_gradients_equal_the_float64_reference(
    batch: int, d_model: int, n_latents: int, k_share: float, k_aux: int, multi: bool, dead_share: float, seed: int
) -> None:
    k = max(1, round(k_share * n_latents))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_model, generator=generator)
    origin = torch.randn(d_model, generator=generator)
    sae = random_sae(d_model, n_latents, k, seed, k_aux=k_aux, multi_topk=multi)
    dead = DeadLatents(n_latents)
    dead.tokens_since[torch.rand(n_latents, generator=generator) < dead_share] = 1000

    assume(is_clear_cut(sae, x, dead))
    other = copy.deepcopy(dead)

    got = take_step(sae, x, origin, dead, window=1000, variance=0.7)

    losses, exact = reference_step(sae, x, dead.after(1000), variance=0.7)
    assert got.main == pytest.approx(float(losses.main.detach()), rel=1e-4)
    assert got.parts["multi"] == pytest.approx(float(losses.parts["multi"].detach()), rel=1e-4)
    assert got.parts["auxk"] == pytest.approx(float(losses.parts["auxk"].detach()), rel=1e-3, abs=1e-6)
    assert_same_gradients(dense(got.gradient, sae), exact, tolerance=1e-3)

    # The path of an architecture that has no other: the same, from a batch that is centred elsewhere.
    batch, conditions = Batch.of(x, origin, False), Conditions(0.7, 1000)
    slow = DenseStep(sae.architecture, n_latents)
    by_autograd = slow.measure(sae.params, sae.params, batch, sae.settings, conditions, other, ALONE)
    assert torch.equal(other.tokens_since, dead.tokens_since)
    assert by_autograd.worked == got.worked
    assert by_autograd.main == pytest.approx(got.main, rel=1e-4)
    assert_same_gradients(by_autograd.gradient.of_trained, exact, tolerance=1e-3)


def test_reference_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    sae = in_float64(random_sae(5, 12, 3, seed=3, k_aux=2, auxk_coefficient=1.0, multi_topk=True))
    without = sae.settings.model_copy(update={"k_aux": 0})
    x, dead = torch.randn(7, 5, dtype=torch.float64), torch.arange(12) % 2 == 0
    # To AuxK the residual is a constant, so finite differences may not move it either.
    residual = x - sae.forward(x).x_hat

    def main_and_multi(*values: torch.Tensor) -> torch.Tensor:
        moved = dict(zip(sae.params, values, strict=True))
        return topk.losses(moved, topk.forward(moved, x, without), x, without, State(1.0, dead)).total

    def auxk(*values: torch.Tensor) -> torch.Tensor:
        moved = dict(zip(sae.params, values, strict=True))
        pre = topk.forward(moved, x, sae.settings).pre_activations
        return topk.auxk_loss(moved, pre, residual, dead, sae.settings.k_aux)[0]

    parameters = [tensor.requires_grad_() for tensor in sae.params.values()]
    for function in (main_and_multi, auxk):
        assert torch.autograd.gradcheck(function, parameters, eps=1e-7, atol=1e-5)

    losses = topk.losses(sae.params, sae.forward(x), x, sae.settings, State(1.0, dead))
    assert float(losses.parts["auxk"].detach()) > 0
    wanted = torch.autograd.grad(main_and_multi(*parameters) + auxk(*parameters), parameters)
    for got, want in zip(torch.autograd.grad(losses.total, parameters), wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-12)


def test_auxk_reaches_encoder_and_decoder_of_dead_latents_and_nothing_else() -> None:
    torch.manual_seed(1)
    x = torch.randn(30, 8)
    dead = DeadLatents(40)
    dead.tokens_since[:20] = 10_000
    grads = {}
    for k_aux in (0, 8):
        sae = random_sae(8, 40, 2, seed=5, k_aux=k_aux, auxk_coefficient=1.0)
        # Dead latents that never win a place among the k largest.
        sae.params["b_enc"][:20] -= 0.5
        counted = copy.deepcopy(dead)
        grads[k_aux] = dense(take_step(sae, x, torch.zeros(8), counted, 5_000).gradient, sae)
        alive = ~counted.after(5_000)
    assert (~alive).sum() >= 10
    for name in ("W_enc", "b_enc", "W_dec"):
        change = (grads[8][name] - grads[0][name]).abs()
        assert change[~alive].max() > 1e-5, f"AuxK gives {name} of dead latents no gradient"
        assert change[alive].max() < 1e-7, f"AuxK moves {name} of live latents"
    assert (grads[8]["b_pre"] - grads[0]["b_pre"]).abs().max() > 1e-6


def test_no_dead_latents_gives_no_auxk_and_no_nan() -> None:
    sae = random_sae(8, 16, 2, seed=0, k_aux=4)
    result = take_step(sae, torch.randn(5, 8), torch.zeros(8), DeadLatents(16), 1000)
    assert result.parts["auxk"] == 0.0
    assert result.worked.dead == result.worked.selected_aux == 0
    assert all(torch.isfinite(gradient).all() for gradient in dense(result.gradient, sae).values())


def test_bf16_selection_keeps_the_loss() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 48)
    exact = take_step(random_sae(48, 300, 12, seed=1), x, torch.zeros(48), DeadLatents(300))
    rough = take_step(random_sae(48, 300, 12, seed=1, precision="bf16"), x, torch.zeros(48), DeadLatents(300))
    assert rough.main == pytest.approx(exact.main, rel=5e-3)
    assert rough.main != exact.main


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_one_bad_encoder_weight_is_noticed(precision: Precision, value: float) -> None:
    sae = random_sae(8, 16, 2, seed=0, precision=precision)
    sae.params["W_enc"][3, 5] = value
    sae.round()
    x, origin = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), sae.params["b_pre"].clone()
    assert not sae.reconstruct(Batch.of(x, origin, precision == "bf16")).squared.isfinite()
    assert not np.isfinite(take_step(sae, x, origin, DeadLatents(16)).main)


def test_the_forward_pass_equals_the_dense_one() -> None:
    torch.manual_seed(0)
    sae, x, origin = random_sae(16, 50, 5, seed=2), torch.randn(20, 16), torch.randn(16)
    forward = sae.forward(x)
    wanted = x - forward.x_hat
    slow = DenseStep(sae.architecture, 50)
    slow.rows = 7  # in several pieces, the last one short
    batch = Batch.of(x, origin, bf16=False)
    for got in (sae.reconstruct(batch), slow.reconstruct(sae.params, sae.params, batch, sae.settings, ALONE)):
        assert torch.allclose(got.error, wanted, atol=1e-5)
        assert got.squared == pytest.approx(float(wanted.square().sum()), rel=1e-5)
        assert got.active == int((forward.latents > 0).sum())


def test_another_site_as_the_target() -> None:
    """A transcoder's batch: x is encoded, and x_hat is compared with the target."""
    torch.manual_seed(0)
    sae, x, target, origin = random_sae(16, 50, 5, seed=2), torch.randn(20, 16), torch.randn(20, 16), torch.randn(16)
    batch, conditions = Batch.of(x, origin, False, target), Conditions(1.0, 10**9)
    forward = sae.forward(x)
    assert torch.allclose(sae.reconstruct(batch).error, target - forward.x_hat, atol=1e-5)
    slow = DenseStep(sae.architecture, 50)
    fast = sae.step.measure(sae.params, sae.operands, batch, sae.settings, conditions, DeadLatents(50), ALONE)
    wanted = slow.measure(sae.params, sae.params, batch, sae.settings, conditions, DeadLatents(50), ALONE)
    assert fast.main == pytest.approx(float((target - forward.x_hat).square().mean()), rel=1e-5)
    assert_same_gradients(dense(fast.gradient, sae), wanted.gradient.of_trained, tolerance=1e-3)


@pytest.mark.parametrize("form", ["selected", "dense"])
def test_dead_latents_are_counted_in_tokens(form: str) -> None:
    dead = DeadLatents(3)
    for named in ([0, 2], [0, 0], [-1, 1]):
        # 100 tokens, the first of which has these latents; an activation of 1e-3 is too small to count.
        z = torch.full((100, 2), 1e-3)
        z[0] = torch.tensor([1.0 if index >= 0 and named != [-1, 1] else 1e-3 for index in named])
        indices = torch.tensor([named] * 100, dtype=torch.int32)
        latents = torch.zeros(100, 3).scatter_(1, indices.clamp_min(0).long(), z)
        dead.update(Selected(indices, z) if form == "selected" else latents)
    assert dead.tokens_since.tolist() == [100, 300, 200]
    assert dead.after(200).tolist() == [False, True, True]


def test_a_latent_that_fires_in_the_batch_is_not_dead_in_it() -> None:
    sae = random_sae(8, 16, 16, seed=4, k_aux=4)  # k = N: every latent with a positive pre-activation fires
    dead = DeadLatents(16)
    dead.tokens_since[:] = 10**6
    take_step(sae, torch.randn(400, 8), torch.zeros(8), dead, 10**6)
    assert not dead.after(10**6).any()


@pytest.mark.parametrize("multi", [False, True])
def test_the_fused_optimiser_equals_the_plain_order_and_keeps_unit_rows(multi: bool) -> None:
    fused, plain = (random_sae(20, 90, 4, seed=0, k_aux=2, multi_topk=multi) for _ in range(2))
    fast, slow = adam_of(fused, 3e-3, 0.9), adam_of(plain, 3e-3, 0.9)
    dead, other = DeadLatents(90), DeadLatents(90)
    for counters in (dead, other):
        counters.tokens_since[:40] = 10_000
    origin = torch.zeros(20)
    for i in range(10):
        x = torch.randn(30, 20, generator=torch.Generator().manual_seed(i))
        update(fused, fast, take_step(fused, x, origin, dead, 5_000))
        gradient = take_step(plain, x, origin, other, 5_000).gradient
        slow.apply({name: grad.float() for name, grad in dense(gradient, plain).items()})
    for name, tensor in fast.tensors().items():
        assert torch.allclose(tensor, slow.tensors()[name], atol=2e-5, rtol=1e-4), name
    assert torch.allclose(fused.params["W_dec"].norm(dim=1), torch.ones(90), atol=1e-6)
    for name, averaged in fast.averaged().items():
        assert torch.allclose(averaged, slow.averaged()[name], atol=2e-5)


def test_the_rounded_encoder_follows_every_step_and_restore() -> None:
    sae = random_sae(20, 30, 4, seed=0, precision="bf16")
    optimiser = adam_of(sae, 1e-2, 0.9)
    before = sae.operands["W_enc"].clone()
    x = torch.randn(40, 20)
    for _ in range(3):
        update(sae, optimiser, take_step(sae, x, torch.zeros(20), DeadLatents(30)))
        assert torch.equal(sae.operands["W_enc"], sae.params["W_enc"].bfloat16())
    assert not torch.equal(sae.operands["W_enc"], before)
    assert sae.operands["W_dec"] is sae.params["W_dec"]
    other = random_sae(20, 30, 4, seed=1, precision="bf16")
    adam_of(other, 1e-2, 0.9).restore({name: t.numpy() for name, t in optimiser.tensors().items()}, optimiser.steps)
    other.round()
    assert torch.equal(other.operands["W_enc"], sae.operands["W_enc"])


def random_gradients(sae: SAE) -> Tensors:
    return {name: torch.randn(tensor.shape) for name, tensor in sae.params.items()}


def test_plain_optimiser_is_torch_adam_with_the_paper_constants_and_a_projected_decoder() -> None:
    torch.manual_seed(0)
    sae = random_sae(6, 9, 2, seed=0)
    twin = {name: tensor.clone().requires_grad_() for name, tensor in sae.params.items()}
    ours = adam_of(sae, 1e-2, 0.9)
    adam = torch.optim.Adam(twin.values(), lr=1e-2, betas=(0.9, 0.999), eps=EPS)
    W_dec = twin["W_dec"]
    for _ in range(5):
        gradients = random_gradients(sae)
        for name, parameter in twin.items():
            parameter.grad = gradients[name].clone()
        assert W_dec.grad is not None
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True).detach() * W_dec.detach()
        adam.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        ours.apply(gradients)
    for name, tensor in sae.params.items():
        assert torch.allclose(tensor, twin[name], atol=1e-6)


def test_each_parameter_has_its_own_betas() -> None:
    start = {"a": torch.zeros(3), "b": torch.zeros(3)}
    betas = {"a": (0.0, 0.9), "b": (0.5, 0.99)}
    ours = Adam(start, {name: Parameter(start[name], betas=betas[name]) for name in start}, 1e-2, 0.9)
    twins = {name: torch.zeros(3, requires_grad=True) for name in start}
    theirs = [torch.optim.Adam([twin], lr=1e-2, betas=betas[name], eps=EPS) for name, twin in twins.items()]
    for _ in range(4):
        gradient = torch.randn(3)
        ours.apply(dict.fromkeys(start, gradient))
        for twin, optimiser in zip(twins.values(), theirs, strict=True):
            twin.grad = gradient.clone()
            optimiser.step()
    for name, twin in twins.items():
        assert torch.allclose(start[name], twin.detach(), atol=1e-6)
    assert not torch.allclose(start["a"], start["b"], atol=1e-4)


def test_average_is_bias_corrected() -> None:
    sae = random_sae(4, 6, 2, seed=0)
    optimiser = adam_of(sae, 1e-9, 0.99)
    update(sae, optimiser, take_step(sae, torch.randn(10, 4), torch.zeros(4), DeadLatents(6)))
    for name, average in optimiser.averaged().items():
        assert torch.allclose(average, sae.params[name], rtol=1e-4, atol=1e-6)


def test_averaged_weights_are_the_mean_of_those_in_use_and_their_decoder_rows_are_shorter() -> None:
    torch.manual_seed(0)
    sae = random_sae(8, 12, 3, seed=0)
    optimiser = adam_of(sae, 1e-2, 0.9)
    history = []
    for _ in range(20):
        optimiser.apply(random_gradients(sae))
        history.append({name: tensor.clone() for name, tensor in sae.params.items()})
    weight = 0.9 ** torch.arange(19, -1, -1.0)
    averaged = sae.like(optimiser.averaged())
    for name, got in averaged.params.items():
        wanted = sum(w * past[name] for w, past in zip(weight, history, strict=True)) / sum(weight)
        assert torch.allclose(got, wanted, atol=1e-5), name
    W_dec, b_pre = averaged.params["W_dec"], averaged.params["b_pre"]
    assert torch.allclose(sae.params["W_dec"].norm(dim=1), torch.ones(12), atol=1e-6)
    norms = W_dec.norm(dim=1)
    assert bool(((norms > 0.9) & (norms < 0.9999)).all())

    # Moving the norms from the decoder into z leaves the reconstruction as it is; dropping them does not.
    x = torch.randn(30, 8)
    forward = averaged.forward(x)
    unit = W_dec / norms[:, None]
    assert torch.allclose((forward.latents * norms) @ unit + b_pre, forward.x_hat, atol=1e-5)
    assert not torch.allclose(forward.latents @ unit + b_pre, forward.x_hat, atol=1e-3)


def test_kernels_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    x, twins = torch.randn(200, 24), []
    before = numba.get_num_threads()
    try:
        for threads in (1, numba.config.NUMBA_NUM_THREADS):
            numba.set_num_threads(threads)
            sae = random_sae(24, 90, 7, seed=0, multi_topk=True)
            optimiser = adam_of(sae, 1e-3, 0.9)
            update(sae, optimiser, take_step(sae, x, torch.zeros(24), DeadLatents(90)))
            twins.append(optimiser.tensors())
    finally:
        numba.set_num_threads(before)
    for name, tensor in twins[0].items():
        assert torch.equal(tensor, twins[1][name]), name


def test_initialisation_is_tied_unit_and_at_the_right_norm() -> None:
    sae = new_sae(64, 256, 16)
    W_dec = sae.params["W_dec"]
    assert torch.allclose(W_dec.norm(dim=1), torch.ones(256), atol=1e-6)
    ratio = sae.params["W_enc"] / W_dec
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-3)
    x = torch.nn.functional.normalize(torch.randn(2000, 64, generator=torch.Generator().manual_seed(9)), dim=1)
    assert float(sae.forward(x).x_hat.norm(dim=1).mean()) == pytest.approx(1.0, abs=0.05)
