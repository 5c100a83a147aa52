"""A training step held to the dense reference: losses, every gradient, dead latents, the optimiser's order."""

import copy

import numba
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from saescale.trainers.architectures import reference
from saescale.trainers.architectures.reference import Objective
from saescale.trainers.architectures.topk import SAE
from saescale.trainers.architectures.topk_sparse import Batch, DeadLatents, Gradient, Step, reconstruct, step
from saescale.trainers.kernels.interface import Selected
from saescale.trainers.precision import Precision
from saescale.trainers.training.optimiser import EPS, SAEAdam


def random_sae(d_model: int, n_latents: int, k: int, seed: int) -> SAE:
    """An SAE away from its initialisation: untied, with biases."""
    sae = SAE(d_model, n_latents, k)
    generator = torch.Generator().manual_seed(seed)
    sae.initialise(torch.randn(d_model, generator=generator) * 0.1, seed)
    with torch.no_grad():
        sae.W_enc += 0.1 * torch.randn(sae.W_enc.shape, generator=generator)
        sae.b_enc += 0.1 * torch.randn(sae.b_enc.shape, generator=generator)
    return sae


def reference_step(sae: SAE, x: torch.Tensor, objective: Objective, dead: torch.Tensor) -> tuple[reference.Losses, SAE]:
    """Losses and gradients of the dense reference in float64."""
    exact = copy.deepcopy(sae).double()
    for parameter in exact.parameters():
        parameter.grad = None
    losses = reference.losses(exact, x.double(), exact(x.double(), objective.k), dead, objective)
    losses.total.backward()
    return losses, exact


def take_step(
    sae: SAE, x: torch.Tensor, origin: torch.Tensor, objective: Objective, dead: DeadLatents, window: int = 10**9,
    precision: Precision = "fp32",
) -> Step:  # fmt: skip
    batch = Batch.of(x, origin, precision == "bf16")
    operand = sae.W_enc.data.bfloat16() if precision == "bf16" else sae.W_enc.data
    return step(sae, operand, batch, objective, dead, window)


def dense(gradient: Gradient, sae: SAE) -> dict[str, torch.Tensor]:
    """A gradient's factors multiplied out, pair by pair, in float64."""
    pairs, aux = gradient.pairs, gradient.aux
    grads = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in sae.named_parameters()}
    for n in range(sae.n_latents):
        for p in range(int(pairs.starts[n]), int(pairs.starts[n + 1])):
            row, encoder = int(pairs.rows[p]), float(pairs.encoder[p])
            grads["W_dec"][n] += float(pairs.decoder[p]) * gradient.errors[row].double()
            grads["W_enc"][n] += encoder * (gradient.x[row % len(gradient.x)] - gradient.offset).double()
            grads["b_enc"][n] += encoder
    for name in ("W_dec", "W_enc", "b_enc"):
        grads[name][aux.latents] += getattr(aux, name).double()
    grads["b_pre"] += gradient.b_pre.double() - grads["b_enc"] @ sae.W_enc.detach().double()
    return grads


def assert_same_gradients(got: dict[str, torch.Tensor], exact: SAE, tolerance: float) -> None:
    for name, parameter in exact.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = float(wanted.abs().max()) + 1e-12
        assert float((got[name] - wanted).abs().max()) / scale < tolerance, name


def is_clear_cut(sae: SAE, x: torch.Tensor, objective: Objective, dead: DeadLatents, margin: float = 2e-5) -> bool:
    """Whether rounding to float32 cannot change which latents are selected, are above zero, or have fired."""
    with torch.no_grad():
        forward = copy.deepcopy(sae).double()(x.double())
    pre = forward.pre_activations
    idle = dead.after(1000) & ~reference.fired(forward.latents)
    ranks = [(pre, objective.k), (pre[:, idle], objective.k_aux)]
    if objective.multi_topk:
        ranks.append((pre, reference.MULTI_TOPK_FACTOR * objective.k))
    for entries, k in ranks:
        if 0 < k < entries.shape[1]:
            ranked = entries.sort(dim=1, descending=True).values
            close = ranked[:, k - 1] - ranked[:, k] < margin
            if bool((close & (ranked[:, k - 1] > -margin)).any()):
                return False
    return float(pre.abs().min()) > margin and float((pre - reference.ACTIVE_ABOVE).abs().min()) > margin


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
    sae = random_sae(d_model, n_latents, k, seed)
    objective = Objective(k, variance=0.7, k_aux=k_aux, multi_topk=multi)
    dead = DeadLatents(n_latents)
    dead.tokens_since[torch.rand(n_latents, generator=generator) < dead_share] = 1000

    assume(is_clear_cut(sae, x, objective, dead))

    got = take_step(sae, x, origin, objective, dead, window=1000)

    losses, exact = reference_step(sae, x, objective, dead.after(1000))
    assert got.main == pytest.approx(float(losses.main.detach()), rel=1e-4)
    assert got.multi == pytest.approx(float(losses.multi.detach()), rel=1e-4)
    assert got.auxk == pytest.approx(float(losses.auxk.detach()), rel=1e-3, abs=1e-6)
    assert_same_gradients(dense(got.gradient, sae), exact, tolerance=1e-3)


