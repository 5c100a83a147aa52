"""Which latents each token has, by numba: the k largest pre-activations of a row, or all above a threshold, in passes
that are vector operations."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

CHUNK = 16  # rows that share a thread's buffers


@intrinsic
def to_float(typingctx: Any, bits: Any) -> Any:
    """float32 of a bfloat16 (uint16), of the bits of a float32 (int32), or of a float32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (value,) = args
        if bits == types.uint16:
            value = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return value if bits == types.float32 else builder.bitcast(value, ir.FloatType())

    return types.float32(bits), code


@intrinsic
def to_bits(typingctx: Any, value: Any) -> Any:
    """The bits of a float32 as int32: for positive numbers the order is the same, and negative ones are negative."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), code


@njit(parallel=True, nogil=True, cache=True)
def select_rows(pre: np.ndarray, bias: np.ndarray, group: int, indices: np.ndarray, z: np.ndarray) -> None:
    """Exact two-level top-k of the positive entries of each row of pre + bias, `pre` [batch, n] float32 or bfloat16.

    Writes `indices` and `z` [batch, k], in no particular order; -1 and 0 where fewer than k are positive. Ties go to
    the lower index.

    First level: if k groups of entries have maxima that reach a bound, the k largest entries reach it too, and only
    groups whose maximum does can hold them. The `group` entries of a group stand a fixed stride apart, so that the
    maxima of neighbouring groups come from one vector operation.
    """
    batch, n = pre.shape
    k = indices.shape[1]
    groups = -(-n // group)
    for chunk in prange(-(-batch // CHUNK)):
        maxima = np.empty(groups, np.int32)
        candidates = np.empty(n, np.int32)
        entries = np.empty(n, np.int32)
        for b in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, batch)):
            row = pre[b]
            _group_maxima(row, bias, maxima)
            top = np.int32(0)
            for g in range(groups):
                top = max(top, maxima[g])
            bound = _threshold(maxima, k, top, k // 8)

            found = 0
            if group == 1:
                for g in range(groups):
                    candidates[found] = g
                    entries[found] = maxima[g]
                    found += maxima[g] >= bound
            for g in range(groups if group > 1 else 0):
                if maxima[g] >= bound:
                    for i in range(g, n, groups):
                        # Without a branch: it would be mispredicted at nearly every entry that is kept.
                        entry = to_bits(to_float(row[i]) + bias[i])
                        candidates[found] = i
                        entries[found] = entry
                        found += entry >= bound

            last = _threshold(entries[:found], k, top, 0)
            reaching = _reaching(entries[:found], last)
            kept = 0
            for i in range(found):
                if entries[i] > last or (entries[i] == last and reaching <= k):
                    indices[b, kept] = candidates[i]
                    z[b, kept] = to_float(entries[i])
                    kept += 1
            if reaching > k:
                for i in range(n):
                    if kept < k and to_bits(to_float(row[i]) + bias[i]) == last:
                        indices[b, kept] = i
                        z[b, kept] = to_float(last)
                        kept += 1
            for i in range(kept, k):
                indices[b, i] = -1
                z[b, i] = 0


@njit(parallel=True, nogil=True, cache=True)
def count_above(pre: np.ndarray, bias: np.ndarray, threshold: np.ndarray, counts: np.ndarray) -> None:
    """counts [batch]: entries of each row of pre + bias that exceed `threshold` [n]."""
    for b in prange(len(pre)):
        row = pre[b]
        count = np.int32(0)
        for i in range(len(row)):
            count += np.int32(1) if to_float(row[i]) + bias[i] > threshold[i] else np.int32(0)
        counts[b] = count


@njit(parallel=True, nogil=True, cache=True)
def place_above(pre: np.ndarray, bias: np.ndarray, threshold: np.ndarray, indices: np.ndarray, z: np.ndarray) -> None:
    """Those entries, ascending, to `indices` and `z` [batch, width >= the count of each row]; then -1 and 0."""
    batch, n = pre.shape
    width = indices.shape[1]
    for chunk in prange(-(-batch // CHUNK)):
        # One more than there can be: without a branch, each entry is written before it is known whether it stays.
        places = np.empty(n + 1, np.int32)
        entries = np.empty(n + 1, np.float32)
        for b in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, batch)):
            row = pre[b]
            found = 0
            for i in range(n):
                entry = to_float(row[i]) + bias[i]
                places[found] = i
                entries[found] = entry
                found += entry > threshold[i]
            for j in range(width):
                indices[b, j] = places[j] if j < found else -1
                z[b, j] = entries[j] if j < found else 0


@njit(parallel=True, nogil=True, cache=True)
def copy_columns(pre: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    for b in prange(len(pre)):
        row, to = pre[b], out[b]
        for i in range(len(columns)):
            to[i] = row[columns[i]]


@njit(nogil=True, cache=True)
def _group_maxima(row: np.ndarray, bias: np.ndarray, maxima: np.ndarray) -> None:
    groups = len(maxima)
    for g in range(groups):
        maxima[g] = to_bits(to_float(row[g]) + bias[g])
    for first in range(groups, len(row), groups):
        # Slices, since their lengths tell the compiler that no index is negative.
        part, shift = row[first : first + groups], bias[first : first + groups]
        for g in range(len(part)):
            entry = to_bits(to_float(part[g]) + shift[g])
            maxima[g] = entry if entry > maxima[g] else maxima[g]


@njit(nogil=True, cache=True)
def _reaching(values: np.ndarray, bound: int) -> Any:
    """How many of `values` (int32) are at least `bound`: an int32."""
    count = np.int32(0)
    for i in range(len(values)):
        count += np.int32(1) if values[i] >= bound else np.int32(0)
    return count


@njit(nogil=True, cache=True)
def _threshold(values: np.ndarray, k: int, top: int, slack: int) -> Any:
    """By bisection, a number that at least k and at most k + slack of `values` (int32, up to `top`) reach.

    Where ties make that impossible it is the largest number that at least k reach; 1 where fewer than k are positive
    or there are no more than k values. Counting is all vector operations, where a partition would branch.
    """
    low, high = np.int64(1), np.int64(top) + 1
    if len(values) <= k:
        return np.int32(low)
    while high - low > 1:
        middle = low + (high - low) // 2
        count = _reaching(values, np.int32(middle))
        if count < k:
            high = middle
        else:
            low = middle
            if count <= k + slack:
                break
    return np.int32(low)
