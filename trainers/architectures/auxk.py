"""AuxK on the sparse path: what the dead latents make of the error of the main loss (topk.auxk_loss), and its gradient.

    kept = to_keep(...)    # before the main losses: what of their product will serve
    found = by_pairs(...)  # behind them: loss and gradient; or by_rows_or_term, or on_mesh

topk_sparse.py says which way is taken where.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import Batch, Conditions, Count, Dead, Params, Shape
from saescale.trainers.architectures.sparse_parts import active_pairs, decode_term, encoder_input, rows_of
from saescale.trainers.kernels import choose
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.kernels.interface import Kept, Kernels, Selected, Term
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.precision import Precision

KEPT_ENTRIES = 2**24  # of the encoder's product that are kept for AuxK on a CPU; of more it makes its own product
FEW_DEAD = 8  # times k_aux: elsewhere, up to so many dead latents AuxK is computed dense
AUXK_ENTRIES = 2**22  # activations of dead latents that it then holds at a time: 16 MiB
_FLOAT = 4


class Settings(Protocol):
    """What AuxK needs of topk.Settings."""

    @property
    def k_aux(self) -> int: ...

    @property
    def auxk_coefficient(self) -> float: ...


class DeadRows(NamedTuple):
    """AuxK's gradient, of the dead latents alone."""

    latents: Tensor  # int64 [dead], ascending
    W_enc: Tensor  # [dead, d_model], the offset of its inputs taken off already
    b_enc: Tensor  # [dead]
    W_dec: Tensor  # [dead, d_model]


class Case(NamedTuple):
    """What AuxK is of in one step: `error` [batch, d_model] is x - x_hat of the main loss, `scatter` the mean square of
    it minus its mean over the batch, `latents` the dead ones, int64 [dead], ascending; `offset` is b_pre - origin."""

    params: Params
    operands: Params
    batch: Batch
    offset: Tensor
    error: Tensor
    latents: Tensor
    scatter: float
    settings: Settings

    def bias(self) -> Tensor:
        """[dead]: that of the dead latents, as kernels take it."""
        return self.params["b_enc"][self.latents] - self.params["W_enc"][self.latents] @ self.offset

    def scale(self) -> float:
        """Times e - e_hat it is the gradient by e_hat of the mean squared error over that of the mean error, e being
        x - x_hat."""
        return -2 * self.settings.auxk_coefficient / (self.error.numel() * self.scatter)

    def loss(self, squared: Tensor) -> Tensor:
        """From ||e - e_hat||^2."""
        return squared / self.error.numel() / self.scatter


class AuxK(NamedTuple):
    """The AuxK loss (topk.auxk_loss) and its gradient, in one of two forms: rows, or a term like the others."""

    loss: float | Tensor
    rows: DeadRows
    term: Term | None
    pairs: Count = 0  # that were decoded
    dead: int = 0  # latents that were scored


def no_rows(error: Tensor) -> DeadRows:
    return DeadRows(error.new_empty(0, dtype=torch.int64), error[:0], error.new_empty(0), error[:0])


def to_keep(
    sparse: Kernels, operands: Params, batch: Batch, dead: Dead, conditions: Conditions, tokens: int
) -> Kept | None:
    """What AuxK may need of the main losses' product: columns of latents that are dead unless this batch revives them.

    `tokens`: those of all replicas' batches. None where there are none or too many, or on other devices, where their
    names would have to be waited for.
    """
    if choose.dead_kernels(sparse, batch.x.device) is None:
        return None
    latents = dead.after(conditions.dead_after_tokens - tokens).nonzero().flatten()
    x, _ = encoder_input(operands, batch)
    few = 0 < len(latents) <= KEPT_ENTRIES // len(x)
    return Kept(latents, x.new_empty(len(x), len(latents))) if few else None