def test_reference_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    sae = random_sae(d_model=5, n_latents=12, k=3, seed=3).double()
    x, dead = torch.randn(7, 5, dtype=torch.float64), torch.arange(12) % 2 == 0
    objective = Objective(3, 1.0, k_aux=2, auxk_coefficient=1.0, multi_topk=True)
    # To AuxK the residual is a constant, so finite differences may not move it either.
    residual = (x - sae(x).reconstruction).detach()

    def main_and_multi(*values: torch.Tensor) -> torch.Tensor:
        moved = moved_to(sae, values)
        return reference.losses(moved, x, moved(x), dead, objective._replace(k_aux=0)).total

    def auxk(*values: torch.Tensor) -> torch.Tensor:
        moved = moved_to(sae, values)
        return reference.auxk_loss(moved, moved.encode(x), residual, dead, objective.k_aux)

    parameters = list(sae.parameters())
    for function in (main_and_multi, auxk):
        assert torch.autograd.gradcheck(function, parameters, eps=1e-7, atol=1e-5)

    losses = reference.losses(sae, x, sae(x), dead, objective)
    assert float(losses.auxk.detach()) > 0
    wanted = torch.autograd.grad(main_and_multi(*parameters) + auxk(*parameters), parameters)
    for got, want in zip(torch.autograd.grad(losses.total, parameters), wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-12)


def moved_to(sae: SAE, values: tuple[torch.Tensor, ...]) -> SAE:
    """`sae` with plain tensors for parameters, which gradcheck can move."""
    moved = SAE(sae.d_model, sae.n_latents, sae.k)
    for (name, _), value in zip(sae.named_parameters(), values, strict=True):
        delattr(moved, name)
        setattr(moved, name, value)
    return moved


def test_auxk_reaches_encoder_and_decoder_of_dead_latents_and_nothing_else() -> None:
    torch.manual_seed(1)
    x = torch.randn(30, 8)
    dead = DeadLatents(40)
    dead.tokens_since[:20] = 10_000
    grads = {}
    for k_aux in (0, 8):
        sae = random_sae(8, 40, 2, seed=5)
        # Dead latents that never win a place among the k largest.
        with torch.no_grad():
            sae.b_enc[:20] -= 0.5
        counted = copy.deepcopy(dead)
        result = take_step(sae, x, torch.zeros(8), Objective(2, 1.0, k_aux, auxk_coefficient=1.0), counted, 5_000)
        grads[k_aux] = dense(result.gradient, sae)
        alive = ~counted.after(5_000)
    assert (~alive).sum() >= 10
    for name in ("W_enc", "b_enc", "W_dec"):
        change = (grads[8][name] - grads[0][name]).abs()
        assert change[~alive].max() > 1e-5, f"AuxK gives {name} of dead latents no gradient"
        assert change[alive].max() < 1e-7, f"AuxK moves {name} of live latents"
    assert (grads[8]["b_pre"] - grads[0]["b_pre"]).abs().max() > 1e-6


def test_no_dead_latents_gives_no_auxk_and_no_nan() -> None:
    sae = random_sae(8, 16, 2, seed=0)
    result = take_step(sae, torch.randn(5, 8), torch.zeros(8), Objective(2, 1.0, k_aux=4), DeadLatents(16), 1000)
    assert result.auxk == 0.0
    assert all(torch.isfinite(gradient).all() for gradient in dense(result.gradient, sae).values())


