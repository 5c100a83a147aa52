"""The sparse algebra on CUDA devices of capability 8.0 and later (Triton; see trainers/kernels/interface.py).

Nothing makes the host wait for the device, and nothing adds with atomics: what a kernel returns is the same at every
call. Offsets are 64-bit wherever n_latents * d_model or pairs * d_model come in.

The encoder product is cuBLAS's, and group maxima are taken in one more pass over its result: by arithmetic, reading
that once (bfloat16, d_model = 768) costs a quarter of the product, about what a Triton product with the maxima in its
epilogue would lose to cuBLAS, and it works for every shape and type.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from saescale.trainers.kernels.eager import gradient_by_z, select_above, transpose
from saescale.trainers.kernels.interface import (
    AdamStep,
    Decoded,
    Moments,
    Pairs,
    Selected,
    Summands,
    group_size,
    product_rows,
)

__all__ = [
    "decode", "encode_select", "gradient_by_z", "latent_sums", "select_above", "transpose", "update_rows",
]  # fmt: skip

_PIECES = 2**13  # at most, of the segments that are summed apart from the rest
PIECE = 512  # pairs, at least, of such a piece
_TILE = 4096  # entries of rows of d_model that a program loads at once: enough are on their way to hide the latency


def encode_select(x: Tensor, W_enc: Tensor, bias: Tensor, ks: Sequence[int]) -> list[Selected]:
    batch, n_latents = len(x), len(W_enc)
    selections = [
        Selected(torch.empty(batch, k, dtype=torch.int32, device=x.device), bias.new_empty(batch, k)) for k in ks
    ]
    group = group_size(n_latents, max(ks))
    groups = triton.cdiv(n_latents, group)
    stride = triton.cdiv(n_latents, 64) * 64  # so that every row starts where wide loads can
    rows = product_rows(batch, n_latents, "cuda")
    pre = x.new_empty(rows, stride)[:, :n_latents]
    maxima = torch.empty(rows, groups, dtype=torch.int32, device=x.device)
    largest = torch.empty(rows, max(ks), dtype=torch.int32, device=x.device)
    tile = min(triton.next_power_of_2(groups), max(1, 2048 // group))
    tiles = triton.cdiv(groups, tile)
    with torch.cuda.device_of(x):
        for start in range(0, batch, rows):
            part = slice(start, min(start + rows, batch))
            size = part.stop - start
            torch.mm(x[part], W_enc.detach().T, out=pre[:size])
            _maxima[(size * tiles,)](
                pre, stride, bias, maxima, n_latents, groups, tiles, GROUP=group, GROUPS=tile, num_warps=4
            )  # fmt: skip
            for indices, z in selections:
                _select(pre, bias, maxima, largest, group, Selected(indices[part], z[part]))
    return selections


def decode(x: Tensor, offset: Tensor, selected: Selected, W_dec: Tensor, scale: float | None, error: Tensor) -> Decoded:
    (batch, d_model), k = x.shape, selected.z.shape[1]
    squared = torch.empty(batch, dtype=torch.float64, device=x.device)
    dz = torch.empty_like(selected.z) if scale is not None else None
    block, tile, warps = _row_tile(d_model)
    with torch.cuda.device_of(x):
        _decode[(batch,)](
            x, offset, selected.indices, selected.z, W_dec, scale or 0.0, error, squared, dz,
            k, len(W_dec), d_model, ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return Decoded(squared.sum(), x.new_empty(batch, 0) if dz is None else dz)


def latent_sums(pairs: Pairs) -> Tensor:
    sums = pairs.encoder.new_empty(len(pairs.starts) - 1)
    with torch.cuda.device_of(sums):
        _latent_sums[(len(sums),)](pairs.starts, pairs.encoder, sums, BLOCK=256, num_warps=1)
    return sums


def update_rows(
    parameter: Tensor, moments: Moments, gradient: Summands, adam: AdamStep, unit_rows: bool, operand: Tensor | None
) -> None:
    starts, rows, weights, sources, shift, offset, latents, extra = gradient
    n_latents, d_model = parameter.shape
    extra_of = None
    if len(latents):
        numbers = torch.arange(len(latents), dtype=torch.int32, device=latents.device)
        extra_of = torch.full((n_latents,), -1, dtype=torch.int32, device=latents.device)
        extra_of.index_copy_(0, latents, numbers)
    # Follows from shapes alone: how many pairs a latent has is known on the device only.
    piece = max(PIECE, triton.cdiv(len(rows), _PIECES))
    block, tile, warps = _row_tile(d_model)
    with torch.cuda.device_of(parameter):
        before, partial = _sums_of_pieces(gradient, piece)
        _update[(n_latents,)](
            parameter, *moments, None if operand is None else operand.view(torch.int16),
            starts, rows, weights, sources, len(sources), before, partial, piece,
            shift, offset, extra_of, extra, d_model,
            adam.lr * adam.correction1, adam.beta1, 1 - adam.beta1, adam.beta2, 1 - adam.beta2, adam.eps,
            adam.correction2, adam.decay, 1 - adam.decay,
            UNIT_ROWS=unit_rows, ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def _sums_of_pieces(gradient: Summands, piece: int) -> tuple[Tensor | None, Tensor | None]:
    """Sums over whole pieces of the segments, so that no program has a long one to itself.

    A latent that is active on every token would otherwise keep one program busy long after all others. Each segment
    gives as many pieces of `piece` pairs as it holds, from its start on; what remains of it is left to `_update`.
    Returns `before` [n_latents + 1], the pieces that come before a latent's, and their sums [pieces, d_model], of
    which no more than the first before[-1] are written; None and None where no segment can be that long.
    """
    starts, rows, weights, sources = gradient[:4]
    n_latents, d_model = len(starts) - 1, sources.shape[1]
    pieces = len(rows) // piece
    if pieces == 0:
        return None, None
    before = torch.zeros_like(starts)
    torch.cumsum(starts.diff() // piece, dim=0, out=before[1:])
    latents = torch.searchsorted(before[1:], torch.arange(pieces, device=starts.device), right=True)
    partial = sources.new_empty(pieces, d_model)
    block, tile, warps = _row_tile(d_model)
    _piece_sums[(pieces,)](
        latents, before, starts, rows, weights, sources, len(sources), partial, piece, n_latents, d_model,
        ROWS=tile, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return before, partial


def _select(pre: Tensor, bias: Tensor, maxima: Tensor, largest: Tensor, group: int, selected: Selected) -> None:
    """The k largest of pre [>= batch, n_latents] + bias, given its groups' maxima, to `selected` [batch, k]."""
    batch, k = selected.z.shape
    groups, block_k = maxima.shape[1], triton.next_power_of_2(k)
    block, warps = _line(groups)
    _largest_groups[(batch,)](maxima, largest, k, groups, BLOCK=block, BLOCK_K=block_k, num_warps=warps)
    block, warps = _line(block_k * group)
    _largest_entries[(batch,)](
        pre, pre.stride(0), bias, largest, selected.indices, selected.z, k, pre.shape[1],
        GROUP=group, BLOCK=block, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip


def _line(size: int) -> tuple[int, int]:
    """Block and warps for a program that holds `size` numbers in registers."""
    block = triton.next_power_of_2(size)
    return block, min(16, max(1, block // 512))


def _row_tile(d_model: int) -> tuple[int, int, int]:
    """Block for a row, rows that are loaded at once, and warps; a thread holds 32 numbers of them, 16 of a long row."""
    block = triton.next_power_of_2(d_model)
    rows = min(16, max(1, _TILE // block))
    return block, rows, min(32, max(1, rows * block // 1024, block // 512))


# --- kernels


@triton.jit
def _entry_bits(pre, bias, column, inside):
    """int32 bits of pre + bias: for positive numbers the order is the same, and negative ones are negative."""
    # The bias is added here, in float32: cuBLAS would round the sum to the product's type.
    value = tl.load(pre + column, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=inside, other=0.0)
    return tl.where(inside, value.to(tl.int32, bitcast=True), 0)


@triton.jit
def _k_largest(values, k):
    """Which of `values` (int32 [n]) are the k largest positive ones, ties to the lower position; and their places.

    Finds the largest number that at least k of them reach, bit by bit. Once exactly k reach one, that will do.
    """
    last = 0
    bit = 1 << 30
    while bit > 0:
        middle = last | bit
        count = tl.sum((values >= middle).to(tl.int32), axis=0)
        last = tl.where(count >= k, middle, last)
        bit = tl.where(count == k, 0, bit >> 1)
    last = tl.maximum(last, 1)
    above = values > last
    level = values == last
    room = k - tl.sum(above.to(tl.int32), axis=0)
    keep = above | (level & (tl.cumsum(level.to(tl.int32), axis=0) <= room))
    return keep, tl.cumsum(keep.to(tl.int32), axis=0) - 1


@triton.jit
def _maxima(pre, stride, bias, maxima, n_latents, groups, tiles, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """maxima[row, g] = max over the GROUP entries of a group of `_entry_bits`, for GROUPS groups."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    group = tl.program_id(0) % tiles * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    entries = _entry_bits(pre + row * stride, bias, column, column < n_latents)
    tl.store(maxima + row * groups + group, tl.max(entries, axis=1), mask=group < groups)


@triton.jit
def _largest_groups(maxima, largest, k, groups, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The k groups of a row with the largest positive maxima, ascending, then -1: the k largest entries are theirs.

    That holds for ties too, since they go to the lower group here and the lower entry there.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK)
    values = tl.load(maxima + row * groups + group, mask=group < groups, other=0)
    keep, place = _k_largest(values, k)
    tl.store(largest + row * k + place, group, mask=keep)
    unused = tl.arange(0, BLOCK_K)
    count = tl.sum(keep.to(tl.int32), axis=0)
    tl.store(largest + row * k + unused, -1, mask=(unused >= count) & (unused < k))


@triton.jit
def _largest_entries(
    pre, stride, bias, largest, indices, z, k, n_latents,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Writes a row of `indices` and `z` from the entries of its `largest` groups, then -1 and 0."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    group = tl.load(largest + row * k + position // GROUP, mask=position // GROUP < k, other=-1)
    column = group * GROUP + position % GROUP
    values = _entry_bits(pre + row * stride, bias, column, (group >= 0) & (column < n_latents))
    keep, place = _k_largest(values, k)
    tl.store(indices + row * k + place, column, mask=keep)
    tl.store(z + row * k + place, values.to(tl.float32, bitcast=True), mask=keep)
    unused = tl.arange(0, BLOCK_K)
    count = tl.sum(keep.to(tl.int32), axis=0)
    empty = (unused >= count) & (unused < k)
    tl.store(indices + row * k + unused, -1, mask=empty)
    tl.store(z + row * k + unused, 0.0, mask=empty)


@triton.jit
def _add_rows(total, first, end, rows, weights, sources, n_sources, d_model, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """total [BLOCK] + sum over pairs first:end of weights[pair] sources[rows[pair] % n_sources]; -1 is a row of 0."""
    column = tl.arange(0, BLOCK)
    inside = column < d_model
    for start in range(first, end, ROWS):
        pair = start + tl.arange(0, ROWS)
        here = pair < end
        row = tl.load(rows + pair, mask=here, other=-1)
        weight = tl.load(weights + pair, mask=here, other=0.0)
        at = (row % n_sources).to(tl.int64)[:, None] * d_model + column[None, :]
        values = tl.load(sources + at, mask=(row >= 0)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(weight[:, None] * values, axis=0)
    return total


@triton.jit
def _decode(
    x, offset, indices, z, W_dec, scale, error, squared, dz, k, n_latents, d_model,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's error and its square in float64; dz where there is one, while the rows are in the cache."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d_model
    indices += token * k
    z += token * k
    x_hat = _add_rows(tl.zeros([BLOCK], tl.float32), 0, k, indices, z, W_dec, n_latents, d_model, ROWS, BLOCK)
    left = tl.load(x + token * d_model + column, mask=inside, other=0.0)
    left = left - tl.load(offset + column, mask=inside, other=0.0) - x_hat
    tl.store(error + token * d_model + column, left, mask=inside)
    exact = left.to(tl.float64)
    tl.store(squared + token, tl.sum(exact * exact, axis=0))
    if dz is not None:
        for start in range(0, k, ROWS):
            pair = start + tl.arange(0, ROWS)
            latent = tl.load(indices + pair, mask=pair < k, other=-1)
            active = tl.load(z + pair, mask=pair < k, other=0.0) > 0
            at = latent.to(tl.int64)[:, None] * d_model + column[None, :]
            rows = tl.load(W_dec + at, mask=active[:, None] & inside[None, :], other=0.0)
            dots = scale * tl.sum(rows * left[None, :], axis=1)
            # A sum that is not finite would come through a row of 0.
            tl.store(dz + token * k + pair, tl.where(active, dots, 0.0), mask=pair < k)


@triton.jit
def _latent_sums(starts, values, sums, BLOCK: tl.constexpr):
    """sums[latent]: BLOCK running sums, which are then added up."""
    latent = tl.program_id(0)
    end = tl.load(starts + latent + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.load(starts + latent), end, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        total += tl.load(values + pair, mask=pair < end, other=0.0)
    tl.store(sums + latent, tl.sum(total, axis=0))


@triton.jit
def _piece_sums(
    latents, before, starts, rows, weights, sources, n_sources, partial, piece, n_latents, d_model,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[number]: the sum over one piece of the segment of latents[number]."""
    number = tl.program_id(0).to(tl.int64)
    latent = tl.load(latents + number)
    # There are as many programs as there could be pieces.
    if latent < n_latents:
        first = tl.load(starts + latent) + (number - tl.load(before + latent)) * piece
        total = tl.zeros([BLOCK], tl.float32)
        total = _add_rows(total, first, first + piece, rows, weights, sources, n_sources, d_model, ROWS, BLOCK)
        column = tl.arange(0, BLOCK)
        tl.store(partial + number * d_model + column, total, mask=column < d_model)


@triton.jit
def _update(
    parameter, exp_avg, exp_avg_sq, average, operand,
    starts, rows, weights, sources, n_sources, before, partial, piece, shift, offset, extra_of, extra, d_model,
    rate, beta1, rest1, beta2, rest2, eps, correction2, decay, rest,
    UNIT_ROWS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row: its gradient, projection, Adam, renormalisation, average, rounding; the gradient stays in registers."""
    latent = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d_model
    at = latent * d_model + column

    grad = tl.zeros([BLOCK], tl.float32)
    first = tl.load(starts + latent)
    if partial is not None:
        for number in range(tl.load(before + latent), tl.load(before + latent + 1)):
            grad += tl.load(partial + number * d_model + column, mask=inside, other=0.0)
            first += piece
    end = tl.load(starts + latent + 1)
    grad = _add_rows(grad, first, end, rows, weights, sources, n_sources, d_model, ROWS, BLOCK)
    if shift is not None:
        grad -= tl.load(shift + latent) * tl.load(offset + column, mask=inside, other=0.0)
    if extra_of is not None:
        row = tl.load(extra_of + latent).to(tl.int64)
        grad += tl.load(extra + row * d_model + column, mask=inside & (row >= 0), other=0.0)

    w = tl.load(parameter + at, mask=inside, other=0.0)
    if UNIT_ROWS:
        grad -= tl.sum(grad * w, axis=0) * w
    m = beta1 * tl.load(exp_avg + at, mask=inside, other=0.0) + rest1 * grad
    v = beta2 * tl.load(exp_avg_sq + at, mask=inside, other=0.0) + rest2 * grad * grad
    w -= tl.div_rn(rate * m, tl.sqrt_rn(v) * correction2 + eps)
    if UNIT_ROWS:
        w = tl.div_rn(w, tl.sqrt_rn(tl.sum(tl.where(inside, w * w, 0.0), axis=0)))
    # Has to come last: the average is of the weights that are in use.
    mean = decay * tl.load(average + at, mask=inside, other=0.0) + rest * w
    tl.store(parameter + at, w, mask=inside)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(average + at, mean, mask=inside)
    if operand is not None:
        # To nearest, ties to even, as torch rounds. In integers, since Triton's interpreter truncates.
        bits = w.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(operand + at, tl.where(w == w, rounded, 0x7FC0).to(tl.int16), mask=inside)
