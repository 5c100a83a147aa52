"""The sparse algebra on CPUs (numba; see interface.py). Everything but the product touches k of N latents.

Rows are shared out over threads whole (a token, or a latent), and the contributions to a latent are summed in the
order of the tokens, so what a kernel returns does not depend on the number of threads. (torch's products, which stand
between the kernels, make no such promise.) The GIL is released, so that the stream's prefetch thread reads on
meanwhile.
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from saescale.trainers.kernels.cpu_select import CHUNK, copy_columns, count_above, place_above, select_rows, to_bits
from saescale.trainers.kernels.interface import (
    AdamStep,
    Decoded,
    Kept,
    Moments,
    Pairs,
    Selected,
    Summands,
    Term,
    product_rows,
)

# Reassociation lets the dot products use vector registers; NaN and infinity keep their meaning, so that
# a diverged cell is noticed.
_FAST = {"contract", "reassoc", "nsz", "arcp"}


class _Scratch(threading.local):
    """Memory that each thread uses again at every call: a fresh allocation costs a tenth of the product."""

    memory = torch.empty(0, dtype=torch.uint8)

    def pre_activations(self, rows: int, n_latents: int, dtype: torch.dtype) -> Tensor:
        """[rows, n_latents], with whatever is in it."""
        size = rows * n_latents * dtype.itemsize
        if self.memory.numel() < size:
            self.memory = torch.empty(size, dtype=torch.uint8)
        return self.memory[:size].view(dtype).view(rows, n_latents)


_scratch = _Scratch()


def encode_select(
    x: Tensor, W_enc: Tensor, bias: Tensor, ks: Sequence[int], kept: Kept | None = None
) -> list[Selected]:
    batch, n_latents = len(x), len(W_enc)
    rows = product_rows(batch, n_latents, "cpu")
    buffer = _scratch.pre_activations(rows, n_latents, x.dtype)
    selections = [Selected(torch.empty(batch, k, dtype=torch.int32), torch.empty(batch, k)) for k in ks]
    for start in range(0, batch, rows):
        part = slice(start, min(start + rows, batch))
        pre = torch.mm(x[part], W_enc.detach().T, out=buffer[: part.stop - start])
        for selected, k in zip(selections, ks, strict=True):
            # Few enough entries per group, and enough groups for the bound to be tight.
            group = max(1, min(16, n_latents // (8 * k)))
            select_rows(_bits(pre), _array(bias), group, _array(selected.indices[part]), _array(selected.z[part]))
        if kept is not None:
            copy_columns(_bits(pre), _array(kept.latents), _bits(kept.pre[part]))
    return selections


def select(pre: Tensor, bias: Tensor, k: int) -> Selected:
    selected = Selected(torch.empty(len(pre), k, dtype=torch.int32), torch.empty(len(pre), k))
    # In groups of one, so that indices ascend but for ties.
    select_rows(_bits(pre), _array(bias), 1, _array(selected.indices), _array(selected.z))
    return selected


def select_above(x: Tensor, W_enc: Tensor, bias: Tensor, threshold: Tensor, most: int) -> Selected | None:
    batch, n_latents = len(x), len(W_enc)
    rows = product_rows(batch, n_latents, "cpu")
    buffer = _scratch.pre_activations(rows, n_latents, x.dtype)
    found, pairs = [], 0
    for start in range(0, batch, rows):
        part = slice(start, min(start + rows, batch))
        pre = _bits(torch.mm(x[part], W_enc.detach().T, out=buffer[: part.stop - start]))
        counts = np.empty(len(pre), np.int32)
        count_above(pre, _array(bias), _array(threshold), counts)
        pairs += int(counts.sum())
        if pairs > most:
            return None
        width = max(1, int(counts.max()))
        here = Selected(torch.empty(len(pre), width, dtype=torch.int32), torch.empty(len(pre), width))
        place_above(pre, _array(bias), _array(threshold), _array(here.indices), _array(here.z))
        found.append(here)
    width = max(here.z.shape[1] for here in found)
    pad = torch.nn.functional.pad
    return Selected(
        torch.cat([pad(here.indices, (0, width - here.z.shape[1]), value=-1) for here in found]),
        torch.cat([pad(here.z, (0, width - here.z.shape[1])) for here in found]),
    )


def decode(x: Tensor, offset: Tensor, selected: Selected, W_dec: Tensor, scale: float | None, error: Tensor) -> Decoded:
    squared = torch.empty(len(x), dtype=torch.float64)
    dz = torch.empty(len(x), 0 if scale is None else selected.z.shape[1])
    arrays = (_array(t) for t in (x, offset, selected.indices, selected.z, W_dec, error, squared, dz))
    _decode(*arrays, scale or 0.0)
    return Decoded(squared.sum(), dz)


def gradient_by_z(error: Tensor, indices: Tensor, W_dec: Tensor, scale: float) -> Tensor:
    dz = torch.empty(indices.shape)
    _gradient_by_z(_array(error), _array(indices), _array(W_dec), scale, _array(dz))
    return dz


def transpose(terms: Sequence[Term], n_latents: int) -> Pairs:
    arrays = [(_array(t.selected.indices), _array(t.selected.z), _array(t.dz), t.scale) for t in terms]
    starts = np.zeros(n_latents + 1, np.int64)
    for indices, z, _, _ in arrays:
        _count(indices, z, starts)
    np.cumsum(starts, out=starts)
    position, size = starts[:-1].copy(), int(starts[-1])
    rows, decoder, encoder = np.empty(size, np.int32), np.empty(size, np.float32), np.empty(size, np.float32)
    for number, (indices, z, dz, scale) in enumerate(arrays):
        _place(indices, z, dz, scale, number * len(indices), position, rows, decoder, encoder)
    return Pairs(*(torch.from_numpy(array) for array in (starts, rows, decoder, encoder)))


def latent_sums(pairs: Pairs) -> Tensor:
    out = torch.empty(len(pairs.starts) - 1)
    _latent_sums(_array(pairs.starts), _array(pairs.encoder), _array(out))
    return out


def update_rows(
    parameter: Tensor, moments: Moments, gradient: Summands, adam: AdamStep, unit_rows: bool, operand: Tensor | None
) -> None:
    n_latents = len(parameter)
    extra_of = np.full(n_latents if len(gradient.latents) else 0, -1, np.int32)
    extra_of[_array(gradient.latents)] = np.arange(len(gradient.latents))
    _update_rows(
        _array(parameter),
        *(_array(moment) for moment in moments),
        *(_array(t) for t in (gradient.starts, gradient.rows, gradient.weights, gradient.sources)),
        np.empty(0, np.float32) if gradient.shift is None else _array(gradient.shift),
        _array(gradient.offset),
        extra_of,
        _array(gradient.extra),
        # What remains of each decay is taken in float64: 1 - float32(0.99999) is off by more than a thousandth.
        tuple(np.float32(number) for number in (*adam, 1 - adam.beta1, 1 - adam.beta2, 1 - adam.decay)),
        unit_rows,
        np.empty((0, 0), np.uint16) if operand is None else _bits(operand),
    )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _bits(tensor: Tensor) -> np.ndarray:
    """float32 as it is; bfloat16, which numpy does not know, as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(np.uint16)
    return _array(tensor)