def test_bf16_selection_keeps_the_loss() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 48)
    sae = random_sae(48, 300, 12, seed=1)
    objective = Objective(12, 1.0)
    exact = take_step(sae, x, torch.zeros(48), objective, DeadLatents(300), precision="fp32")
    rough = take_step(sae, x, torch.zeros(48), objective, DeadLatents(300), precision="bf16")
    assert rough.main == pytest.approx(exact.main, rel=5e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_one_bad_encoder_weight_is_noticed(precision: Precision, value: float) -> None:
    sae = random_sae(8, 16, 2, seed=0)
    with torch.no_grad():
        sae.W_enc[3, 5] = value
    x, origin = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), sae.b_pre.detach().clone()
    operand = sae.W_enc.data.bfloat16() if precision == "bf16" else sae.W_enc.data
    assert not np.isfinite(reconstruct(sae, operand, Batch.of(x, origin, precision == "bf16")).squared)
    assert not np.isfinite(take_step(sae, x, origin, Objective(2, 1.0), DeadLatents(16), precision=precision).main)


def test_the_forward_pass_equals_the_dense_one() -> None:
    torch.manual_seed(0)
    sae, x, origin = random_sae(16, 50, 5, seed=2), torch.randn(20, 16), torch.randn(16)
    got = reconstruct(sae, sae.W_enc.data, Batch.of(x, origin, bf16=False))
    forward = sae(x)
    wanted = (x - forward.reconstruction).detach()
    assert torch.allclose(got.error, wanted, atol=1e-5)
    assert got.squared == pytest.approx(float(wanted.square().sum()), rel=1e-5)
    assert got.active == int((forward.latents > 0).sum())


def test_dead_latents_are_counted_in_tokens() -> None:
    dead = DeadLatents(3)
    for fired in ([0, 2], [0, 0], [-1, 1]):
        # 100 tokens, the first of which has these latents; an activation of 1e-3 is too small to count.
        z = torch.full((100, 2), 1e-3)
        z[0] = torch.tensor([1.0 if index >= 0 and fired != [-1, 1] else 1e-3 for index in fired])
        indices = torch.tensor([fired] * 100, dtype=torch.int32)
        dead.update(Selected(indices, z))
    assert dead.tokens_since.tolist() == [100, 300, 200]
    assert dead.after(200).tolist() == [False, True, True]


def test_a_latent_that_fires_in_the_batch_is_not_dead_in_it() -> None:
    sae = random_sae(8, 16, 16, seed=4)  # k = N: every latent with a positive pre-activation fires
    dead = DeadLatents(16)
    dead.tokens_since[:] = 10**6
    take_step(sae, torch.randn(400, 8), torch.zeros(8), Objective(16, 1.0, k_aux=4), dead, 10**6)
    assert not dead.after(10**6).any()


