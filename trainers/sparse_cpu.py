"""CPU kernels of the sparse algebra (numba). Everything here touches k of the N latents of a token.

Rows are shared out over threads whole (a token, or a latent), and the contributions to a latent are summed in the
order of the tokens, so results do not depend on the number of threads. The GIL is released, so that the stream's
prefetch thread reads on meanwhile.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

# Reassociation lets the dot products use vector registers; NaN and infinity keep their meaning, so that
# a diverged cell is noticed.
_FAST = {"contract", "reassoc", "nsz", "arcp"}


@njit(parallel=True, nogil=True, cache=True)
def select(bits: np.ndarray, k: int, group: int, indices: np.ndarray) -> None:
    """Exact two-level top-k of the positive entries: bits [batch, n] -> indices [batch, k], -1 where there are fewer.

    `bits` are bfloat16 or float32 pre-activations seen as int16 or int32: for positive floats the order is the same,
    and negative ones, which ReLU would set to zero, are negative integers. First level: the k largest
    entries lie in the k groups with the largest maxima, so the k-th largest maximum bounds them from below.
    Ties go to the lower index.
    """
    batch, n = bits.shape
    whole = n // group
    groups = whole + (1 if n % group else 0)
    for b in prange(batch):
        row = bits[b]
        maxima = np.empty(groups, bits.dtype)
        for g in range(groups):
            top = row[g * group]
            for i in range(g * group + 1, min(g * group + group, n)):
                top = max(top, row[i])
            maxima[g] = top
        bound = bits.dtype.type(1)
        if groups > k:
            bound = max(bound, np.partition(maxima, groups - k)[groups - k])

        found = 0
        candidates = np.empty(n, np.int32)
        values = np.empty(n, bits.dtype)
        for g in range(groups):
            if maxima[g] >= bound:
                for i in range(g * group, min(g * group + group, n)):
                    if row[i] >= bound:
                        candidates[found] = i
                        values[found] = row[i]
                        found += 1

        kept = 0
        if found <= k:
            for i in range(found):
                indices[b, i] = candidates[i]
            kept = found
        else:
            smallest = np.partition(values[:found], found - k)[found - k]
            ties = k
            for i in range(found):
                if values[i] > smallest:
                    ties -= 1
            for i in range(found):
                if values[i] > smallest:
                    indices[b, kept] = candidates[i]
                    kept += 1
                elif values[i] == smallest and ties > 0:
                    indices[b, kept] = candidates[i]
                    kept += 1
                    ties -= 1
        for i in range(kept, k):
            indices[b, i] = -1


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


@njit(parallel=True, fastmath=_FAST, nogil=True, cache=True)
def residual(
    x: np.ndarray, indices: np.ndarray, z: np.ndarray, W_dec: np.ndarray, offset: np.ndarray, error: np.ndarray
) -> None:
    """error[b] = x[b] - offset - sum_j z[b, j] W_dec[indices[b, j]]: decode and compare, [batch, d_model]."""
    batch, k = indices.shape
    d_model = x.shape[1]
    for b in prange(batch):
        for i in range(d_model):
            error[b, i] = x[b, i] - offset[i]
        for j in range(k):
            value = z[b, j]
            if value != 0:
                n = indices[b, j]
                for i in range(d_model):
                    error[b, i] -= value * W_dec[n, i]


@njit(parallel=True, fastmath=_FAST, nogil=True, cache=True)
def latent_gradients(
    error: np.ndarray, scale: float, indices: np.ndarray, z: np.ndarray, W_dec: np.ndarray, dz: np.ndarray
) -> None:
    """dz[b, j] = scale * error[b] . W_dec[indices[b, j]] where z[b, j] > 0, else 0 (ReLU): [batch, k]."""
    batch, k = indices.shape
    d_model = error.shape[1]
    for b in prange(batch):
        for j in range(k):
            total = np.float32(0)
            if z[b, j] > 0:
                n = indices[b, j]
                for i in range(d_model):
                    total += error[b, i] * W_dec[n, i]
            dz[b, j] = np.float32(scale) * total


class ByLatent(NamedTuple):
    """The active (token, latent) pairs sorted by latent, then by token: the transpose of `indices`."""

    starts: Any  # int64 [n_latents + 1]: pairs of latent n are starts[n]:starts[n + 1]
    tokens: Any  # int32 [pairs]
    z: Any  # float32 [pairs]
    dz: Any  # float32 [pairs]


@njit(nogil=True, cache=True)
def transpose(indices: np.ndarray, z: np.ndarray, dz: np.ndarray, n_latents: int) -> ByLatent:
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
    values = np.empty(pairs, np.float32)
    gradients = np.empty(pairs, np.float32)
    for b in range(batch):
        for j in range(k):
            if z[b, j] > 0:
                n = indices[b, j]
                p = position[n]
                position[n] += 1
                tokens[p] = b
                values[p] = z[b, j]
                gradients[p] = dz[b, j]
    return ByLatent(starts, tokens, values, gradients)


@njit(parallel=True, fastmath=_FAST, nogil=True, cache=True)
def weight_gradients(
    pairs: ByLatent,
    error: np.ndarray,
    scale: float,
    x: np.ndarray,
    grad_W_dec: np.ndarray,
    grad_W_enc: np.ndarray,
    grad_b_enc: np.ndarray,
) -> None:
    """The sparse-transposed products. For every latent n and its pairs (n, token b) with values z and dz it adds
    scale z error[b] to grad_W_dec[n], dz x[b] to grad_W_enc[n], and dz to grad_b_enc[n].

    error and x are [batch, d_model], the gradients [n_latents, d_model] and [n_latents].
    """
    n_latents, d_model = grad_W_dec.shape
    for n in prange(n_latents):
        for p in range(pairs.starts[n], pairs.starts[n + 1]):
            b = pairs.tokens[p]
            value = np.float32(scale) * pairs.z[p]
            gradient = pairs.dz[p]
            grad_b_enc[n] += gradient
            for i in range(d_model):
                grad_W_dec[n, i] += value * error[b, i]
                grad_W_enc[n, i] += gradient * x[b, i]


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
