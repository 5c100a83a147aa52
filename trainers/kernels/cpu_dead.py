"""AuxK's reconstruction on CPUs (numba): the error by few of the dead latents, and its gradient, in blocks for the cache.

A token has eight times as many pairs here as in the main loss, among few latents, so what bounds it is where the rows
lie that pairs name: whole rows of the dead latents, or of the batch, fill the second-level cache many times over. So
d_model is cut into slices of 64 numbers, whose rows [rows, 64] of all dead latents, or of a group of tokens, fit
together, and a slice's sums stay in registers.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from saescale.trainers.kernels.interface import DeadGradient, Selected

_LANES, _VECTORS = 16, 8
_SLICE = _LANES * _VECTORS
_GROUP = 2048  # tokens whose slice, half a megabyte, stays in the cache while latents sum over it
_ROWS = 32 # rows of a slice that stay in the first-level cache
_PARTS = 8  # equal shares of a group's pairs, or tokens, that a thread takes whole
_FLAGS = ("contract", "reassoc")


def dead_rows(
    x: Tensor, error: Tensor, selected: Selected, W_dec: Tensor, latents: Tensor, scale: float
) -> DeadGradient:
    """See interface.py."""
    count, d_model = len(latents), x.shape[1]
    slices = -(-d_model // _SLICE)
    decoder = _aligned(slices, count)
    _pack(W_dec.numpy(), latents.numpy(), decoder)
    squared, pairs = 0.0, 0
    gradient = [np.zeros((count, d_model), np.float32) for _ in range(2)]
    b_enc = np.zeros(count, np.float32)
    for start in range(0, len(x), _GROUP):
        part = slice(start, start + _GROUP)
        indices, z = selected.indices[part].numpy(), selected.z[part].numpy()
        tokens = np.arange(len(z))
        miss, inputs = _aligned(slices, len(z)), _aligned(slices, len(z))
        _pack(error[part].numpy(), tokens, miss)
        _pack(x[part].numpy(), tokens, inputs)
        bounds = np.empty((len(z), -(-count // _ROWS) + 1), np.int32)
        _order(indices, z, bounds)
        squares = np.empty(len(z))
        _reconstruct(bounds, indices, z, decoder, miss, squares)
        squared += float(squares.sum())

        places = np.zeros((-(-len(z) // _ROWS) + 1, count), np.int32)
        _count(bounds, indices, places)
        total = _starts(places)
        rows, weights = np.empty(total, np.int32), np.empty(total, np.float32)
        _place(bounds, indices, z, places, rows, weights)
        pairs += total
        _gradients(places, rows, weights, miss, inputs, decoder, np.float32(scale), *gradient, b_enc)
    return DeadGradient(
        torch.tensor(squared, dtype=torch.float64), torch.tensor(pairs),
        torch.from_numpy(gradient[1]), torch.from_numpy(b_enc), torch.from_numpy(gradient[0]),
    )  # fmt: skip


def _aligned(slices: int, rows: int) -> np.ndarray:
    """[slices, rows, 64]: a vector that lies in two cache lines takes twice as long."""
    memory = np.empty(slices * rows * _SLICE + _LANES, np.float32)
    first = -memory.ctypes.data // memory.itemsize % _LANES
    return memory[first : first + slices * rows * _SLICE].reshape(slices, rows, _SLICE)


# --- kernels


def _data(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """The address of array[index] of a flat array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _vector(builder: Any, address: Any, number: int) -> Any:
    wide = ir.VectorType(ir.FloatType(), _LANES)
    return builder.bitcast(builder.gep(address, [ir.Constant(ir.IntType(64), number * _LANES)]), wide.as_pointer())


def _load(builder: Any, address: Any) -> Any:
    return [builder.load(_vector(builder, address, v), align=4) for v in range(_VECTORS)]


