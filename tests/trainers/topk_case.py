"""TopK SAEs for tests, and one step of them by the sparse path and by the dense reference."""

import torch

from saescale.trainers.architectures import topk
from saescale.trainers.architectures.architecture import Batch, Conditions, Losses, Shape, State, Step
from saescale.trainers.architectures.dead import DeadLatents
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.architectures.topk_sparse import Gradient
from saescale.trainers.mesh.mesh import ALONE
from saescale.trainers.precision import Precision
from saescale.trainers.preprocess import Centre
from saescale.trainers.training.optimiser import Adam

Tensors = dict[str, torch.Tensor]


def new_sae(d_model: int, n_latents: int, k: int, b_pre: torch.Tensor | None = None, seed: int = 0,
            precision: Precision = "fp32", **settings: object) -> SAE:  # fmt: skip
    """As training starts it."""
    shape, chosen = Shape(d_model, n_latents), topk.Settings.model_validate({"k": k} | settings)
    centre = Centre(torch.zeros(d_model) if b_pre is None else b_pre, 1.0)
    params = {name: made.data for name, made in topk.parameters(shape, chosen, centre, seed).items()}
    return SAE("topk", shape, chosen, params, precision)


def random_sae(d_model: int, n_latents: int, k: int, seed: int, precision: Precision = "fp32",
               **settings: object) -> SAE:  # fmt: skip
    """An SAE away from its initialisation: untied, with biases."""
    generator = torch.Generator().manual_seed(seed)
    sae = new_sae(d_model, n_latents, k, torch.randn(d_model, generator=generator) * 0.1, seed, precision, **settings)
    sae.params["W_enc"] += 0.1 * torch.randn(sae.params["W_enc"].shape, generator=generator)
    sae.params["b_enc"] += 0.1 * torch.randn(sae.params["b_enc"].shape, generator=generator)
    sae.round()
    return sae


def in_float64(sae: SAE) -> SAE:
    return sae.like({name: tensor.double() for name, tensor in sae.params.items()})


def adam_of(sae: SAE, lr: float, ema: float) -> Adam:
    centre = Centre(torch.zeros(sae.shape.d_model), 1.0)
    return Adam(sae.params, topk.parameters(sae.shape, sae.settings, centre, 0), lr, ema)


def take_step(sae: SAE, x: torch.Tensor, origin: torch.Tensor, dead: DeadLatents, window: int = 10**9,
              variance: float = 1.0) -> Step:  # fmt: skip
    """By the sparse path."""
    batch = Batch.of(x, origin, sae.precision == "bf16")
    return sae.step.measure(sae.params, sae.operands, batch, sae.settings, Conditions(variance, window), dead, ALONE)


def update(sae: SAE, adam: Adam, step: Step) -> None:
    sae.step.update(sae.params, sae.operands, step.gradient, adam.next(), ALONE)


def reference_step(sae: SAE, x: torch.Tensor, dead: torch.Tensor, variance: float = 1.0) -> tuple[Losses, Tensors]:
    """Losses and gradients of the dense reference in float64."""
    exact = {name: tensor.detach().double().clone().requires_grad_() for name, tensor in sae.params.items()}
    forward = topk.forward(exact, x.double(), sae.settings)
    losses = topk.losses(exact, forward, x.double(), sae.settings, State(variance, dead))
    gradients = torch.autograd.grad(losses.total, list(exact.values()), materialize_grads=True)
    return losses, dict(zip(exact, gradients, strict=True))


def dense(gradient: Gradient, sae: SAE) -> Tensors:
    """A gradient's factors multiplied out, pair by pair, in float64."""
    pairs, aux = gradient.pairs, gradient.aux
    grads = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in sae.params.items()}
    for n in range(sae.shape.n_latents):
        for p in range(int(pairs.starts[n]), int(pairs.starts[n + 1])):
            row, encoder = int(pairs.rows[p]), float(pairs.encoder[p])
            grads["W_dec"][n] += float(pairs.decoder[p]) * gradient.errors[row].double()
            grads["W_enc"][n] += encoder * (gradient.x[row % len(gradient.x)] - gradient.offset).double()
            grads["b_enc"][n] += encoder
    for name in ("W_dec", "W_enc", "b_enc"):
        grads[name][aux.latents] += getattr(aux, name).double()
    grads["b_pre"] += gradient.b_pre.double() - grads["b_enc"] @ sae.params["W_enc"].double()
    return grads
