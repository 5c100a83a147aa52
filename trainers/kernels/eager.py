"""The sparse algebra in plain torch operations on any device (see interface.py): dense where it has to be.

It is what the fast implementations are compared with, and what runs where none of them can. It does the arithmetic of
dense training: on matrices [batch, n_latents], a few tokens at a time so that they fit, and with a dense gradient
[n_latents, d_model] for each parameter. Nothing of size batch x k x d_model is made here either.

On CUDA index_add_ adds in an order of the device's choosing, so sums may differ in their last bits from call to call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saescale.trainers.kernels.interface import AdamStep, Decoded, Moments, Pairs, Selected, Summands, Term

ENTRIES = 2**25  # of a dense matrix that are held at a time


def encode_select(x: Tensor, W_enc: Tensor, bias: Tensor, ks: Sequence[int]) -> list[Selected]:
    n_latents = len(W_enc)
    # topk promises nothing about ties. The bits of positive floats have their order, so they make, with the index
    # counted from the end below them, keys that are all different; what is not positive becomes 0 above.
    order = torch.arange(n_latents - 1, -1, -1, device=x.device)
    best = torch.empty(len(x), max(ks), dtype=torch.int64, device=x.device)
    for part, out in zip(x.split(_tokens(n_latents)), best.split(_tokens(n_latents)), strict=True):
        pre = torch.mm(part, W_enc.detach().T).float() + bias
        keys = pre.view(torch.int32).clamp_(min=0).long().bitwise_left_shift_(32).bitwise_or_(order)
        out.copy_(keys.topk(max(ks), dim=1).values)
    z = (best >> 32).int().view(torch.float32)
    indices = torch.where(best >> 32 > 0, n_latents - 1 - (best & 0xFFFFFFFF), -1).int()
    return [Selected(indices[:, :k].contiguous(), z[:, :k].contiguous()) for k in ks]


def select_above(x: Tensor, W_enc: Tensor, bias: Tensor, threshold: Tensor, most: int) -> Selected | None:
    tokens, latents, values, counts = [], [], [], []
    for number, part in enumerate(x.split(_tokens(len(W_enc)))):
        pre = torch.mm(part, W_enc.detach().T).float() + bias
        above = pre > threshold
        counts.append(above.sum(dim=1))
        if sum(int(count.sum()) for count in counts) > most:
            return None
        rows, columns = above.nonzero(as_tuple=True)
        tokens.append(rows + number * _tokens(len(W_enc)))
        latents.append(columns)
        values.append(pre[rows, columns])
    count, token = torch.cat(counts), torch.cat(tokens)
    width = max(1, int(count.max()))
    place = torch.arange(len(token), device=x.device) - (count.cumsum(0) - count)[token]
    indices = torch.full((len(x), width), -1, dtype=torch.int32, device=x.device)
    indices[token, place] = torch.cat(latents).int()
    z = bias.new_zeros(len(x), width)
    z[token, place] = torch.cat(values)
    return Selected(indices, z)


def decode(x: Tensor, offset: Tensor, selected: Selected, W_dec: Tensor, scale: float | None, error: Tensor) -> Decoded:
    torch.sub(x, offset, out=error)
    W_dec = W_dec.detach()
    dz = torch.empty_like(selected.z) if scale is not None else selected.z[:, :0]
    indices = selected.indices.clamp(min=0).long()
    size = _tokens(len(W_dec))
    for i, z, left, out in zip(*(t.split(size) for t in (indices, selected.z, error, dz)), strict=True):
        # Padding adds its 0 to latent 0.
        left.addmm_(z.new_zeros(len(z), len(W_dec)).scatter_add_(1, i, z), W_dec, alpha=-1)
        if scale is not None:
            torch.gather(torch.mm(left, W_dec.T).mul_(scale), 1, i, out=out).masked_fill_(~(z > 0), 0)
    return Decoded(error.double().square_().sum(), dz)


def gradient_by_z(error: Tensor, indices: Tensor, W_dec: Tensor, scale: float) -> Tensor:
    dz = error.new_empty(indices.shape)
    size = _tokens(len(W_dec))
    for i, left, out in zip(indices.split(size), error.split(size), dz.split(size), strict=True):
        torch.gather(torch.mm(left, W_dec.detach().T).mul_(scale), 1, i.clamp(min=0).long(), out=out)
    return dz.masked_fill_(indices < 0, 0)


def transpose(terms: Sequence[Term], n_latents: int) -> Pairs:
    """By a stable sort, without making the host wait for the device: pairs that are not active come last.

    So `rows`, `decoder` and `encoder` have entries beyond starts[-1], which mean nothing.
    """
    # Half as many bytes are half as many passes of a radix sort.
    dtype = torch.int16 if n_latents < 2**15 else torch.int32
    keys, rows = [], []
    for number, (selected, _, _) in enumerate(terms):
        batch, k = selected.z.shape
        keys.append(torch.where(selected.z > 0, selected.indices, n_latents).to(dtype).flatten())
        tokens = torch.arange(number * batch, (number + 1) * batch, dtype=torch.int32, device=selected.z.device)
        rows.append(tokens[:, None].expand(batch, k).flatten())
    ordered, order = torch.cat(keys).sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(n_latents + 1, dtype=dtype, device=ordered.device))
    decoder = torch.cat([(term.selected.z * term.scale).flatten() for term in terms])
    encoder = torch.cat([term.dz.flatten() for term in terms])
    return Pairs(starts, torch.cat(rows)[order], decoder[order], encoder[order])


def latent_sums(pairs: Pairs) -> Tensor:
    n_latents = len(pairs.starts) - 1
    sums = pairs.encoder.new_zeros(n_latents + 1)
    return sums.index_add_(0, _latents(pairs.starts, len(pairs.rows)), pairs.encoder)[:-1]


def update_rows(
    parameter: Tensor, moments: Moments, gradient: Summands, adam: AdamStep, unit_rows: bool, operand: Tensor | None
) -> None:
    adam_rows(parameter, moments, dense_gradient(gradient), adam, unit_rows)
    if operand is not None:
        operand.copy_(parameter)


def dense_gradient(summands: Summands) -> Tensor:
    """[n_latents, d_model]: the rows that `Summands` describes."""
    n_latents, (count, d_model) = len(summands.starts) - 1, summands.sources.shape
    latents = _latents(summands.starts, len(summands.rows))
    columns = summands.rows.long() % count
    # What no pair names may not even have been written, and 0 times NaN is NaN.
    named = torch.zeros(count + 1, dtype=torch.bool, device=columns.device)
    named.index_fill_(0, torch.where(latents < n_latents, columns, count), True)
    gradient = summands.sources.new_zeros(n_latents, d_model)
    for start in range(0, count, _tokens(n_latents)):
        size = min(_tokens(n_latents), count - start)
        sources = torch.where(named[start : start + size, None], summands.sources[start : start + size], 0.0)
        here = (columns >= start) & (columns < start + size) & (latents < n_latents)
        # Whatever is left out goes to one more row.
        places = torch.where(here, latents, n_latents) * size + (columns - start).clamp_(0, size - 1)
        weights = sources.new_zeros((n_latents + 1) * size).index_add_(0, places, summands.weights)
        gradient.addmm_(weights.view(-1, size)[:-1], sources)
    if summands.shift is not None:
        gradient.addr_(summands.shift, summands.offset, alpha=-1)
    return gradient.index_add_(0, summands.latents, summands.extra)


def adam_rows(parameter: Tensor, moments: Moments, gradient: Tensor, adam: AdamStep, unit_rows: bool) -> None:
    """One step of `parameter`, of any shape, in place, by a gradient of the same shape; `unit_rows` of a matrix."""
    if unit_rows:
        gradient = gradient - (gradient * parameter).sum(dim=1, keepdim=True) * parameter
    moments.exp_avg.lerp_(gradient, 1 - adam.beta1)
    moments.exp_avg_sq.mul_(adam.beta2).addcmul_(gradient, gradient, value=1 - adam.beta2)
    denominator = moments.exp_avg_sq.sqrt().mul_(adam.correction2).add_(adam.eps)
    parameter.addcdiv_(moments.exp_avg, denominator, value=-adam.lr * adam.correction1)
    if unit_rows:
        parameter.div_(parameter.norm(dim=1, keepdim=True))
    # Has to come last: the average is of the weights that are in use.
    moments.average.lerp_(parameter, 1 - adam.decay)


def _tokens(n_latents: int) -> int:
    """Rows of a matrix with n_latents columns that are held at a time."""
    return max(1, ENTRIES // n_latents)


def _latents(starts: Tensor, size: int) -> Tensor:
    """int64 [size]: the latent of each pair; n_latents for those beyond starts[-1]."""
    return torch.searchsorted(starts[1:], torch.arange(size, device=starts.device), right=True)
