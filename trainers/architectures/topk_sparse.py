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

from saescale.trainers.architectures import auxk
from saescale.trainers.architectures.architecture import (
    Batch,
    Conditions,
    Dead,
    Params,
    Reconstruction,
    Shape,
    Step,
    Update,
    Worked,
)
from saescale.trainers.architectures.sparse_parts import (
    active_pairs,
    decode_term,
    error_of,
    rows_of,
    select,
    sum_replicas,
    target_of,
)
from saescale.trainers.kernels import choose
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.kernels.eager import ENTRIES as EAGER_ENTRIES
from saescale.trainers.kernels.eager import adam_rows
from saescale.trainers.kernels.interface import Kept, Pairs, Selected, Summands, Term, group_size, product_rows
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.mesh.traffic import Said
from saescale.trainers.precision import Precision

_FLOAT = 4


class TopKSettings(auxk.Settings, Protocol):
    """What this path needs of topk.Settings."""

    @property
    def k(self) -> int: ...

    def reconstructions(self, n_latents: int) -> list[tuple[int, float]]: ...


class Gradient(NamedTuple):
    """The gradient of a cell's loss, in factors: `update` sums the rows where it uses them."""

    pairs: Pairs
    errors: Tensor  # [terms * batch, d_model]
    x: Tensor  # [batch, d_model], minus origin
    offset: Tensor  # [d_model], b_pre - origin
    aux: auxk.DeadRows
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
        sparse = choose.kernels(batch.x.device)
        W_dec, offset = params["W_dec"], params["b_pre"] - batch.origin
        n_latents, d_model = W_dec.shape
        elements = batch.x.numel()
        mine = rows_of(batch, mesh)
        kept = auxk.to_keep(sparse, operands, mine, dead, conditions, len(batch.x)) if settings.k_aux else None
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
            # In AuxK's place, which is written later.
            spread = torch.sub(error.sum(dim=0) / len(batch.x), error, out=errors[-1])
            count, scatter = idle.sum(), spread.square_().mean()
        # All that the host has to know of a step, in one piece: it waits for the device here and nowhere else.
        mine_dead = count
        counts = mesh.sum_shards(torch.stack([active.double(), count.double()]))
        told = torch.cat([torch.stack(made.squared), counts, torch.stack([scatter.double(), mine_dead.double()])])
        *squares, pairs, n_dead, scatter_of_error, n_mine = told.tolist()

        losses = [square / elements / conditions.variance for square in squares]
        found = auxk.AuxK(0.0, auxk.no_rows(error), None)
        if settings.k_aux and n_dead and scatter_of_error > 0:
            latents = auxk.named(idle, int(n_mine))
            case = auxk.Case(params, operands, batch, offset, error, latents, scatter_of_error, settings)
            if not mesh.alone:
                k_aux = min(settings.k_aux, int(n_dead))
                found = auxk.on_mesh(case, errors[-1], mesh, k_aux, kept)._replace(dead=int(n_dead))
            elif choose.dead_kernels(sparse, error.device) is None:
                found = auxk.by_rows_or_term(case, errors[-1])
            else:
                among, selected = auxk.among_dead(case, batch, settings.k_aux, kept)
                kept = None  # before the gradient, which takes as much memory
                found = auxk.by_pairs(case, among, selected)._replace(dead=len(latents))
        if found.term is not None:
            terms.append(found.term)
        gradient = Gradient(
            sparse.transpose(terms, n_latents), errors.view(-1, d_model), batch.x, offset, found.rows, made.b_pre
        )  # fmt: skip
        parts = self.parts(losses, chosen) | {"auxk": found.loss}
        worked = Worked(len(batch.x), int(pairs), found.pairs, found.dead * len(batch.x))
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
        sparse = choose.kernels(W_enc.device)
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
            return Reconstruction(mine.x, *sum_replicas(nothing, nothing.long(), mesh))
        selected = self.used(params, operands, mine, offset, settings, mesh)
        error = torch.empty_like(mine.x)
        squared = error_of(target_of(mine), offset, selected, params["W_dec"], error, mesh)
        return Reconstruction(error, *sum_replicas(squared, mesh.sum_shards(active_pairs(selected)), mesh))

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
        of_dead = auxk.held_bytes(shape, k_aux, batch, precision, kernels) if k_aux else 0
        gradients = 2 * (2 * matrix + (shape.n_latents + shape.d_model) * _FLOAT) if kernels == "eager" else 0
        made = _pre_activations(shape, max(ks), batch, precision, kernels)
        return made + errors + pairs + of_dead + gradients

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