def _broadcast(builder: Any, value: Any) -> Any:
    wide = ir.VectorType(ir.FloatType(), _LANES)
    one = builder.insert_element(ir.Constant(wide, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
    return builder.shuffle_vector(one, ir.Constant(wide, ir.Undefined), zeros)


def _sum_loop(context: Any, builder: Any, signature: Any, args: Any, dots: bool) -> Any:
    """out[at:] += sum over j in first:last of weights[j] rows[names[j]], in registers; and dots[j] += row . of[of_at:]"""
    kinds = signature.args
    out, at, weights, names, first, last, rows, base, *more = args
    i64 = ir.IntType(64)
    target = _data(context, builder, kinds[0], out, at)
    tile = _data(context, builder, kinds[6], rows, base)
    begin = _load(builder, target)
    other = _load(builder, _data(context, builder, kinds[9], more[1], more[2])) if dots else None
    before = builder.block
    loop, done = builder.append_basic_block("pairs"), builder.append_basic_block("summed")
    builder.cbranch(builder.icmp_signed("<", first, last), loop, done)
    builder.position_at_end(loop)
    j = builder.phi(i64)
    sums = [builder.phi(v.type) for v in begin]
    weight = _broadcast(builder, builder.load(_data(context, builder, kinds[2], weights, j)))
    name = builder.zext(builder.load(_data(context, builder, kinds[3], names, j)), i64)
    row = _load(builder, builder.gep(tile, [builder.mul(name, ir.Constant(i64, _SLICE))]))
    new = [builder.fadd(s, builder.fmul(weight, r, flags=_FLAGS), flags=_FLAGS) for s, r in zip(sums, row, strict=True)]
    if other is not None:
        products = [builder.fmul(r, o, flags=_FLAGS) for r, o in zip(row, other, strict=True)]
        while len(products) > 1:
            products = [
                builder.fadd(a, b, flags=_FLAGS) for a, b in zip(products[::2], products[1::2], strict=True)
            ]
        total = products[0]
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), total.type])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{_LANES}f32")
        address = _data(context, builder, kinds[8], more[0], j)
        builder.store(builder.call(reduce, [builder.load(address), total], fastmath=_FLAGS), address)
    following = builder.add(j, ir.Constant(i64, 1))
    j.add_incoming(first, before)
    j.add_incoming(following, loop)
    for s, b, n in zip(sums, begin, new, strict=True):
        s.add_incoming(b, before)
        s.add_incoming(n, loop)
    builder.cbranch(builder.icmp_signed("<", following, last), loop, done)
    builder.position_at_end(done)
    results = [builder.phi(v.type) for v in begin]
    for v, (result, b, n) in enumerate(zip(results, begin, new, strict=True)):
        result.add_incoming(b, before)
        result.add_incoming(n, loop)
        builder.store(result, _vector(builder, target, v), align=4)
    return context.get_dummy_value()


_INT = types.int64


@intrinsic
def _sum_rows(
    typingctx: Any, out: Any, at: Any, weights: Any, names: Any, first: Any, last: Any, rows: Any, base: Any
) -> Any:
    """out[at:at + 64] += sum over j in first:last of weights[j] rows[base + 64 names[j]:][:64]; flat arrays."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _sum_loop(context, builder, signature, args, False)

    return types.void(out, _INT, weights, names, _INT, _INT, rows, _INT), code


@intrinsic
def _sum_rows_and_dots(
    typingctx: Any, out: Any, at: Any, weights: Any, names: Any, first: Any, last: Any, rows: Any, base: Any,
    dots: Any, other: Any, other_at: Any,
) -> Any:  # fmt: skip
    """The same, and dots[j] += each row . other[other_at:other_at + 64]: a row is read once for both."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _sum_loop(context, builder, signature, args, True)

    return types.void(out, _INT, weights, names, _INT, _INT, rows, _INT, dots, other, _INT), code


@njit(parallel=True, nogil=True, cache=True)
def _pack(matrix: np.ndarray, names: np.ndarray, slices: np.ndarray) -> None:
    """Rows `names` of a matrix [.., d_model] to slices [slices, rows, 64], zeros beyond d_model."""
    d_model = matrix.shape[1]
    for s in prange(len(slices)):
        first = s * _SLICE
        width = min(_SLICE, d_model - first)
        for n in range(len(names)):
            to = slices[s, n]
            to[:width] = matrix[names[n], first : first + width]
            to[width:] = 0


@njit(parallel=True, nogil=True, cache=True)
def _order(indices: np.ndarray, z: np.ndarray, bounds: np.ndarray) -> None:
    """Each token's pairs in the order of their latents; those of the c-th _ROWS latents are bounds[b, c]:[b, c + 1]."""
    tokens, k = indices.shape
    for b in prange(tokens):
        names, values = indices[b], z[b]
        block = last = 0
        bounds[b, 0] = 0
        for j in range(k):
            name, value = names[j], values[j]
            if name < 0:
                break
            # Ties alone come out of their order.
            i = j
            while i > 0 and names[i - 1] > name:
                names[i], values[i] = names[i - 1], values[i - 1]
                i -= 1
            names[i], values[i] = name, value
            last = j + 1
        for j in range(last):
            while names[j] >= (block + 1) * _ROWS:
                block += 1
                bounds[b, block] = j
        for c in range(block + 1, bounds.shape[1]):
            bounds[b, c] = last