# --- kernels


@njit(fastmath=_FAST, nogil=True, cache=True)
def _add_rows(out: np.ndarray, weights: np.ndarray, rows: np.ndarray, indices: np.ndarray) -> None:
    """out [d_model] += sum_j weights[j] * rows[indices[j] % len(rows)], eight at a time: `out` is passed over less."""
    whole, count = len(indices) // 8 * 8, len(rows)
    for j in range(0, whole, 8):
        w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        w4, w5, w6, w7 = weights[j + 4], weights[j + 5], weights[j + 6], weights[j + 7]
        r0, r1 = rows[indices[j] % count], rows[indices[j + 1] % count]
        r2, r3 = rows[indices[j + 2] % count], rows[indices[j + 3] % count]
        r4, r5 = rows[indices[j + 4] % count], rows[indices[j + 5] % count]
        r6, r7 = rows[indices[j + 6] % count], rows[indices[j + 7] % count]
        for i in range(len(out)):
            low = (w0 * r0[i] + w1 * r1[i]) + (w2 * r2[i] + w3 * r3[i])
            high = (w4 * r4[i] + w5 * r5[i]) + (w6 * r6[i] + w7 * r7[i])
            out[i] += low + high
    for j in range(whole, len(indices)):
        weight, row = weights[j], rows[indices[j] % count]
        for i in range(len(out)):
            out[i] += weight * row[i]


