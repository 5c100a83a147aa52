"""What one batch gives one cell: losses and gradient in training, the error alone in evaluation.

    result = step(sae, operand, batch, objective, dead, dead_after_tokens)
    optimiser.step(result.gradient)

The objective is that of reference.py; the algebra is that of trainers/kernels/interface.py, on every device.
"""

from typing import NamedTuple

import torch
from saescale.trainers.architectures.reference import ACTIVE_ABOVE, MULTI_TOPK_FACTOR, MULTI_TOPK_WEIGHT, Objective
from saescale.trainers.architectures.topk import SAE
from saescale.trainers.kernels.choose import kernels
from saescale.trainers.kernels.interface import Pairs, Selected, Term
from torch import Tensor

FEW_DEAD = 8  # times k_aux: up to so many dead latents AuxK is computed dense
AUXK_ENTRIES = 2**22  # activations of dead latents that it then holds at a time: 16 MiB


class Batch(NamedTuple):
    """Preprocessed activations, shared by the cells of a pack."""

    x: Tensor  # float32 [batch, d_model], minus `origin`
    origin: Tensor  # [d_model], the geometric median that every b_pre starts from
    rounded: Tensor  # x in bfloat16, or x itself where no cell needs that

    @classmethod
    def of(cls, x: Tensor, origin: Tensor, bf16: bool) -> "Batch":
        """From preprocessed x [batch, d_model]; `bf16`: some cell has operands of that type."""
        centred = x - origin
        return cls(centred, origin, centred.bfloat16() if bf16 else centred)


class DeadRows(NamedTuple):
    """AuxK's gradient, of the dead latents alone."""

    latents: Tensor  # int64 [dead], ascending
    W_enc: Tensor  # [dead, d_model], the offset of its inputs taken off already
    b_enc: Tensor  # [dead]
    W_dec: Tensor  # [dead, d_model]


class Gradient(NamedTuple):
    """The gradient of a cell's loss, in factors: SAEAdam.step sums the rows where it uses them."""

    pairs: Pairs
    errors: Tensor  # [terms * batch, d_model]
    x: Tensor  # [batch, d_model], minus origin
    offset: Tensor  # [d_model], b_pre - origin
    aux: DeadRows
    b_pre: Tensor  # [d_model], without the part through the encoder, - W_enc^T (gradient of b_enc)


class Step(NamedTuple):
    """What one batch gave one cell: losses as in reference.Losses, and the gradient of their total."""

    main: float
    multi: float
    auxk: float
    gradient: Gradient


class Reconstruction(NamedTuple):
    """What the selected latents leave over, for evaluation."""

    error: Tensor  # x - x_hat, float32 [batch, d_model]
    squared: float  # ||error||^2 over the batch, summed in float64
    active: int  # latents with z > 0, over all tokens


class DeadLatents:
    """For each latent the number of tokens since it was last active (activation > 1e-3)."""

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self.tokens_since = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def update(self, selected: Selected) -> None:
        """Counts a batch."""
        n_latents = len(self.tokens_since)
        # Without indexing by a mask, which would make the host wait for the device.
        active = torch.where(selected.z > ACTIVE_ABOVE, selected.indices, n_latents).flatten().long()
        fired = torch.zeros(n_latents + 1, dtype=torch.bool, device=active.device).index_fill_(0, active, True)[:-1]
        self.tokens_since.add_(len(selected.z)).masked_fill_(fired, 0)

    def after(self, window: int) -> Tensor:
        """[n_latents] bool: not active for at least `window` tokens."""
        return self.tokens_since >= window


@torch.no_grad()
def step(
    sae: SAE, operand: Tensor, batch: Batch, objective: Objective, dead: DeadLatents, dead_after_tokens: int
) -> Step:
    """Losses and gradient of a batch, which is counted in `dead`.

    operand: W_enc, in float32 or rounded to bfloat16, which decides the precision of the encoder product
    (SAEAdam.operand).
    """
    sparse = kernels(batch.x.device)
    offset = sae.b_pre - batch.origin
    elements, d_model = batch.x.numel(), batch.x.shape[1]
    ks, weights = [objective.k], [1.0]
    if objective.multi_topk:
        ks.append(min(MULTI_TOPK_FACTOR * objective.k, sae.n_latents))
        weights.append(MULTI_TOPK_WEIGHT)
    selections = _select(sae, operand, batch, offset, ks)

    # One more for AuxK, where it may need one.
    errors = batch.x.new_empty(len(ks) + bool(objective.k_aux), len(batch.x), d_model)
    b_pre = torch.zeros_like(offset)
    terms, losses = [], []
    for selected, weight, error in zip(selections, weights, errors, strict=False):
        # The gradient by x_hat of the mean over batch and d_model of the squared error over c.
        scale = -2.0 * weight / (elements * objective.variance)
        decoded = sparse.decode(batch.x, offset, selected, sae.W_dec, scale, error)
        terms.append(Term(selected, decoded.dz, scale))
        losses.append(float(decoded.squared) / elements / objective.variance)
        b_pre.add_(error.sum(dim=0), alpha=scale)

    # Has to go before AuxK: a latent that came back to life in this batch is no longer dead.
    dead.update(selections[0])
    auxk = _auxk(
        sae, operand, batch, offset, errors[0], dead.after(dead_after_tokens), objective, errors[-1]
    )  # fmt: skip
    if auxk.term is not None:
        terms.append(auxk.term)
    pairs = sparse.transpose(terms, sae.n_latents)
    gradient = Gradient(pairs, errors.view(-1, d_model), batch.x, offset, auxk.rows, b_pre)
    return Step(losses[0], losses[1] if objective.multi_topk else 0.0, auxk.loss, gradient)


