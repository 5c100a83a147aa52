"""Losses and gradients of a TopK SAE that touch only the selected latents.

The encoder product is the one dense operation; selection, decoding and all gradients work on k of N latents per token.
On the CPU this runs on the kernels of trainers/sparse_cpu.py. On other devices the dense reference stands in
(trainers/reference.py, autograd), which computes the same.

Inputs are centred once per batch for all cells of a pack: with x' = x - origin and b = b_pre - origin,
W_enc (x - b_pre) + b_enc = W_enc x' + (b_enc - W_enc b), and x - x_hat = x' - b - z W_dec.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainers import reference, sparse_cpu
from trainers.cell import Precision
from trainers.reference import ACTIVE_ABOVE, MULTI_TOPK_FACTOR, MULTI_TOPK_WEIGHT, Objective
from trainers.sae import SAE


class Batch(NamedTuple):
    """Preprocessed activations, shared by the cells of a pack."""

    x: Tensor  # float32 [batch, d_model], minus `origin`
    origin: Tensor  # [d_model], the geometric median that every b_pre starts from


class Step(NamedTuple):
    """What one batch gave one cell; its gradients stand in the SAE's `.grad`."""

    main: float
    multi: float
    auxk: float


class Selected(NamedTuple):
    """The k largest positive pre-activations of each token."""

    indices: np.ndarray  # int32 [batch, k], -1 where fewer than k are positive
    z: np.ndarray  # float32 [batch, k]


class Reconstruction(NamedTuple):
    """What the selected latents leave over, for evaluation."""

    error: Tensor  # x - x_hat, float32 [batch, d_model]
    squared: float  # ||error||^2 over the batch, summed in float64
    active: int  # latents with z > 0, over all tokens


class DeadLatents:
    """For each latent the number of tokens since it was last active (activation > 1e-3)."""

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self.tokens_since = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def update(self, fired: Tensor, tokens: int) -> None:
        """Counts a batch of `tokens`; `fired` [n_latents] bool."""
        self.tokens_since += tokens
        self.tokens_since[fired] = 0

    def after(self, window: int) -> Tensor:
        """[n_latents] bool: not active for at least `window` tokens."""
        return self.tokens_since >= window


@torch.no_grad()
def step(
    sae: SAE,
    batch: Batch,
    objective: Objective,
    dead: DeadLatents,
    dead_after_tokens: int,
    precision: Precision = "fp32",
) -> Step:
    """Sets the gradients of the cell's loss (reference.losses) on `sae` and counts the batch in `dead`."""
    if batch.x.device.type != "cpu":
        return dense_step(sae, batch, objective, dead, dead_after_tokens, precision)

    x = batch.x.numpy()
    offset = sae.b_pre - batch.origin
    pre, bias = _encode(sae, batch.x, offset, precision)
    # d loss / d x_hat is `scale` times (x - x_hat), for the mean over batch and d_model of the squared error over c.
    scale = -2.0 / (x.size * objective.variance)

    gradients = _Gradients(sae)
    selected = _select(sae, x, pre, bias, objective.k)
    decoded = _decode(sae, x, selected, offset, scale)
    gradients.take(selected, decoded, x, offset, scale, fresh=True)
    main = decoded.squared / x.size / objective.variance

    multi = 0.0
    if objective.multi_topk:
        k = min(MULTI_TOPK_FACTOR * objective.k, sae.n_latents)
        wider = _select(sae, x, pre, bias, k)
        wide = _decode(sae, x, wider, offset, scale * MULTI_TOPK_WEIGHT)
        gradients.take(wider, wide, x, offset, scale * MULTI_TOPK_WEIGHT, fresh=False)
        multi = wide.squared / x.size / objective.variance

    # Has to go before AuxK: a latent that came back to life in this batch is no longer dead.
    fired = torch.zeros(sae.n_latents, dtype=torch.bool)
    fired[torch.from_numpy(selected.indices[selected.z > ACTIVE_ABOVE].astype(np.int64))] = True
    dead.update(fired, len(x))
    error, idle = torch.from_numpy(decoded.error), dead.after(dead_after_tokens)
    auxk = _auxk(sae, batch.x, offset, pre, error, idle, objective, gradients)

    # Needs the finished gradient of b_enc: pre-activations see x - b_pre.
    torch.from_numpy(gradients.b_pre).sub_(torch.from_numpy(gradients.b_enc) @ sae.W_enc)
    return Step(main, multi, auxk)