@njit(nogil=True, cache=True)
def _used(indices: np.ndarray, z: np.ndarray) -> int:
    """How many entries of a row there are before those that fill it up, in whole eights as `_add_rows` takes them."""
    used = len(indices)
    while used > 0 and indices[used - 1] < 0 and z[used - 1] == 0:
        used -= 1
    return min(-(-used // 8) * 8, len(indices))


@njit(parallel=True, fastmath=_FAST, nogil=True, cache=True)
def _decode(
    x: np.ndarray,
    offset: np.ndarray,
    indices: np.ndarray,
    z: np.ndarray,
    W_dec: np.ndarray,
    error: np.ndarray,
    squared: np.ndarray,
    dz: np.ndarray,
    scale: float,
) -> None:
    """error[b] = x[b] - offset - sum_j z[b, j] W_dec[indices[b, j]] [batch, d_model]; squared[b] = ||error[b]||^2 in
    float64; dz[b, j] = scale * error[b] . W_dec[indices[b, j]] where z[b, j] > 0, else 0 (ReLU).

    One kernel for both, since a token's decoder rows are still in the cache after its error was computed.
    """
    batch, k = indices.shape
    d_model = x.shape[1]
    for b in prange(batch):
        row = error[b]
        for i in range(d_model):
            row[i] = 0
        used = _used(indices[b], z[b])
        # An index of -1 stands for the last row, with a weight of 0.
        _add_rows(row, z[b, :used], W_dec, indices[b, :used])
        total = 0.0
        for i in range(d_model):
            row[i] = x[b, i] - offset[i] - row[i]
            total += np.float64(row[i]) * np.float64(row[i])
        squared[b] = total
        for j in range(used, dz.shape[1]):
            dz[b, j] = 0
        for j in range(0, min(used, dz.shape[1]), 4):
            # Four at a time; past the end the last one is computed again.
            j1, j2, j3 = min(j + 1, k - 1), min(j + 2, k - 1), min(j + 3, k - 1)
            r0, r1 = W_dec[indices[b, j]], W_dec[indices[b, j1]]
            r2, r3 = W_dec[indices[b, j2]], W_dec[indices[b, j3]]
            dot0 = dot1 = dot2 = dot3 = np.float32(0)
            for i in range(d_model):
                dot0 += row[i] * r0[i]
                dot1 += row[i] * r1[i]
                dot2 += row[i] * r2[i]
                dot3 += row[i] * r3[i]
            dz[b, j] = np.float32(scale) * dot0 if z[b, j] > 0 else np.float32(0)
            dz[b, j1] = np.float32(scale) * dot1 if z[b, j1] > 0 else np.float32(0)
            dz[b, j2] = np.float32(scale) * dot2 if z[b, j2] > 0 else np.float32(0)
            dz[b, j3] = np.float32(scale) * dot3 if z[b, j3] > 0 else np.float32(0)


@njit(parallel=True, fastmath=_FAST, nogil=True, cache=True)
def _gradient_by_z(error: np.ndarray, indices: np.ndarray, W_dec: np.ndarray, scale: float, dz: np.ndarray) -> None:
    """dz[b, j] = scale * error[b] . W_dec[indices[b, j]]; 0 where the index is -1."""
    batch, k = indices.shape
    for b in prange(batch):
        row = error[b]
        for j in range(0, k, 4):
            j1, j2, j3 = min(j + 1, k - 1), min(j + 2, k - 1), min(j + 3, k - 1)
            last = max(max(indices[b, j], indices[b, j1]), max(indices[b, j2], indices[b, j3]))
            dot0 = dot1 = dot2 = dot3 = np.float32(0)
            if last >= 0:
                r0, r1 = W_dec[indices[b, j]], W_dec[indices[b, j1]]
                r2, r3 = W_dec[indices[b, j2]], W_dec[indices[b, j3]]
                for i in range(len(row)):
                    dot0 += row[i] * r0[i]
                    dot1 += row[i] * r1[i]
                    dot2 += row[i] * r2[i]
                    dot3 += row[i] * r3[i]
            dz[b, j] = np.float32(scale) * dot0 if indices[b, j] >= 0 else np.float32(0)
            dz[b, j1] = np.float32(scale) * dot1 if indices[b, j1] >= 0 else np.float32(0)
            dz[b, j2] = np.float32(scale) * dot2 if indices[b, j2] >= 0 else np.float32(0)
            dz[b, j3] = np.float32(scale) * dot3 if indices[b, j3] >= 0 else np.float32(0)


@njit(nogil=True, cache=True)
def _count(indices: np.ndarray, z: np.ndarray, starts: np.ndarray) -> None:
    """Adds the number of each latent's active pairs to starts [n_latents + 1], one place on."""
    batch, k = indices.shape
    for b in range(batch):
        for j in range(k):
            if z[b, j] > 0:
                starts[indices[b, j] + 1] += 1


@njit(nogil=True, cache=True)
def _place(
    indices: np.ndarray,
    z: np.ndarray,
    dz: np.ndarray,
    scale: float,
    first_row: int,
    position: np.ndarray,
    rows: np.ndarray,
    decoder: np.ndarray,
    encoder: np.ndarray,
) -> None:
    """The second pass of a counting sort: puts each active pair at its latent's next `position`."""
    batch, k = indices.shape
    for b in range(batch):
        for j in range(k):
            if z[b, j] > 0:
                n = indices[b, j]
                p = position[n]
                position[n] += 1
                rows[p] = first_row + b
                decoder[p] = np.float32(scale) * z[b, j]
                encoder[p] = dz[b, j]


@njit(nogil=True, cache=True)
def _latent_sums(starts: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    for n in range(len(out)):
        total = np.float32(0)
        for p in range(starts[n], starts[n + 1]):
            total += values[p]
        out[n] = total


@njit(parallel=True, fastmath=_FAST, nogil=True, cache=True)
def _update_rows(
    param: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    average: np.ndarray,
    starts: np.ndarray,
    rows: np.ndarray,
    weights: np.ndarray,
    sources: np.ndarray,
    shift: np.ndarray,
    offset: np.ndarray,
    extra_of: np.ndarray,
    extra: np.ndarray,
    adam: tuple[float, ...],
    unit_rows: bool,
    operand: np.ndarray,
) -> None:
    """Row by row: gradient, projection, Adam, renormalisation, EMA, rounding. Empty `shift`, `extra_of` [n_latents]
    and `operand` [n_latents, d_model] are left out; extra_of[n] is latent n's row of `extra`, or -1."""
    n_latents, d_model = param.shape
    lr, beta1, beta2, eps, correction1, correction2, decay, rest1, rest2, rest = adam
    rate, one = lr * correction1, np.float32(1)
    for chunk in prange(-(-n_latents // CHUNK)):
        grad = np.empty(d_model, np.float32)
        for n in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, n_latents)):
            start, end = starts[n], starts[n + 1]
            w, m, v, mean = param[n], exp_avg[n], exp_avg_sq[n], average[n]
            if len(extra_of) and extra_of[n] >= 0:
                grad[:] = extra[extra_of[n]]
            else:
                grad[:] = 0
            _add_rows(grad, weights[start:end], sources, rows[start:end])
            if len(shift):
                for i in range(d_model):
                    grad[i] -= shift[n] * offset[i]
            if unit_rows:
                along = np.float32(0)
                for i in range(d_model):
                    along += grad[i] * w[i]
                for i in range(d_model):
                    grad[i] -= along * w[i]
            square = np.float32(0)
            for i in range(d_model):
                g = grad[i]
                m[i] = beta1 * m[i] + rest1 * g
                v[i] = beta2 * v[i] + rest2 * g * g
                updated = w[i] - rate * m[i] / (np.sqrt(v[i]) * correction2 + eps)
                grad[i] = updated
                square += updated * updated
            # Has to come after the step, and the EMA after both: it averages the weights that are in use.
            inverse = one / np.sqrt(square) if unit_rows else one
            for i in range(d_model):
                updated = grad[i] * inverse
                w[i] = updated
                mean[i] = decay * mean[i] + rest * updated
            if len(operand):
                rounded = operand[n]
                for i in range(d_model):
                    bits = to_bits(w[i])
                    # To nearest, ties to even, as torch rounds.
                    rounded[i] = np.uint16((bits + np.int32(0x7FFF) + ((bits >> 16) & 1)) >> 16)
