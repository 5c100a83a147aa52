"""CPU kernels of the sparse algebra (numba). Everything here touches k of the N latents of a token.

Rows are shared out over threads whole (a token, or a latent), and the contributions to a latent are summed in the
order of the tokens, so what a kernel returns does not depend on the number of threads. (torch's products, which stand
between the kernels, make no such promise.) The GIL is released, so that the stream's prefetch thread reads on
meanwhile.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

# Reassociation lets the dot products use vector registers; NaN and infinity keep their meaning, so that
# a diverged cell is noticed.
_FAST = {"contract", "reassoc", "nsz", "arcp"}
_CHUNK = 16  # rows that share a thread's buffers


@njit(parallel=True, nogil=True, cache=True)
def select(bits: np.ndarray, k: int, group: int, indices: np.ndarray, values: np.ndarray) -> None:
    """Exact two-level top-k of the positive entries of each row of `bits` [batch, n].

    `bits` are bfloat16 or float32 pre-activations seen as int16 or int32: for positive floats the order is the same,
    and negative ones, which ReLU would set to zero, are negative integers. Writes `indices` [batch, k], in no
    particular order, and the entries themselves to `values` [batch, k], of the type of `bits`; -1 and 0 where fewer
    than k are positive. Ties go to the lower index.

    First level: if k groups of entries have maxima that reach a bound, the k largest entries reach it too, and only
    groups whose maximum does can hold them. The `group` entries of a group stand a fixed stride apart, so that the
    maxima of neighbouring groups come from one vector operation.
    """
    batch, n = bits.shape
    groups = -(-n // group)
    for chunk in prange(-(-batch // _CHUNK)):
        maxima = np.empty(groups, bits.dtype)
        candidates = np.empty(n, np.int32)
        entries = np.empty(n, bits.dtype)
        for b in range(chunk * _CHUNK, min(chunk * _CHUNK + _CHUNK, batch)):
            row = bits[b]
            for g in range(groups):
                maxima[g] = row[g]
            for first in range(groups, n, groups):
                part = row[first : first + groups]
                for g in range(len(part)):
                    maxima[g] = max(maxima[g], part[g])
            top = np.int64(0)
            for g in range(groups):
                top = max(top, np.int64(maxima[g]))
            bound = bits.dtype.type(_threshold(maxima, k, top, k // 8))

            found = 0
            for g in range(groups):
                if maxima[g] >= bound:
                    for i in range(g, n, groups):
                        # Without a branch: it would be mispredicted at nearly every entry that is kept.
                        candidates[found] = i
                        entries[found] = row[i]
                        found += row[i] >= bound

            last = bits.dtype.type(_threshold(entries[:found], k, top, 0))
            reaching = 0
            for i in range(found):
                reaching += entries[i] >= last
            kept = 0
            for i in range(found):
                if entries[i] > last or (entries[i] == last and reaching <= k):
                    indices[b, kept] = candidates[i]
                    values[b, kept] = entries[i]
                    kept += 1
            if reaching > k:
                for i in range(n):
                    if row[i] == last and kept < k:
                        indices[b, kept] = i
                        values[b, kept] = last
                        kept += 1
            for i in range(kept, k):
                indices[b, i] = -1
                values[b, i] = 0


@njit(nogil=True, cache=True)
def _threshold(values: np.ndarray, k: int, top: int, slack: int) -> int:
    """By bisection, a number that at least k and at most k + slack of `values` (integers up to `top`) reach.

    Where ties make that impossible it is the largest number that at least k reach; 1 where fewer than k are positive
    or there are no more than k values. Counting is all vector operations, where a partition would branch.
    """
    low, high = 1, top + 1
    if len(values) <= k:
        return low
    while high - low > 1:
        middle = low + (high - low) // 2
        bound = values.dtype.type(middle)
        count = np.int32(0)
        for i in range(len(values)):
            count = np.int32(count + (values[i] >= bound))
        if count < k:
            high = middle
        else:
            low = middle
            if count <= k + slack:
                break
    return low


@njit(parallel=True, fastmath=_FAST, nogil=True, cache=True)
def activations(x: np.ndarray, W_enc: np.ndarray, bias: np.ndarray, indices: np.ndarray, z: np.ndarray) -> None:
    """z[b, j] = ReLU(W_enc[i] . x[b] + bias[i]) in float32 for i = indices[b, j]; 0 where the index is -1."""
    batch, k = indices.shape
    d_model = x.shape[1]
    for b in prange(batch):
        for j in range(k):
            n = indices[b, j]
            total = np.float32(0)
            if n >= 0:
                for i in range(d_model):
                    total += W_enc[n, i] * x[b, i]
                total += bias[n]
            # Not max(): NaN has to stay NaN, or a diverged cell would look like one with no active latent.
            z[b, j] = np.float32(0) if total <= 0 else total


@njit(fastmath=_FAST, nogil=True, cache=True)
def _add_rows(out: np.ndarray, weights: np.ndarray, rows: np.ndarray, indices: np.ndarray) -> None:
    """out [d_model] += sum_j weights[j] * rows[indices[j]], eight rows at a time so that `out` is passed over less."""
    whole = len(indices) // 8 * 8
    for j in range(0, whole, 8):
        w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        w4, w5, w6, w7 = weights[j + 4], weights[j + 5], weights[j + 6], weights[j + 7]
        r0, r1, r2, r3 = rows[indices[j]], rows[indices[j + 1]], rows[indices[j + 2]], rows[indices[j + 3]]
        r4, r5, r6, r7 = rows[indices[j + 4]], rows[indices[j + 5]], rows[indices[j + 6]], rows[indices[j + 7]]
        for i in range(len(out)):
            low = (w0 * r0[i] + w1 * r1[i]) + (w2 * r2[i] + w3 * r3[i])
            high = (w4 * r4[i] + w5 * r5[i]) + (w6 * r6[i] + w7 * r7[i])
            out[i] += low + high
    for j in range(whole, len(indices)):
        weight, row = weights[j], rows[indices[j]]
        for i in range(len(out)):
            out[i] += weight * row[i]


@njit(parallel=True, fastmath=_FAST, nogil=True, cache=True)
def decode(
    x: np.ndarray,
    indices: np.ndarray,
    z: np.ndarray,
    W_dec: np.ndarray,
    offset: np.ndarray,
    error: np.ndarray,
    squared: np.ndarray,
    scale: float,
    dz: np.ndarray,
) -> None:
    """error[b] = x[b] - offset - sum_j z[b, j] W_dec[indices[b, j]] [batch, d_model]; squared[b] = ||error[b]||^2 in
    float64; dz[b, j] = scale * error[b] . W_dec[indices[b, j]] where z[b, j] > 0, else 0 (ReLU).

    A `dz` of [batch, 0] asks for no gradients. One kernel for both, since a token's decoder rows are still in the
    cache after its error was computed.
    """
    batch, k = indices.shape
    d_model = x.shape[1]
    for b in prange(batch):
        row = error[b]
        for i in range(d_model):
            row[i] = 0
        # An index of -1 stands for the last row, with a weight of 0.
        _add_rows(row, z[b], W_dec, indices[b])
        total = 0.0
        for i in range(d_model):
            row[i] = x[b, i] - offset[i] - row[i]
            total += np.float64(row[i]) * np.float64(row[i])
        squared[b] = total
        for j in range(0, dz.shape[1], 4):
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


class ByLatent(NamedTuple):
    """The active (token, latent) pairs sorted by latent, then by token: the transpose of `indices`."""

    starts: Any  # int64 [n_latents + 1]: pairs of latent n are starts[n]:starts[n + 1]
    tokens: Any  # int32 [pairs]
    scaled_z: Any  # float32 [pairs]: scale * z, the weight of error[token] in the gradient of W_dec
    dz: Any  # float32 [pairs]: the weight of x[token] in the gradient of W_enc


@njit(nogil=True, cache=True)
def transpose(indices: np.ndarray, z: np.ndarray, dz: np.ndarray, scale: float, n_latents: int) -> ByLatent:
    """Counting sort of the active pairs of [batch, k] arrays by latent. Pairs with z = 0 have no gradient and go."""
    batch, k = indices.shape
    starts = np.zeros(n_latents + 1, np.int64)
    for b in range(batch):
        for j in range(k):
            if z[b, j] > 0:
                starts[indices[b, j] + 1] += 1
    for n in range(n_latents):
        starts[n + 1] += starts[n]
    position = starts[:-1].copy()
    pairs = starts[n_latents]
    tokens = np.empty(pairs, np.int32)
    scaled_z = np.empty(pairs, np.float32)
    gradients = np.empty(pairs, np.float32)
    for b in range(batch):
        for j in range(k):
            if z[b, j] > 0:
                n = indices[b, j]
                p = position[n]
                position[n] += 1
                tokens[p] = b
                scaled_z[p] = np.float32(scale) * z[b, j]
                gradients[p] = dz[b, j]
    return ByLatent(starts, tokens, scaled_z, gradients)


@njit(parallel=True, fastmath=_FAST, nogil=True, cache=True)
def weight_gradients(
    pairs: ByLatent,
    error: np.ndarray,
    x: np.ndarray,
    offset: np.ndarray,
    fresh: bool,
    grad_W_dec: np.ndarray,
    grad_W_enc: np.ndarray,
    grad_b_enc: np.ndarray,
) -> None:
    """The sparse-transposed products. Latent n gets, summed over its pairs (n, token b), scale z error[b] in
    grad_W_dec[n], dz (x[b] - offset) in grad_W_enc[n], and dz in grad_b_enc[n].

    error and x are [batch, d_model], the gradients [n_latents, d_model] and [n_latents]; they are overwritten when
    `fresh`, else added to.
    """
    starts, tokens, scaled_z, dz = pairs
    n_latents, d_model = grad_W_dec.shape
    # Two passes, since `error` and `x` do not fit into the second-level cache together.
    for n in prange(n_latents):
        start, end = starts[n], starts[n + 1]
        if fresh:
            for i in range(d_model):
                grad_W_dec[n, i] = 0
        _add_rows(grad_W_dec[n], scaled_z[start:end], error, tokens[start:end])
    for n in prange(n_latents):
        start, end = starts[n], starts[n + 1]
        if fresh:
            grad_b_enc[n] = 0
            for i in range(d_model):
                grad_W_enc[n, i] = 0
        _add_rows(grad_W_enc[n], dz[start:end], x, tokens[start:end])
        total = np.float32(0)
        for p in range(start, end):
            total += dz[p]
        grad_b_enc[n] += total
        for i in range(d_model):
            grad_W_enc[n, i] -= total * offset[i]


@njit(parallel=True, fastmath=_FAST, nogil=True, cache=True)
def adam(
    param: np.ndarray,
    grad: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    average: np.ndarray,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    correction2: float,
    decay: float,
    unit_rows: bool,
) -> None:
    """One pass over a parameter [rows, d_model]: project, Adam, renormalise, EMA, in place.

    With `unit_rows` the gradient is projected off each unit row first and the row is renormalised after the step.
    `correction1` = 1 / (1 - beta1^t), `correction2` = 1 / sqrt(1 - beta2^t).
    """
    rows, d_model = param.shape
    rate = np.float32(lr * correction1)
    root = np.float32(correction2)
    b1, b2, small, keep = np.float32(beta1), np.float32(beta2), np.float32(eps), np.float32(decay)
    one = np.float32(1)
    for n in prange(rows):
        along = np.float32(0)
        if unit_rows:
            for i in range(d_model):
                along += grad[n, i] * param[n, i]
        square = np.float32(0)
        for i in range(d_model):
            g = grad[n, i] - along * param[n, i]
            m = b1 * exp_avg[n, i] + (one - b1) * g
            v = b2 * exp_avg_sq[n, i] + (one - b2) * g * g
            exp_avg[n, i] = m
            exp_avg_sq[n, i] = v
            w = param[n, i] - rate * m / (np.sqrt(v) * root + small)
            param[n, i] = w
            square += w * w
        # Has to come after the step, and the EMA after both: it averages the weights that are in use.
        inverse = one / np.sqrt(square) if unit_rows else one
        for i in range(d_model):
            w = param[n, i] * inverse
            param[n, i] = w
            average[n, i] = keep * average[n, i] + (one - keep) * w