@pytest.mark.parametrize("multi", [False, True])
def test_the_fused_optimiser_equals_the_plain_order_and_keeps_unit_rows(multi: bool) -> None:
    fused, plain = random_sae(20, 90, 4, seed=0), random_sae(20, 90, 4, seed=0)
    fast, slow = SAEAdam(fused, 3e-3, 0.9), SAEAdam(plain, 3e-3, 0.9)
    dead, other = DeadLatents(90), DeadLatents(90)
    for counters in (dead, other):
        counters.tokens_since[:40] = 10_000
    objective, origin = Objective(4, 1.0, k_aux=2, multi_topk=multi), torch.zeros(20)
    for i in range(10):
        x = torch.randn(30, 20, generator=torch.Generator().manual_seed(i))
        fast.step(take_step(fused, x, origin, objective, dead, 5_000).gradient)
        gradient = take_step(plain, x, origin, objective, other, 5_000).gradient
        slow.step_plain({name: grad.float() for name, grad in dense(gradient, plain).items()})
    for name, tensor in fast.tensors().items():
        assert torch.allclose(tensor, slow.tensors()[name], atol=2e-5, rtol=1e-4), name
    assert torch.allclose(fused.W_dec.norm(dim=1), torch.ones(90), atol=1e-6)
    for a, b in zip(fast.averaged().parameters(), slow.averaged().parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_the_rounded_encoder_follows_every_step_and_restore() -> None:
    sae = random_sae(20, 30, 4, seed=0)
    optimiser = SAEAdam(sae, 1e-2, 0.9, "bf16")
    before = optimiser.operand.clone()
    x = torch.randn(40, 20)
    for _ in range(3):
        optimiser.step(
            take_step(sae, x, torch.zeros(20), Objective(4, 1.0), DeadLatents(30), precision="bf16").gradient
        )
        assert torch.equal(optimiser.operand, sae.W_enc.data.bfloat16())
    assert not torch.equal(optimiser.operand, before)
    other = SAEAdam(random_sae(20, 30, 4, seed=1), 1e-2, 0.9, "bf16")
    other.restore({name: tensor.numpy() for name, tensor in optimiser.tensors().items()}, optimiser.steps)
    assert torch.equal(other.operand, optimiser.operand)


def random_gradients(sae: SAE) -> dict[str, torch.Tensor]:
    return {name: torch.randn(parameter.shape) for name, parameter in sae.named_parameters()}


def test_plain_optimiser_is_torch_adam_with_the_paper_constants_and_a_projected_decoder() -> None:
    torch.manual_seed(0)
    sae = random_sae(6, 9, 2, seed=0)
    twin = copy.deepcopy(sae)
    ours = SAEAdam(sae, 1e-2, 0.9)
    adam = torch.optim.Adam(twin.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=EPS)
    for _ in range(5):
        gradients = random_gradients(sae)
        for name, parameter in twin.named_parameters():
            parameter.grad = gradients[name].clone()
        assert twin.W_dec.grad is not None
        twin.W_dec.grad -= (twin.W_dec.grad * twin.W_dec).sum(1, keepdim=True) * twin.W_dec.detach()
        adam.step()
        with torch.no_grad():
            twin.W_dec /= twin.W_dec.norm(dim=1, keepdim=True)
        ours.step_plain(gradients)
    for a, b in zip(sae.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_average_is_bias_corrected() -> None:
    sae = random_sae(4, 6, 2, seed=0)
    optimiser = SAEAdam(sae, 1e-9, 0.99)
    optimiser.step(take_step(sae, torch.randn(10, 4), torch.zeros(4), Objective(2, 1.0), DeadLatents(6)).gradient)
    for average, parameter in zip(optimiser.averaged().parameters(), sae.parameters(), strict=True):
        assert torch.allclose(average, parameter, rtol=1e-4, atol=1e-6)


def test_averaged_weights_are_the_mean_of_those_in_use_and_their_decoder_rows_are_shorter() -> None:
    torch.manual_seed(0)
    sae = random_sae(8, 12, 3, seed=0)
    optimiser = SAEAdam(sae, 1e-2, 0.9)
    history = []
    for _ in range(20):
        optimiser.step_plain(random_gradients(sae))
        history.append(copy.deepcopy(sae))
    weight = 0.9 ** torch.arange(19, -1, -1.0)
    averaged = optimiser.averaged()
    for name, got in averaged.named_parameters():
        wanted = sum(w * past.get_parameter(name).detach() for w, past in zip(weight, history, strict=True)) / sum(
            weight
        )
        assert torch.allclose(got, wanted, atol=1e-5), name
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(12), atol=1e-6)
    norms = averaged.W_dec.detach().norm(dim=1)
    assert bool(((norms > 0.9) & (norms < 0.9999)).all())

    # Moving the norms from the decoder into z leaves the reconstruction as it is; dropping them does not.
    x = torch.randn(30, 8)
    forward = averaged(x)
    unit = averaged.W_dec / norms[:, None]
    assert torch.allclose((forward.latents * norms) @ unit + averaged.b_pre, forward.reconstruction, atol=1e-5)
    assert not torch.allclose(forward.latents @ unit + averaged.b_pre, forward.reconstruction, atol=1e-3)


def test_kernels_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    x, twins = torch.randn(200, 24), []
    before = numba.get_num_threads()
    try:
        for threads in (1, numba.config.NUMBA_NUM_THREADS):
            numba.set_num_threads(threads)
            sae = random_sae(24, 90, 7, seed=0)
            optimiser = SAEAdam(sae, 1e-3, 0.9)
            objective = Objective(7, 1.0, multi_topk=True)
            optimiser.step(take_step(sae, x, torch.zeros(24), objective, DeadLatents(90)).gradient)
            twins.append(optimiser.tensors())
    finally:
        numba.set_num_threads(before)
    for name, tensor in twins[0].items():
        assert torch.equal(tensor, twins[1][name]), name


def test_initialisation_is_tied_unit_and_at_the_right_norm() -> None:
    sae = SAE(64, 256, 16)
    sae.initialise(torch.zeros(64), seed=0)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(256), atol=1e-6)
    ratio = sae.W_enc / sae.W_dec
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-3)
    x = torch.nn.functional.normalize(torch.randn(2000, 64, generator=torch.Generator().manual_seed(9)), dim=1)
    assert float(sae(x).reconstruction.detach().norm(dim=1).mean()) == pytest.approx(1.0, abs=0.05)
