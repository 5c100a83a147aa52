"""The sparse path of TopK: what one batch gives one cell, and the optimiser's step by it.

    result = step.measure(params, operands, batch, settings, conditions, dead, mesh)
    step.update(params, operands, result.gradient, updates, mesh)

The objective is that of topk.py; the algebra is that of trainers/kernels/interface.py, on every device. Architectures
whose objective is TopK's but for which latents are decoded, and in how many reconstructions, override `choose`,
`decode` and `parts` (batchtopk_sparse.py, matryoshka_sparse.py, hierarchical_topk_sparse.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import (
    Batch,
    Conditions,
    Count,
    Dead,
    Params,
    Reconstruction,
    Shape,
    Step,
    Update,
    Worked,
)
from saescale.trainers.kernels.choose import KernelKind, dead_kernels, kernels
from saescale.trainers.kernels.eager import ENTRIES as EAGER_ENTRIES
from saescale.trainers.kernels.eager import adam_rows
from saescale.trainers.kernels.interface import (
    Kept,
    Kernels,
    Pairs,
    Selected,
    Summands,
    Term,
    group_size,
    product_rows,
)
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.mesh.traffic import Said
from saescale.trainers.precision import Precision

KEPT_ENTRIES = 2**24  # of the encoder's product that are kept for AuxK on a CPU; of more it makes its own product
FEW_DEAD = 8  # times k_aux: elsewhere, up to so many dead latents AuxK is computed dense
AUXK_ENTRIES = 2**22  # activations of dead latents that it then holds at a time: 16 MiB
_FLOAT = 4


class TopKSettings(Protocol):
    """What this path needs of topk.Settings."""

    @property
    def k(self) -> int: ...

    @property
    def k_aux(self) -> int: ...

    @property
    def auxk_coefficient(self) -> float: ...

    def reconstructions(self, n_latents: int) -> list[tuple[int, float]]: ...


class DeadRows(NamedTuple):
    """AuxK's gradient, of the dead latents alone."""

    latents: Tensor  # int64 [dead], ascending
    W_enc: Tensor  # [dead, d_model], the offset of its inputs taken off already
    b_enc: Tensor  # [dead]
    W_dec: Tensor  # [dead, d_model]


class Gradient(NamedTuple):
    """The gradient of a cell's loss, in factors: `update` sums the rows where it uses them."""

    pairs: Pairs
    errors: Tensor  # [terms * batch, d_model]
    x: Tensor  # [batch, d_model], minus origin
    offset: Tensor  # [d_model], b_pre - origin
    aux: DeadRows
    b_pre: Tensor  # [d_model], without the part through the encoder, - W_enc^T (gradient of b_enc)


class Chosen(NamedTuple):
    """The latents that the main losses decode."""

    active: Selected  # of the SAE itself
    terms: Sequence[Selected]  # of each reconstruction; where they are nested, what it has beside the one before
    weights: Sequence[float]  # of each one's squared error in the loss


class Reconstructed(NamedTuple):
    """What `Chosen` gave. The terms' errors lie in the memory that the caller gave, in their order."""

    terms: list[Term]
    squared: list[Tensor]  # float64 scalars: ||x - x_hat||^2 of each reconstruction
    own: int  # which of them is the SAE's own
    active: Selected  # its latents, of the rows of all replicas
    b_pre: Tensor  # [d_model]: the gradient, without the part through the encoder