def among_dead(case: Case, batch: Batch, k_aux: int, kept: Kept | None) -> tuple[Tensor, Selected]:
    """Some latents, the dead ones among them, and of these the k_aux largest of each row of `batch`, the case's or a
    part of it, as indices of the former."""
    beside = choose.dead_kernels(choose.kernels(batch.x.device), batch.x.device)
    assert beside is not None
    k, bias = min(k_aux, len(case.latents)), case.bias()
    if kept is None:
        x, W_enc = encoder_input(case.operands, batch)
        return case.latents, beside.encode_select(x, W_enc[case.latents], bias, [k], None)[0]
    # Those that the batch revived are never selected.
    biases = torch.full((len(case.params["b_enc"]),), -torch.inf).index_copy_(0, case.latents, bias)
    return kept.latents, beside.select(kept.pre, biases[kept.latents], k)


def by_pairs(case: Case, latents: Tensor, selected: Selected) -> AuxK:
    """As `by_rows_or_term`, by the pairs that were `selected` among `latents`."""
    error = case.error
    beside = choose.dead_kernels(choose.kernels(error.device), error.device)
    assert beside is not None
    squared, pairs, W_enc, b_enc, W_dec = beside.dead_rows(
        case.batch.x, error, selected, case.params["W_dec"], latents, -case.scale()
    )  # fmt: skip
    W_enc.addr_(b_enc, case.offset, alpha=-1)
    return AuxK(case.loss(squared), DeadRows(latents, W_enc, b_enc, W_dec), None, pairs)


def by_rows_or_term(case: Case, miss: Tensor) -> AuxK:
    """The term's errors are written to `miss`, where it is one.

    While few latents are dead, products with their rows gathered into one matrix are the fastest way, and their
    gradients small. Where many are, k_aux of them are few, and AuxK goes the way of the other losses.
    """
    latents, error = case.latents, case.error
    k_aux = min(case.settings.k_aux, len(latents))
    if len(latents) <= FEW_DEAD * k_aux:
        squared, pairs, rows = _dense_rows(case, k_aux)
        return AuxK(case.loss(squared), rows, None, pairs, len(latents))
    sparse = choose.kernels(error.device)
    x, W_enc = encoder_input(case.operands, case.batch)
    selected = _renamed(sparse.encode_select(x, W_enc[latents], case.bias(), [k_aux])[0], latents)
    # No b_pre here: the error has it taken off already.
    none, scale = torch.zeros_like(case.offset), case.scale()
    decoded = sparse.decode(error, none, selected, case.params["W_dec"], scale, miss)
    term = Term(selected, decoded.dz, scale)
    return AuxK(case.loss(decoded.squared), no_rows(error), term, active_pairs(selected), len(latents))


def on_mesh(case: Case, miss: Tensor, mesh: Mesh, k_aux: int, kept: Kept | None) -> AuxK:
    """As `by_rows_or_term`, where the case's latents are this shard's dead ones (maybe none) and `k_aux` is at most as
    many as all have.

    It goes the way of the other losses: this replica's rows, of each the largest of all shards, one sum over them.
    """
    latents, error = case.latents, case.error
    mine, sparse = rows_of(case.batch, mesh), choose.kernels(error.device)
    none = torch.full((len(mine.x), 0), -1, dtype=torch.int32, device=error.device)
    selected = Selected(none, mine.x.new_empty(none.shape))
    if len(latents) and choose.dead_kernels(sparse, error.device) is not None:
        among, found = among_dead(case, mine, k_aux, kept)
        selected = _renamed(found, among)
    elif len(latents):
        x, W_enc = encoder_input(case.operands, mine)
        k = min(k_aux, len(latents))
        selected = _renamed(sparse.encode_select(x, W_enc[latents], case.bias(), [k])[0], latents)
    selected = mesh.select(selected, k_aux)
    if not selected.z.shape[1]:  # kernels want a pair to work on
        pad = torch.nn.functional.pad
        selected = Selected(pad(selected.indices, (0, 1), value=-1), pad(selected.z, (0, 1)))
    own = mesh.rows(len(case.batch.x))
    # No b_pre here: the error has it taken off already.
    term, squared = decode_term(
        error[own], torch.zeros_like(case.offset), selected, case.params["W_dec"], case.scale(), miss, mesh
    )  # fmt: skip
    pairs = mesh.sum_shards(active_pairs(term.selected))
    return AuxK(case.loss(squared), no_rows(error), term, pairs)