@torch.no_grad()
def reconstruct(sae: SAE, operand: Tensor, batch: Batch) -> Reconstruction:
    """The forward pass alone; `operand` as in `step`."""
    offset = sae.b_pre - batch.origin
    selected = _select(sae, operand, batch, offset, [sae.k])[0]
    error = torch.empty_like(batch.x)
    decoded = kernels(batch.x.device).decode(batch.x, offset, selected, sae.W_dec, None, error)
    return Reconstruction(error, float(decoded.squared), int((selected.z > 0).sum()))


def _select(sae: SAE, operand: Tensor, batch: Batch, offset: Tensor, ks: list[int]) -> list[Selected]:
    bias = sae.b_enc - sae.W_enc @ offset
    x = batch.rounded if operand.dtype == torch.bfloat16 else batch.x
    selections = kernels(x.device).encode_select(x, operand, bias, ks)
    # One bad weight shows in `bias`. The NaN that x86 makes is negative and would never be selected: a diverged
    # encoder would look like one without active latents.
    bad = ~bias.isfinite().all()
    return [Selected(indices, z.masked_fill_(bad, torch.nan)) for indices, z in selections]


class _AuxK(NamedTuple):
    """The AuxK loss (reference.auxk_loss) and its gradient, in one of two forms: rows, or a term like the others."""

    loss: float
    rows: DeadRows
    term: Term | None


def _auxk(
    sae: SAE,
    operand: Tensor,
    batch: Batch,
    offset: Tensor,
    error: Tensor,
    dead: Tensor,
    objective: Objective,
    miss: Tensor,
) -> _AuxK:
    """`error` is x - x_hat of the main loss, `dead` [n_latents] bool; the term's errors are written to `miss`.

    While few latents are dead, products with their rows gathered into one matrix are the fastest way, and their
    gradients small. Where many are, k_aux of them are few, and AuxK goes the way of the other losses.
    """
    latents = dead.nonzero().squeeze(1) if objective.k_aux else dead.new_empty(0, dtype=torch.int64)
    k_aux = min(objective.k_aux, len(latents))
    none = DeadRows(latents[:0], error[:0], error.new_empty(0), error[:0])
    if k_aux == 0:
        return _AuxK(0.0, none, None)
    denominator = float((error.mean(dim=0) - error).square().mean())
    if not denominator > 0:
        return _AuxK(0.0, none, None)
    bias = sae.b_enc[latents] - sae.W_enc[latents] @ offset
    # The gradient by e_hat of the mean squared error over that of the mean error, e being x - x_hat.
    scale = -2 * objective.auxk_coefficient / (error.numel() * denominator)
    if len(latents) <= FEW_DEAD * k_aux:
        squared, rows = _dead_rows(sae, batch.x, offset, error, latents, bias, k_aux, scale)
        return _AuxK(squared / error.numel() / denominator, rows, None)

    sparse = kernels(error.device)
    x = batch.rounded if operand.dtype == torch.bfloat16 else batch.x
    among = sparse.encode_select(x, operand[latents], bias, [k_aux])[0]
    names = latents.int()[among.indices.clamp_min(0).long()].masked_fill_(among.indices < 0, -1)
    selected = Selected(names, among.z)
    # No b_pre here: the error has it taken off already.
    decoded = sparse.decode(error, torch.zeros_like(offset), selected, sae.W_dec, scale, miss)
    loss = float(decoded.squared) / error.numel() / denominator
    return _AuxK(loss, none, Term(selected, decoded.dz, scale))


def _dead_rows(
    sae: SAE, x: Tensor, offset: Tensor, error: Tensor, latents: Tensor, bias: Tensor, k_aux: int, scale: float
) -> tuple[float, DeadRows]:
    """||e - e_hat||^2 and the gradients of AuxK, dense over the dead `latents` alone; `bias` is theirs."""
    W_enc, W_dec = sae.W_enc[latents], sae.W_dec[latents]
    rows = DeadRows(latents, torch.zeros_like(W_enc), torch.zeros_like(bias), torch.zeros_like(W_dec))
    squared = 0.0
    size = max(1, AUXK_ENTRIES // len(latents))
    for part, target in zip(x.split(size), error.split(size), strict=True):
        z = torch.addmm(bias, part, W_enc.T).relu_()
        if k_aux < len(latents):
            best = z.topk(k_aux, dim=1)
            z = torch.zeros_like(z).scatter_(1, best.indices, best.values)
        miss = torch.addmm(target, z, W_dec, alpha=-1)
        squared += float(torch.linalg.vector_norm(miss, dtype=torch.float64)) ** 2
        dz = (miss @ W_dec.T).mul_(z > 0)
        rows.W_dec.addmm_(z.T, miss, alpha=scale)
        rows.W_enc.addmm_(dz.T, part, alpha=scale)
        rows.b_enc.add_(dz.sum(dim=0), alpha=scale)
    rows.W_enc.addr_(rows.b_enc, offset, alpha=-1)
    return squared, rows