class TopKStep:
    """FastStep of TopK. Of a cell that several processes share each asks `mesh` for what the others have."""

    rounded: frozenset[str] = frozenset({"W_enc"})

    def choose(
        self,
        params: Params,
        operands: Params,
        batch: Batch,
        offset: Tensor,
        settings: Any,
        mesh: Mesh,
        kept: Kept | None,
    ) -> Chosen:
        """`offset` is b_pre - origin; kept.pre is to be written."""
        ks, weights = zip(*settings.reconstructions(mesh.whole(len(params["W_dec"]))), strict=True)
        selections = select(params, operands, batch, offset, ks, mesh, kept)
        return Chosen(selections[0], selections, weights)

    def decode(
        self, chosen: Chosen, target: Tensor, offset: Tensor, W_dec: Tensor, scale: float, errors: Tensor, mesh: Mesh
    ) -> Reconstructed:
        """Each reconstruction by itself, the SAE's own first.

        `scale` times x - x_hat is the gradient by x_hat of a reconstruction of weight 1; `errors` [terms, batch,
        d_model] is written, and batch is the whole one of all replicas.
        """
        b_pre = torch.zeros_like(offset)
        terms, squared = [], []
        for selected, weight, error in zip(chosen.terms, chosen.weights, errors, strict=True):
            term, square = decode_term(target, offset, selected, W_dec, scale * weight, error, mesh)
            terms.append(term)
            squared.append(square)
            b_pre.add_(error.sum(dim=0), alpha=scale * weight)
        return Reconstructed(terms, squared, 0, terms[0].selected, b_pre)

    def parts(self, losses: Sequence[float], chosen: Chosen) -> dict[str, float]:
        """Losses.parts, but for AuxK, from the nmse of each reconstruction."""
        return {"multi": losses[1] if len(losses) > 1 else 0.0}

    def said(self, settings: Any, n_latents: int) -> Said:
        """What it asks a mesh for."""
        ks = [k for k, _ in settings.reconstructions(n_latents)]
        return Said(ks, len(ks), sum(ks))

    @torch.no_grad()
    def measure(
        self, params: Params, operands: Params, batch: Batch, settings: TopKSettings, conditions: Conditions,
        dead: Dead, mesh: Mesh,
    ) -> Step:  # fmt: skip
        """Losses and gradient of a batch, which is counted in `dead`.

        Every replica is given the whole batch, works on its rows, and has the others' errors and pairs from them: so
        each has all of the gradient, which is summed in the order of one process.
        """
        sparse = kernels(batch.x.device)
        W_dec, offset = params["W_dec"], params["b_pre"] - batch.origin
        n_latents, d_model = W_dec.shape
        elements = batch.x.numel()
        mine = rows_of(batch, mesh)
        kept = _to_keep(sparse, operands, mine, dead, conditions, len(batch.x)) if settings.k_aux else None
        chosen = self.choose(params, operands, mine, offset, settings, mesh, kept)
        # One more for AuxK, where it may need one.
        errors = batch.x.new_empty(len(chosen.terms) + bool(settings.k_aux), len(batch.x), d_model)
        # The gradient by x_hat of the mean over batch and d_model of the squared error over c.
        scale = -2.0 / (elements * conditions.variance)
        made = self.decode(chosen, target_of(mine), offset, W_dec, scale, errors[: len(chosen.terms)], mesh)
        terms, error = made.terms, errors[made.own]
        active = torch.stack([active_pairs(term.selected) for term in terms]).sum()

        # Has to go before AuxK: a latent that came back to life in this batch is no longer dead.
        dead.update(made.active)
        idle = dead.after(conditions.dead_after_tokens)
        count, scatter = active.new_zeros(()), offset.new_zeros(())
        if settings.k_aux:
            count, scatter = idle.sum(), (error.sum(dim=0) / len(batch.x) - error).square_().mean()
        # All that the host has to know of a step, in one piece: it waits for the device here and nowhere else.
        mine_dead = count
        counts = mesh.sum_shards(torch.stack([active.double(), count.double()]))
        told = torch.cat([torch.stack(made.squared), counts, torch.stack([scatter.double(), mine_dead.double()])])
        *squares, pairs, n_dead, scatter_of_error, n_mine = told.tolist()

        losses = [square / elements / conditions.variance for square in squares]
        auxk = _AuxK(0.0, _no_rows(error), None)
        if settings.k_aux and n_dead and scatter_of_error > 0:
            latents = _named(idle, int(n_mine))
            if not mesh.alone:
                auxk = _auxk_of_mesh(
                    params, operands, batch, offset, error, latents, scatter_of_error, settings, errors[-1], mesh,
                    min(settings.k_aux, int(n_dead)), kept,
                )  # fmt: skip
                auxk = auxk._replace(dead=int(n_dead))
            elif dead_kernels(sparse, error.device) is None:
                auxk = _auxk(
                    params, operands, batch, offset, error, latents, scatter_of_error, settings, errors[-1]
                )  # fmt: skip
            else:
                among, selected = _of_dead(params, operands, batch, offset, latents, settings.k_aux, kept)
                kept = None  # before the gradient, which takes as much memory
                rows = _auxk_by_pairs(params, batch, offset, error, among, selected, scatter_of_error, settings)
                auxk = rows._replace(dead=len(latents))
        if auxk.term is not None:
            terms.append(auxk.term)
        gradient = Gradient(
            sparse.transpose(terms, n_latents), errors.view(-1, d_model), batch.x, offset, auxk.rows, made.b_pre
        )  # fmt: skip
        parts = self.parts(losses, chosen) | {"auxk": auxk.loss}
        worked = Worked(len(batch.x), int(pairs), auxk.pairs, auxk.dead * len(batch.x))
        return Step(losses[made.own], parts, gradient, worked)

    @torch.no_grad()
    def update(
        self, params: Params, operands: Params, gradient: Gradient, updates: Mapping[str, Update], mesh: Mesh
    ) -> None:
        """Project W_dec's gradient off its unit rows, Adam, renormalise W_dec's rows, then the average.

        The two matrices and their moments are read and written once (Kernels.update_rows), and their gradients never
        exist in memory. W_enc is read twice more in a step, by its products with the gradient of b_enc and with the
        offset: each needs all of what goes before.
        """
        pairs, aux, W_enc = gradient.pairs, gradient.aux, params["W_enc"]
        sparse = kernels(W_enc.device)
        b_enc = sparse.latent_sums(pairs)
        # What AuxK's rows have of the offset is in them already, so it is added after `shift` was taken.
        shift = b_enc.clone()
        b_enc.index_add_(0, aux.latents, aux.b_enc)
        # Has to go before W_enc is updated: pre-activations see x - b_pre.
        b_pre = gradient.b_pre - mesh.sum_shards(b_enc @ W_enc)

        of_decoder = Summands(
            pairs.starts, pairs.rows, pairs.decoder, gradient.errors, None, gradient.offset, aux.latents, aux.W_dec
        )  # fmt: skip
        of_encoder = Summands(
            pairs.starts, pairs.rows, pairs.encoder, gradient.x, shift, gradient.offset, aux.latents, aux.W_enc
        )  # fmt: skip
        # A parameter that is not trained has no update.
        matrices = {"W_dec": of_decoder, "W_enc": of_encoder}
        for name, summands in matrices.items():
            if name not in updates:
                continue
            moments, adam, unit_rows = updates[name]
            operand = None if operands[name] is params[name] else operands[name]
            sparse.update_rows(params[name], moments, summands, adam, unit_rows, operand)
        vectors = {"b_enc": b_enc, "b_pre": b_pre}
        for name, dense in vectors.items():
            if name not in updates:
                continue
            moments, adam, unit_rows = updates[name]
            adam_rows(params[name], moments, dense, adam, unit_rows)

    def used(
        self, params: Params, operands: Params, batch: Batch, offset: Tensor, settings: Any, mesh: Mesh
    ) -> Selected:  # fmt: skip
        """The latents that a token has when the SAE is used, of this shard."""
        return select(params, operands, batch, offset, [settings.k], mesh)[0]

    @torch.no_grad()
    def reconstruct(self, params: Params, operands: Params, batch: Batch, settings: Any, mesh: Mesh) -> Reconstruction:
        offset = params["b_pre"] - batch.origin
        mine = rows_of(batch, mesh)
        if not len(mine.x):  # the rest of a set of rows may have fewer than there are replicas
            nothing = batch.x.new_zeros((), dtype=torch.float64)
            return Reconstruction(mine.x, *_of_replicas(nothing, nothing.long(), mesh))
        selected = self.used(params, operands, mine, offset, settings, mesh)
        error = torch.empty_like(mine.x)
        squared = _error_of(target_of(mine), offset, selected, params["W_dec"], error, mesh)
        return Reconstruction(error, *_of_replicas(squared, mesh.sum_shards(active_pairs(selected)), mesh))

    def training_bytes(
        self, shape: Shape, settings: TopKSettings, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        """One step: pre-activations, errors, selections, sorted pairs, AuxK."""
        ks = [k for k, _ in settings.reconstructions(shape.n_latents)]
        k_aux, matrix = settings.k_aux, shape.n_latents * shape.d_model * _FLOAT
        errors = (len(ks) + bool(k_aux)) * batch * shape.d_model * _FLOAT
        # Index, z and dz of each, then their pairs sorted: row and two weights. A few index tensors are int64 on the
        # way; on a GPU the sort has keys and an order besides.
        pairs = batch * (sum(ks) + k_aux) * (3 * _FLOAT + 3 * _FLOAT + (8 if kernels == "cpu" else 24))
        auxk = _auxk_bytes(shape, k_aux, batch, precision, kernels) if k_aux else 0
        gradients = 2 * (2 * matrix + (shape.n_latents + shape.d_model) * _FLOAT) if kernels == "eager" else 0
        made = _pre_activations(shape, max(ks), batch, precision, kernels)
        return made + errors + pairs + auxk + gradients

    def evaluation_bytes(
        self, shape: Shape, settings: TopKSettings, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        errors = batch * shape.d_model * _FLOAT + batch * settings.k * 3 * _FLOAT
        widest = max(k for k, _ in settings.reconstructions(shape.n_latents))
        return _pre_activations(shape, widest, batch, precision, kernels) + errors


def _pre_activations(shape: Shape, k: int, rows: int, precision: Precision, kernels: KernelKind) -> float:
    if kernels == "eager":
        # Keys to select by, or latents and their gradient.
        return 4 * _FLOAT * min(rows * shape.n_latents, EAGER_ENTRIES)
    width = 2 if precision == "bf16" else _FLOAT
    maxima = _FLOAT / group_size(shape.n_latents, k) if kernels == "cuda" else 0
    return product_rows(rows, shape.n_latents, kernels) * shape.n_latents * (width + maxima)


def _auxk_bytes(shape: Shape, k_aux: int, batch: int, precision: Precision, kernels: KernelKind) -> float:
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


def rows_of(batch: Batch, mesh: Mesh) -> Batch:
    """The rows of a batch that this replica works on."""
    if mesh.replicas == 1:
        return batch
    mine = mesh.rows(len(batch.x))
    target = None if batch.target is None else batch.target[mine]
    return Batch(batch.x[mine], batch.origin, batch.rounded[mine], target)


def decode_term(
    target: Tensor, offset: Tensor, selected: Selected, W_dec: Tensor, scale: float, error: Tensor, mesh: Mesh
) -> tuple[Term, Tensor]:
    """One reconstruction of this replica's rows, of which all shards have a part; Kernels.decode says the rest.

    `error` [batch, d_model] and the term are of the rows of all replicas, and so is the float64 scalar, ||error||^2.
    """
    sparse = kernels(target.device)
    if mesh.shards == 1:
        mine = error if mesh.replicas == 1 else torch.empty_like(target)
        squared, dz = sparse.decode(target, offset, selected, W_dec, scale, mine)
    else:
        mine = torch.empty_like(target)
        squared = _error_of(target, offset, selected, W_dec, mine, mesh)
        dz = sparse.gradient_by_z(mine, selected.indices, W_dec, scale).masked_fill_(~(selected.z > 0), 0)
    if mine is not error:
        error.copy_(mesh.gather_replicas(mine))
    selected = Selected(mesh.gather_replicas(selected.indices), mesh.gather_replicas(selected.z))
    return Term(selected, mesh.gather_replicas(dz), scale), mesh.mean_replicas(squared) * mesh.replicas


def _error_of(
    target: Tensor, offset: Tensor, selected: Selected, W_dec: Tensor, error: Tensor, mesh: Mesh
) -> Tensor:  # fmt: skip
    """||target - offset - x_hat||^2, a float64 scalar; the difference, by all shards' latents, goes to `error`."""
    sparse = kernels(target.device)
    if mesh.shards == 1:
        return sparse.decode(target, offset, selected, W_dec, None, error).squared
    first = mesh.shard == 0  # what is not a sum over latents is its part
    given, shift = (target, offset) if first else (torch.zeros_like(target), torch.zeros_like(offset))
    sparse.decode(given, shift, selected, W_dec, None, error)
    error.copy_(mesh.sum_shards(error))
    return error.double().square_().sum()


def _of_replicas(squared: Tensor, active: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Sums over the rows of all replicas."""
    if mesh.replicas == 1:
        return squared, active
    both = mesh.mean_replicas(torch.stack([squared, active.double()])) * mesh.replicas
    return both[0], both[1].round().long()


def target_of(batch: Batch) -> Tensor:
    """What x_hat is compared with, minus origin."""
    return batch.x if batch.target is None else batch.target - batch.origin


def active_pairs(selected: Selected) -> Tensor:
    return (selected.z > 0).sum()


def _named(chosen: Tensor, count: int) -> Tensor:
    """int64 [count], ascending: where `chosen` (bool) is true, as `nonzero` says it, which would count them anew."""
    return torch.searchsorted(chosen.cumsum(0), torch.arange(1, count + 1, device=chosen.device))


def select(
    params: Params, operands: Params, batch: Batch, offset: Tensor, ks: Sequence[int], mesh: Mesh,
    kept: Kept | None = None,
) -> list[Selected]:  # fmt: skip
    x, W_enc, bias = encoder_operands(params, operands, batch, offset)
    # No more than this shard has.
    selections = encode_select(kernels(x.device), x, W_enc, bias, [min(k, len(bias)) for k in ks], kept)
    return [mesh.select(or_nan(selected, bias), k) for selected, k in zip(selections, ks, strict=True)]


def encode_select(
    sparse: Kernels, x: Tensor, W_enc: Tensor, bias: Tensor, ks: Sequence[int], kept: Kept | None
) -> list[Selected]:
    """As `sparse` selects; what AuxK needs of the product is written to `kept` where it is asked for."""
    beside = None if kept is None else dead_kernels(sparse, x.device)
    if beside is None:
        return sparse.encode_select(x, W_enc, bias, ks)
    return beside.encode_select(x, W_enc, bias, ks, kept)


def encoder_operands(params: Params, operands: Params, batch: Batch, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, W_enc and bias as the kernels take them for W_enc (x - b_pre) + b_enc."""
    return *encoder_input(operands, batch), params["b_enc"] - params["W_enc"] @ offset


def encoder_input(operands: Params, batch: Batch) -> tuple[Tensor, Tensor]:
    """x minus origin and W_enc, in the type of the encoder's product."""
    W_enc = operands["W_enc"]
    return batch.rounded if W_enc.dtype == torch.bfloat16 else batch.x, W_enc


def or_nan(selected: Selected, bias: Tensor) -> Selected:
    """`selected`, or NaN for its z where `bias` has an entry that is not finite, as one bad weight gives it one.

    The NaN that x86 makes is negative and would never be selected: a diverged encoder would look like one without
    active latents.
    """
    return selected._replace(z=selected.z.masked_fill_(~bias.isfinite().all(), torch.nan))


class _AuxK(NamedTuple):
    """The AuxK loss (topk.auxk_loss) and its gradient, in one of two forms: rows, or a term like the others."""

    loss: float | Tensor
    rows: DeadRows
    term: Term | None
    pairs: Count = 0  # that were decoded
    dead: int = 0  # latents that were scored


def _no_rows(error: Tensor) -> DeadRows:
    return DeadRows(error.new_empty(0, dtype=torch.int64), error[:0], error.new_empty(0), error[:0])


def _to_keep(
    sparse: Kernels, operands: Params, batch: Batch, dead: Dead, conditions: Conditions, tokens: int
) -> Kept | None:
    """What AuxK may need of the main losses' product: columns of latents that are dead unless this batch revives them.

    `tokens`: those of all replicas' batches. None where there are none or too many, or on other devices, where their
    names would have to be waited for.
    """
    if dead_kernels(sparse, batch.x.device) is None:
        return None
    latents = dead.after(conditions.dead_after_tokens - tokens).nonzero().flatten()
    x, _ = encoder_input(operands, batch)
    few = 0 < len(latents) <= KEPT_ENTRIES // len(x)
    return Kept(latents, x.new_empty(len(x), len(latents))) if few else None


def _of_dead(
    params: Params, operands: Params, batch: Batch, offset: Tensor, latents: Tensor, k_aux: int, kept: Kept | None
) -> tuple[Tensor, Selected]:
    """Some latents, the dead ones (`latents`) among them, and of these the k_aux largest, as indices of the former."""
    beside = dead_kernels(kernels(batch.x.device), batch.x.device)
    assert beside is not None
    k = min(k_aux, len(latents))
    bias = params["b_enc"][latents] - params["W_enc"][latents] @ offset
    if kept is None:
        x, W_enc = encoder_input(operands, batch)
        return latents, beside.encode_select(x, W_enc[latents], bias, [k], None)[0]
    # Those that the batch revived are never selected.
    biases = torch.full((len(params["b_enc"]),), -torch.inf).index_copy_(0, latents, bias)
    return kept.latents, beside.select(kept.pre, biases[kept.latents], k)


def _auxk_by_pairs(
    params: Params, batch: Batch, offset: Tensor, error: Tensor, latents: Tensor, selected: Selected, scatter: float,
    settings: TopKSettings,
) -> _AuxK:  # fmt: skip
    """As `_auxk`, by the pairs that were `selected` among `latents`."""
    beside = dead_kernels(kernels(error.device), error.device)
    assert beside is not None
    # The gradient by e_hat of the mean squared error over that of the mean error, e being x - x_hat.
    scale = 2 * settings.auxk_coefficient / (error.numel() * scatter)
    squared, pairs, W_enc, b_enc, W_dec = beside.dead_rows(
        batch.x, error, selected, params["W_dec"], latents, scale
    )  # fmt: skip
    W_enc.addr_(b_enc, offset, alpha=-1)
    rows = DeadRows(latents, W_enc, b_enc, W_dec)
    return _AuxK(squared / error.numel() / scatter, rows, None, pairs)


def _auxk(
    params: Params, operands: Params, batch: Batch, offset: Tensor, error: Tensor, latents: Tensor, scatter: float,
    settings: TopKSettings, miss: Tensor,
) -> _AuxK:  # fmt: skip
    """`error` is x - x_hat of the main loss, `scatter` the mean square of it minus its mean over the batch, `latents`
    the dead ones; the term's errors are written to `miss`.

    While few latents are dead, products with their rows gathered into one matrix are the fastest way, and their
    gradients small. Where many are, k_aux of them are few, and AuxK goes the way of the other losses.
    """
    k_aux = min(settings.k_aux, len(latents))
    bias = params["b_enc"][latents] - params["W_enc"][latents] @ offset
    # The gradient by e_hat of the mean squared error over that of the mean error, e being x - x_hat.
    scale = -2 * settings.auxk_coefficient / (error.numel() * scatter)
    if len(latents) <= FEW_DEAD * k_aux:
        squared, pairs, rows = _dead_rows(params, batch.x, offset, error, latents, bias, k_aux, scale)
        return _AuxK(squared / error.numel() / scatter, rows, None, pairs, len(latents))

    sparse, W_enc = kernels(error.device), operands["W_enc"]
    x = batch.rounded if W_enc.dtype == torch.bfloat16 else batch.x
    selected = _renamed(sparse.encode_select(x, W_enc[latents], bias, [k_aux])[0], latents)
    # No b_pre here: the error has it taken off already.
    decoded = sparse.decode(error, torch.zeros_like(offset), selected, params["W_dec"], scale, miss)
    loss = decoded.squared / error.numel() / scatter
    return _AuxK(loss, _no_rows(error), Term(selected, decoded.dz, scale), active_pairs(selected), len(latents))


def _auxk_of_mesh(
    params: Params, operands: Params, batch: Batch, offset: Tensor, error: Tensor, latents: Tensor, scatter: float,
    settings: TopKSettings, miss: Tensor, mesh: Mesh, k_aux: int, kept: Kept | None,
) -> _AuxK:  # fmt: skip
    """As `_auxk`, where `latents` are this shard's dead ones (maybe none) and `k_aux` is at most as many as all have.

    It goes the way of the other losses: this replica's rows, of each the largest of all shards, one sum over them.
    """
    mine, sparse = rows_of(batch, mesh), kernels(error.device)
    none = torch.full((len(mine.x), 0), -1, dtype=torch.int32, device=error.device)
    selected = Selected(none, mine.x.new_empty(none.shape))
    if len(latents) and dead_kernels(sparse, error.device) is not None:
        among, found = _of_dead(params, operands, mine, offset, latents, k_aux, kept)
        selected = _renamed(found, among)
    elif len(latents):
        x, W_enc = encoder_input(operands, mine)
        bias = params["b_enc"][latents] - params["W_enc"][latents] @ offset
        k = min(k_aux, len(latents))
        selected = _renamed(sparse.encode_select(x, W_enc[latents], bias, [k])[0], latents)
    selected = mesh.select(selected, k_aux)
    if not selected.z.shape[1]:  # kernels want a pair to work on
        pad = torch.nn.functional.pad
        selected = Selected(pad(selected.indices, (0, 1), value=-1), pad(selected.z, (0, 1)))
    scale = -2 * settings.auxk_coefficient / (error.numel() * scatter)
    own = mesh.rows(len(batch.x))
    # No b_pre here: the error has it taken off already.
    term, squared = decode_term(
        error[own], torch.zeros_like(offset), selected, params["W_dec"], scale, miss, mesh
    )  # fmt: skip
    pairs = mesh.sum_shards(active_pairs(term.selected))
    return _AuxK(squared / error.numel() / scatter, _no_rows(error), term, pairs)


def _renamed(among: Selected, latents: Tensor) -> Selected:
    """What was selected among `latents`, by the names of all."""
    names = latents.int()[among.indices.clamp_min(0).long()].masked_fill_(among.indices < 0, -1)
    return Selected(names, among.z)


def _dead_rows(
    params: Params, x: Tensor, offset: Tensor, error: Tensor, latents: Tensor, bias: Tensor, k_aux: int, scale: float
) -> tuple[Tensor, Tensor, DeadRows]:
    """||e - e_hat||^2, the pairs it took, and the gradients of AuxK, dense over the dead `latents` alone.

    `bias` is theirs.
    """
    W_enc, W_dec = params["W_enc"][latents], params["W_dec"][latents]
    rows = DeadRows(latents, torch.zeros_like(W_enc), torch.zeros_like(bias), torch.zeros_like(W_dec))
    squared, pairs = error.new_zeros((), dtype=torch.float64), latents.new_zeros(())
    size = max(1, AUXK_ENTRIES // len(latents))
    for part, target in zip(x.split(size), error.split(size), strict=True):
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
    rows.W_enc.addr_(rows.b_enc, offset, alpha=-1)
    return squared, pairs, rows