def _renamed(among: Selected, latents: Tensor) -> Selected:
    """What was selected among `latents`, by the names of all."""
    names = latents.int()[among.indices.clamp_min(0).long()].masked_fill_(among.indices < 0, -1)
    return Selected(names, among.z)


def _dense_rows(case: Case, k_aux: int) -> tuple[Tensor, Tensor, DeadRows]:
    """||e - e_hat||^2, the pairs it took, and the gradients of AuxK, dense over the dead latents alone."""
    latents, error, bias, scale = case.latents, case.error, case.bias(), case.scale()
    W_enc, W_dec = case.params["W_enc"][latents], case.params["W_dec"][latents]
    rows = DeadRows(latents, torch.zeros_like(W_enc), torch.zeros_like(bias), torch.zeros_like(W_dec))
    squared, pairs = error.new_zeros((), dtype=torch.float64), latents.new_zeros(())
    size = max(1, AUXK_ENTRIES // len(latents))
    for part, target in zip(case.batch.x.split(size), error.split(size), strict=True):
        z = torch.addmm(bias, part, W_enc.T).relu_()
        if k_aux < len(latents):
            best = z.topk(k_aux, dim=1)
            z = torch.zeros_like(z).scatter_(1, best.indices, best.values)
        miss = torch.addmm(target, z, W_dec, alpha=-1)
        squared += torch.linalg.vector_norm(miss, dtype=torch.float64).square()
        active = z > 0
        pairs += active.sum()
        dz = (miss @ W_dec.T).mul_(active)
        rows.W_dec.addmm_(z.T, miss, alpha=scale)
        rows.W_enc.addmm_(dz.T, part, alpha=scale)
        rows.b_enc.add_(dz.sum(dim=0), alpha=scale)
    rows.W_enc.addr_(rows.b_enc, case.offset, alpha=-1)
    return squared, pairs, rows


def named(chosen: Tensor, count: int) -> Tensor:
    """int64 [count], ascending: where `chosen` (bool) is true, as `nonzero` says it, which would count them anew."""
    return torch.searchsorted(chosen.cumsum(0), torch.arange(1, count + 1, device=chosen.device))


def held_bytes(shape: Shape, k_aux: int, batch: int, precision: Precision, kernels: KernelKind) -> float:
    """At most, whatever part of the latents is dead."""
    n_latents, d_model = shape.n_latents, shape.d_model
    matrix, width = n_latents * d_model * _FLOAT, 2 if precision == "bf16" else _FLOAT
    if kernels == "cpu":
        from saescale.trainers.kernels.cpu_dead import BLOCK, GROUP, SLICE  # numba takes most of a second to load

        # Gradients, slices of d_model and the sort's counts. The product's columns go before, but to an allocator that
        # keeps blocks of their size.
        group, slices = min(batch, GROUP), 2 * n_latents * SLICE * _FLOAT
        counts = 2 * (group + n_latents) * _FLOAT + 2 * group * n_latents / BLOCK * _FLOAT
        by_pairs = 2 * matrix + slices + group * (d_model + SLICE) * _FLOAT + counts
        return min(KEPT_ENTRIES, batch * n_latents) * width + by_pairs
    few = min(FEW_DEAD * k_aux, n_latents)
    dense = 4 * few * d_model * _FLOAT + 4 * min(AUXK_ENTRIES, batch * few) * _FLOAT
    return max(dense, matrix * width / _FLOAT)


def held_on_mesh(shape: Shape, rows: int, precision: Precision, kernels: KernelKind) -> float:
    """As `held_bytes` of a shard of that shape whose replica works on so many rows: the product's columns. The dead
    latents' rows of W_enc (Case.bias) are gone before others are spoken to."""
    return min(KEPT_ENTRIES, rows * shape.n_latents) * (2 if precision == "bf16" else _FLOAT) if kernels == "cpu" else 0