@torch.no_grad()
def reconstruct(sae: SAE, batch: Batch, precision: Precision = "fp32") -> Reconstruction:
    """The forward pass alone."""
    if batch.x.device.type != "cpu":
        x = batch.x + batch.origin
        forward = sae.decode(_dense_encode(sae, x, precision))
        error = x - forward.reconstruction
        return Reconstruction(error, float(error.double().square().sum()), int((forward.latents > 0).sum()))
    offset = sae.b_pre - batch.origin
    pre, bias = _encode(sae, batch.x, offset, precision)
    selected = _select(sae, batch.x.numpy(), pre, bias, sae.k)
    decoded = _decode(sae, batch.x.numpy(), selected, offset)
    return Reconstruction(torch.from_numpy(decoded.error), decoded.squared, int((selected.z > 0).sum()))


def _encode(sae: SAE, x: Tensor, offset: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Pre-activations [batch, n_latents] in `precision`, and the bias [n_latents] that centred inputs need."""
    bias = sae.b_enc - sae.W_enc @ offset
    operands = (x, sae.W_enc, bias)
    pre = F.linear(*((t.bfloat16() for t in operands) if precision == "bf16" else operands))
    if not bool(bias.isfinite().all()):
        # One bad weight shows in `bias`. The NaN that x86 makes is negative and would never be selected: a diverged
        # encoder would look like one without active latents.
        bias.fill_(torch.nan)
        pre.fill_(torch.nan)
    return pre, bias


def _select(sae: SAE, x: np.ndarray, pre: Tensor, bias: Tensor, k: int) -> Selected:
    bits = pre.view(torch.int16 if pre.dtype == torch.bfloat16 else torch.int32).numpy()
    indices, values = np.empty((len(x), k), np.int32), np.empty((len(x), k), bits.dtype)
    # Few enough entries per group, and enough groups for the bound to be tight.
    sparse_cpu.select(bits, k, max(1, min(32, sae.n_latents // (8 * k))), indices, values)
    if pre.dtype == torch.float32:
        return Selected(indices, values.view(np.float32))
    # bf16 pre-activations choose the latents; their activations are then computed in float32.
    z = np.empty((len(x), k), np.float32)
    sparse_cpu.activations(x, _array(sae.W_enc), bias.numpy(), indices, z)
    return Selected(indices, z)


class _Decoded(NamedTuple):
    error: np.ndarray  # x - x_hat, float32 [batch, d_model]
    squared: float  # ||error||^2 over the batch, summed in float64
    dz: np.ndarray  # float32 [batch, k]: the loss's gradient by z; [batch, 0] where none was asked for


def _decode(sae: SAE, x: np.ndarray, selected: Selected, offset: Tensor, scale: float | None = None) -> _Decoded:
    """`scale` times (x - x_hat) is d loss / d x_hat; without it there are no gradients."""
    error, squared = np.empty_like(x), np.empty(len(x))
    dz = np.empty((len(x), 0 if scale is None else selected.z.shape[1]), np.float32)
    sparse_cpu.decode(
        x, selected.indices, selected.z, _array(sae.W_dec), offset.numpy(), error, squared, scale or 0.0, dz
    )  # fmt: skip
    return _Decoded(error, float(squared.sum()), dz)


class _Gradients:
    """The SAE's gradients as arrays that the kernels write to."""

    def __init__(self, sae: SAE) -> None:
        for parameter in sae.parameters():
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        self.W_enc, self.b_enc = _gradient(sae.W_enc), _gradient(sae.b_enc)
        self.W_dec, self.b_pre = _gradient(sae.W_dec), _gradient(sae.b_pre)

    def take(
        self, selected: Selected, decoded: _Decoded, x: np.ndarray, offset: Tensor, scale: float, fresh: bool
    ) -> None:
        """The gradients of one reconstruction term: in place of what was there when `fresh`, else added to it.

        b_pre still lacks its part through the encoder.
        """
        pairs = sparse_cpu.transpose(selected.indices, selected.z, decoded.dz, scale, len(self.b_enc))
        sparse_cpu.weight_gradients(
            pairs, decoded.error, x, offset.numpy(), fresh, self.W_dec, self.W_enc, self.b_enc
        )  # fmt: skip
        by_b_pre = np.float32(scale) * decoded.error.sum(axis=0, dtype=np.float32)
        self.b_pre[:] = by_b_pre if fresh else self.b_pre + by_b_pre


def _auxk(
    sae: SAE,
    x: Tensor,
    offset: Tensor,
    pre: Tensor,
    error: Tensor,
    dead: Tensor,
    objective: Objective,
    gradients: _Gradients,
) -> float:
    """The AuxK loss, its gradients added: dense, but over the dead latents alone.

    k_aux is hundreds per token and the dead latents are a small part of N, so products with their rows gathered
    into one matrix are faster than sparse ones.
    """
    rows = dead.nonzero().squeeze(1)
    k_aux = min(objective.k_aux, len(rows))
    if k_aux == 0:
        return 0.0
    W_dec = sae.W_dec[rows]
    latents = pre[:, rows].float().relu()
    if k_aux < len(rows):
        best = latents.topk(k_aux, dim=1)
        latents = torch.zeros_like(latents).scatter_(1, best.indices, best.values)
    miss = latents @ W_dec - error
    denominator = float((error.mean(dim=0) - error).square().mean())
    if not denominator > 0:
        return 0.0
    grad = miss * (2 * objective.auxk_coefficient / (miss.numel() * denominator))
    grad_latents = (grad @ W_dec.T) * (latents > 0)
    torch.from_numpy(gradients.W_dec).index_add_(0, rows, latents.T @ grad)
    by_b_enc = grad_latents.sum(dim=0)
    torch.from_numpy(gradients.W_enc).index_add_(0, rows, (grad_latents.T @ x).addr_(by_b_enc, offset, alpha=-1))
    torch.from_numpy(gradients.b_enc).index_add_(0, rows, by_b_enc)
    return float(miss.square().mean()) / denominator


@torch.no_grad()
def dense_step(
    sae: SAE,
    batch: Batch,
    objective: Objective,
    dead: DeadLatents,
    dead_after_tokens: int,
    precision: Precision = "fp32",
) -> Step:
    """The same by the dense reference and autograd, on any device."""
    x = batch.x + batch.origin
    for parameter in sae.parameters():
        parameter.grad = None
    with torch.enable_grad():
        forward = sae.decode(_dense_encode(sae, x, precision), objective.k)
        # Has to stand between the forward pass and AuxK: a latent that came back to life is no longer dead.
        dead.update(reference.fired(forward.latents.detach()), len(x))
        losses = reference.losses(sae, x, forward, dead.after(dead_after_tokens), objective)
        losses.total.backward()
    return Step(float(losses.main), float(losses.multi), float(losses.auxk))


def _dense_encode(sae: SAE, x: Tensor, precision: Precision) -> Tensor:
    """Pre-activations [batch, n_latents] in float32, from bf16 operands in bf16 `precision`."""
    if precision == "fp32":
        return sae.encode(x)
    product: Tensor = _Bf16Product.apply(x - sae.b_pre, sae.W_enc)
    return product + sae.b_enc


class _Bf16Product(torch.autograd.Function):
    """x [batch, d_model] @ W_enc.T with both rounded to bf16; the gradients are products of float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        return (x.bfloat16() @ W_enc.bfloat16().T).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, W_enc = ctx.saved_tensors
        return gradient @ W_enc, gradient.T @ x


def _array(parameter: Tensor) -> np.ndarray:
    return parameter.detach().numpy()


def _gradient(parameter: Tensor) -> np.ndarray:
    assert parameter.grad is not None
    return parameter.grad.numpy()