@njit(parallel=True, nogil=True, cache=True)
def _reconstruct(
    bounds: np.ndarray, indices: np.ndarray, z: np.ndarray, decoder: np.ndarray, miss: np.ndarray, squares: np.ndarray
) -> None:
    """miss, which comes as e, becomes e_hat - e, and `squares` [tokens] the squares of its rows."""
    tokens, k = indices.shape
    slices, count = len(decoder), decoder.shape[1]
    flat, rows, weights, names = miss.reshape(-1), decoder.reshape(-1), z.reshape(-1), indices.reshape(-1)
    for part in prange(_PARTS):
        low, high = part * tokens // _PARTS, (part + 1) * tokens // _PARTS
        for s in range(slices):
            for i in range((s * tokens + low) * _SLICE, (s * tokens + high) * _SLICE):
                flat[i] = -flat[i]
            for block in range(bounds.shape[1] - 1):
                for b in range(low, high):
                    first, last = b * k + bounds[b, block], b * k + bounds[b, block + 1]
                    _sum_rows(flat, (s * tokens + b) * _SLICE, weights, names, first, last, rows, s * count * _SLICE)
            for b in range(low, high):
                total = 0.0 if s == 0 else squares[b]
                for i in range((s * tokens + b) * _SLICE, (s * tokens + b + 1) * _SLICE):
                    total += np.float64(flat[i]) * np.float64(flat[i])
                squares[b] = total


@njit(parallel=True, nogil=True, cache=True)
def _count(bounds: np.ndarray, indices: np.ndarray, places: np.ndarray) -> None:
    """places[t, n]: the pairs of latent n among the t-th _ROWS tokens."""
    for t in prange(len(places) - 1):
        mine = places[t]
        for b in range(t * _ROWS, min((t + 1) * _ROWS, len(indices))):
            for j in range(bounds[b, -1]):
                mine[indices[b, j]] += 1


@njit(nogil=True, cache=True)
def _starts(places: np.ndarray) -> Any:
    """`places` becomes where those pairs start, sorted by latent; the last row where the latent's end. How many."""
    total = np.int32(0)
    for n in range(places.shape[1]):
        for t in range(len(places)):
            here = places[t, n]
            places[t, n] = total
            total += here
    return total


@njit(parallel=True, nogil=True, cache=True)
def _place(
    bounds: np.ndarray, indices: np.ndarray, z: np.ndarray, places: np.ndarray, rows: np.ndarray, weights: np.ndarray
) -> None:
    for t in prange(len(places) - 1):
        mine = places[t].copy()
        for b in range(t * _ROWS, min((t + 1) * _ROWS, len(indices))):
            for j in range(bounds[b, -1]):
                n = indices[b, j]
                rows[mine[n]] = b
                weights[mine[n]] = z[b, j]
                mine[n] += 1


@njit(parallel=True, nogil=True, cache=True)
def _gradients(
    places: np.ndarray, rows: np.ndarray, weights: np.ndarray, miss: np.ndarray, inputs: np.ndarray,
    decoder: np.ndarray, scale: float, W_dec: np.ndarray, W_enc: np.ndarray, b_enc: np.ndarray,
) -> None:  # fmt: skip
    """Adds scale times the gradients of ||miss||^2 / 2 by the dead rows, by latent."""
    slices, count = len(decoder), decoder.shape[1]
    tokens, d_model = miss.shape[1], W_dec.shape[1]
    missed, given, own = miss.reshape(-1), inputs.reshape(-1), decoder.reshape(-1)
    dots = np.zeros(len(rows), np.float32)
    blocks = len(places) - 1
    for part in prange(_PARTS):
        low = np.searchsorted(places[0], part * len(rows) // _PARTS)
        high = count if part == _PARTS - 1 else np.searchsorted(places[0], (part + 1) * len(rows) // _PARTS)
        sums = _aligned_floats(max(high - low, 0) * _SLICE)
        for s in range(slices):
            sums[:] = 0
            for t in range(blocks):
                for n in range(low, high):
                    _sum_rows_and_dots(
                        sums, (n - low) * _SLICE, weights, rows, places[t, n], places[t + 1, n], missed,
                        s * tokens * _SLICE, dots, own, (s * count + n) * _SLICE,
                    )  # fmt: skip
            _add_slice(W_dec, low, high, s, scale, sums)
        for n in range(low, high):
            total = np.float32(0)
            for p in range(places[0, n], places[blocks, n]):
                total += dots[p]
            b_enc[n] += scale * total
        for s in range(slices):
            sums[:] = 0
            for t in range(blocks):
                for n in range(low, high):
                    _sum_rows(
                        sums, (n - low) * _SLICE, dots, rows, places[t, n], places[t + 1, n], given,
                        s * tokens * _SLICE,
                    )  # fmt: skip
            _add_slice(W_enc, low, high, s, scale, sums)


@njit(nogil=True, cache=True)
def _add_slice(matrix: np.ndarray, low: int, high: int, s: int, scale: float, sums: np.ndarray) -> None:
    first = s * _SLICE
    width = min(_SLICE, matrix.shape[1] - first)
    for n in range(low, high):
        row, own = matrix[n, first : first + width], sums[(n - low) * _SLICE : (n - low) * _SLICE + width]
        for i in range(len(own)):
            row[i] += scale * own[i]


@njit(nogil=True, cache=True)
def _aligned_floats(size: int) -> np.ndarray:
    memory = np.empty(size + _LANES, np.float32)
    first = -(memory.ctypes.data // 4) % _LANES
    return memory[first : first + size]
