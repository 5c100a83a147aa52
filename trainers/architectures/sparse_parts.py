"""What sparse steps are made of: the encoder's operands, selections of its product, and reconstructions of them, alone
or shared by the processes of a mesh."""

from collections.abc import Sequence

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import Batch, Params
from saescale.trainers.kernels import choose
from saescale.trainers.kernels.interface import Decoded, Kept, Kernels, Selected, Term
from saescale.trainers.mesh.mesh import Mesh


def rows_of(batch: Batch, mesh: Mesh) -> Batch:
    """The rows of a batch that this replica works on."""
    if mesh.replicas == 1:
        return batch
    mine = mesh.rows(len(batch.x))
    target = None if batch.target is None else batch.target[mine]
    return Batch(batch.x[mine], batch.origin, batch.rounded[mine], target)


def target_of(batch: Batch) -> Tensor:
    """What x_hat is compared with, minus origin."""
    return batch.x if batch.target is None else batch.target - batch.origin


def encoder_operands(params: Params, operands: Params, batch: Batch, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, W_enc and bias as the kernels take them for W_enc (x - b_pre) + b_enc."""
    return *encoder_input(operands, batch), params["b_enc"] - params["W_enc"] @ offset


def encoder_input(operands: Params, batch: Batch) -> tuple[Tensor, Tensor]:
    """x minus origin and W_enc, in the type of the encoder's product."""
    W_enc = operands["W_enc"]
    return batch.rounded if W_enc.dtype == torch.bfloat16 else batch.x, W_enc


def select(
    params: Params, operands: Params, batch: Batch, offset: Tensor, ks: Sequence[int], mesh: Mesh,
    kept: Kept | None = None,
) -> list[Selected]:  # fmt: skip
    x, W_enc, bias = encoder_operands(params, operands, batch, offset)
    # No more than this shard has.
    selections = encode_select(choose.kernels(x.device), x, W_enc, bias, [min(k, len(bias)) for k in ks], kept)
    return [mesh.select(or_nan(selected, bias), k) for selected, k in zip(selections, ks, strict=True)]


def encode_select(
    sparse: Kernels, x: Tensor, W_enc: Tensor, bias: Tensor, ks: Sequence[int], kept: Kept | None
) -> list[Selected]:
    """As `sparse` selects; what AuxK needs of the product is written to `kept` where it is asked for."""
    beside = None if kept is None else choose.dead_kernels(sparse, x.device)
    if beside is None:
        return sparse.encode_select(x, W_enc, bias, ks)
    return beside.encode_select(x, W_enc, bias, ks, kept)


def or_nan(selected: Selected, bias: Tensor) -> Selected:
    """`selected`, or NaN for its z where `bias` has an entry that is not finite, as one bad weight gives it one.

    The NaN that x86 makes is negative and would never be selected: a diverged encoder would look like one without
    active latents.
    """
    return selected._replace(z=selected.z.masked_fill_(~bias.isfinite().all(), torch.nan))


def active_pairs(selected: Selected) -> Tensor:
    return (selected.z > 0).sum()


def decode_term(
    target: Tensor, offset: Tensor, selected: Selected, W_dec: Tensor, scale: float, error: Tensor, mesh: Mesh
) -> tuple[Term, Tensor]:
    """One reconstruction of this replica's rows, of which all shards have a part; Kernels.decode says the rest.

    `error` [batch, d_model] and the term are of the rows of all replicas, and so is the float64 scalar, ||error||^2.
    """
    mine = error if mesh.replicas == 1 else torch.empty_like(target)
    squared, dz = decode_rows(target, offset, selected, W_dec, scale, mine, mesh)
    if mine is not error:
        error.copy_(mesh.gather_replicas(mine))
    selected = Selected(mesh.gather_replicas(selected.indices), mesh.gather_replicas(selected.z))
    return Term(selected, mesh.gather_replicas(dz), scale), mesh.sum_replicas(squared)


def decode_rows(
    target: Tensor, offset: Tensor, selected: Selected, W_dec: Tensor, scale: float, error: Tensor, mesh: Mesh
) -> Decoded:
    """Kernels.decode of rows of which all shards have a part; dz is of this shard's pairs."""
    sparse = choose.kernels(target.device)
    if mesh.shards == 1:
        return sparse.decode(target, offset, selected, W_dec, scale, error)
    squared = error_of(target, offset, selected, W_dec, error, mesh)
    dz = sparse.gradient_by_z(error, selected.indices, W_dec, scale)
    return Decoded(squared, dz.masked_fill_(~(selected.z > 0), 0))


def error_of(
    target: Tensor, offset: Tensor, selected: Selected, W_dec: Tensor, error: Tensor, mesh: Mesh
) -> Tensor:  # fmt: skip
    """||target - offset - x_hat||^2, a float64 scalar; the difference, by all shards' latents, goes to `error`."""
    sparse = choose.kernels(target.device)
    if mesh.shards == 1:
        return sparse.decode(target, offset, selected, W_dec, None, error).squared
    if mesh.shard == 0:  # what is not a sum over latents is its part
        sparse.decode(target, offset, selected, W_dec, None, error)
    else:
        sparse.decode(torch.zeros_like(target), torch.zeros_like(offset), selected, W_dec, None, error)
    error.copy_(mesh.sum_shards(error))
    return error.double().square_().sum()


def sum_replicas(squared: Tensor, active: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Sums over the rows of all replicas."""
    if mesh.replicas == 1:
        return squared, active
    both = mesh.sum_replicas(torch.stack([squared, active.double()]))
    return both[0], both[1].round().long()
