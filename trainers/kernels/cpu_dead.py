"""AuxK on CPUs (numba): the dead latents' part of the main product, and reconstruction and gradient by them alone.

A token has eight times as many pairs here as in the main loss, among few latents, and what bounds it is where the rows
lie that pairs name. So d_model is cut into slices of 128 numbers, and latents and tokens into blocks whose rows of a
slice fit into the first-level cache together: all pairs of a block read them there. A slice's sums stay in registers
over the pairs of a token, or of a latent, in a block. Nothing depends on the number of threads.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from saescale.trainers.kernels.cpu import encode_select, select
from saescale.trainers.kernels.interface import DeadGradient, Selected

__all__ = ["dead_rows", "encode_select", "select"]

# They belong in this file: numba takes what it compiled from its cache until the file's date changes.
SLICE = 128  # of d_model that is worked on at a time
BLOCK = 48  # rows of a slice that stay in the first-level cache, 24 KiB
GROUP = 2048  # tokens whose pairs are sorted, and whose errors are held in slices, at a time
_LANES = 16
_VECTORS = SLICE // _LANES
_PARTS = 8  # of a group's tokens, or pairs, each taken whole by a thread
_FLAGS = ("contract", "reassoc")


def dead_rows(
    x: Tensor, error: Tensor, selected: Selected, W_dec: Tensor, latents: Tensor, scale: float
) -> DeadGradient:
    count, d_model = len(latents), x.shape[1]
    starts = range(0, d_model, SLICE)
    names, matrix = latents.numpy(), W_dec.detach().numpy()
    squared, total = 0.0, 0
    of_encoder, of_decoder = np.zeros((count, d_model), np.float32), np.zeros((count, d_model), np.float32)
    b_enc = np.zeros(count, np.float32)
    decoder = _aligned(count * SLICE).reshape(count, SLICE)
    for first in range(0, len(x), GROUP):
        part = slice(first, first + GROUP)
        indices, z = selected.indices[part].numpy(), selected.z[part].numpy()
        errors, inputs = error[part].numpy(), x[part].numpy()
        tokens = np.arange(len(z))
        bounds = np.empty((len(z), -(-count // BLOCK) + 1), np.int32)
        _order(indices, z, bounds)
        misses = _aligned(len(starts) * len(z) * SLICE).reshape(len(starts), len(z), SLICE)
        squares = np.zeros(len(z))
        for start, miss in zip(starts, misses, strict=True):
            _pack(matrix, names, start, decoder)
            _pack(errors, tokens, start, miss)
            _reconstruct(bounds, indices, z, decoder, miss, squares)
        squared += float(squares.sum())

        places = np.zeros((-(-len(z) // BLOCK) + 1, count), np.int32)
        _count(bounds, indices, places)
        pairs = _starts(places)
        rows, weights, dots = np.empty(pairs, np.int32), np.empty(pairs, np.float32), np.zeros(pairs, np.float32)
        _place(bounds, indices, z, places, rows, weights)
        total += pairs
        for start, miss in zip(starts, misses, strict=True):
            _pack(matrix, names, start, decoder)
            _decoder_gradient(places, rows, weights, miss, decoder, start, scale, of_decoder, dots)
        given = misses[0]
        for start in starts:
            _pack(inputs, tokens, start, given)
            _encoder_gradient(places, rows, dots, given, start, scale, of_encoder)
        _add_sums(places, dots, scale, b_enc)
    return DeadGradient(
        torch.tensor(squared, dtype=torch.float64), total,
        torch.from_numpy(of_encoder), torch.from_numpy(b_enc), torch.from_numpy(of_decoder),
    )  # fmt: skip


@njit(nogil=True, cache=True)
def _aligned(size: int) -> np.ndarray:
    """float32 [size], not written: a vector that lies in two cache lines takes twice as long."""
    memory = np.empty(size + _LANES, np.float32)
    first = -(memory.ctypes.data // 4) % _LANES
    return memory[first : first + size]


# --- one sum in registers


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
    """out[at:] += sum over j in first:last of weights[j] rows[names[j]]; with `dots` that of the row too."""
    kinds = signature.args
    out, at, weights, names, first, last, rows, *more = args
    i64 = ir.IntType(64)
    target = _data(context, builder, kinds[0], out, at)
    tile = _data(context, builder, kinds[6], rows, ir.Constant(i64, 0))
    begin = _load(builder, target)
    other = _load(builder, _data(context, builder, kinds[8], more[1], more[2])) if dots else None
    before = builder.block
    loop, done = builder.append_basic_block("pairs"), builder.append_basic_block("summed")
    builder.cbranch(builder.icmp_signed("<", first, last), loop, done)
    builder.position_at_end(loop)
    j = builder.phi(i64)
    sums = [builder.phi(v.type) for v in begin]
    weight = _broadcast(builder, builder.load(_data(context, builder, kinds[2], weights, j)))
    name = builder.zext(builder.load(_data(context, builder, kinds[3], names, j)), i64)
    row = _load(builder, builder.gep(tile, [builder.mul(name, ir.Constant(i64, SLICE))]))
    new = [builder.fadd(s, builder.fmul(weight, r, flags=_FLAGS), flags=_FLAGS) for s, r in zip(sums, row, strict=True)]
    if other is not None:
        products = [builder.fmul(r, o, flags=_FLAGS) for r, o in zip(row, other, strict=True)]
        while len(products) > 1:
            products = [builder.fadd(a, b, flags=_FLAGS) for a, b in zip(products[::2], products[1::2], strict=True)]
        total = products[0]
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), total.type])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{_LANES}f32")
        address = _data(context, builder, kinds[7], more[0], j)
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
def _sum_rows(typingctx: Any, out: Any, at: Any, weights: Any, names: Any, first: Any, last: Any, rows: Any) -> Any:
    """out[at:at + 128] += sum over j in first:last of weights[j] rows[128 names[j]:][:128]; flat arrays."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _sum_loop(context, builder, signature, args, False)

    return types.void(out, _INT, weights, names, _INT, _INT, rows), code


@intrinsic
def _sum_rows_and_dots(
    typingctx: Any, out: Any, at: Any, weights: Any, names: Any, first: Any, last: Any, rows: Any,
    dots: Any, other: Any, other_at: Any,
) -> Any:  # fmt: skip
    """The same, and dots[j] += each row . other[other_at:other_at + 128]: a row is read once for both."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _sum_loop(context, builder, signature, args, True)

    return types.void(out, _INT, weights, names, _INT, _INT, rows, dots, other, _INT), code


# --- kernels


@njit(parallel=True, nogil=True, cache=True)
def _pack(matrix: np.ndarray, names: np.ndarray, start: int, rows: np.ndarray) -> None:
    """matrix[names, start:start + 128] to `rows` [names, 128], zeros beyond d_model."""
    width = min(SLICE, matrix.shape[1] - start)
    for n in prange(len(names)):
        rows[n, :width] = matrix[names[n], start : start + width]
        rows[n, width:] = 0


@njit(parallel=True, nogil=True, cache=True)
def _order(indices: np.ndarray, z: np.ndarray, bounds: np.ndarray) -> None:
    """Each token's pairs in the order of their latents; the c-th BLOCK latents have bounds[b, c]:[b, c + 1]."""
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
            while names[j] >= (block + 1) * BLOCK:
                block += 1
                bounds[b, block] = j
        for c in range(block + 1, bounds.shape[1]):
            bounds[b, c] = last


@njit(parallel=True, nogil=True, cache=True)
def _reconstruct(
    bounds: np.ndarray, indices: np.ndarray, z: np.ndarray, decoder: np.ndarray, miss: np.ndarray, squares: np.ndarray
) -> None:
    """A slice of `miss` [tokens, 128], comes as e and becomes e_hat - e; its squares are added to those of tokens."""
    tokens, k = indices.shape
    flat, rows, weights, names = miss.reshape(-1), decoder.reshape(-1), z.reshape(-1), indices.reshape(-1)
    for part in prange(_PARTS):
        low, high = part * tokens // _PARTS, (part + 1) * tokens // _PARTS
        for i in range(low * SLICE, high * SLICE):
            flat[i] = -flat[i]
        for block in range(bounds.shape[1] - 1):
            for b in range(low, high):
                first, last = b * k + bounds[b, block], b * k + bounds[b, block + 1]
                _sum_rows(flat, b * SLICE, weights, names, first, last, rows)
        for b in range(low, high):
            total = 0.0
            for i in range(b * SLICE, (b + 1) * SLICE):
                total += np.float64(flat[i]) * np.float64(flat[i])
            squares[b] += total


@njit(parallel=True, nogil=True, cache=True)
def _count(bounds: np.ndarray, indices: np.ndarray, places: np.ndarray) -> None:
    """places[t, n]: the pairs of latent n among the t-th BLOCK tokens."""
    for t in prange(len(places) - 1):
        mine = places[t]
        for b in range(t * BLOCK, min((t + 1) * BLOCK, len(indices))):
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
        for b in range(t * BLOCK, min((t + 1) * BLOCK, len(indices))):
            for j in range(bounds[b, -1]):
                n = indices[b, j]
                rows[mine[n]] = b
                weights[mine[n]] = z[b, j]
                mine[n] += 1


@njit(parallel=True, nogil=True, cache=True)
def _decoder_gradient(
    places: np.ndarray, rows: np.ndarray, weights: np.ndarray, miss: np.ndarray, decoder: np.ndarray, start: int,
    scale: float, gradient: np.ndarray, dots: np.ndarray,
) -> None:  # fmt: skip
    """Adds scale times a slice's sums of weights[p] miss[rows[p]] to `gradient`, miss[rows[p]] . decoder to dots."""
    missed, own = miss.reshape(-1), decoder.reshape(-1)
    for part in prange(_PARTS):
        low, high = _share(places, len(rows), part), _share(places, len(rows), part + 1)
        sums = _aligned((high - low) * SLICE)
        sums[:] = 0
        for t in range(len(places) - 1):
            for n in range(low, high):
                first, last = places[t, n], places[t + 1, n]
                _sum_rows_and_dots(sums, (n - low) * SLICE, weights, rows, first, last, missed, dots, own, n * SLICE)
        _add_slice(gradient, low, start, scale, sums)


@njit(parallel=True, nogil=True, cache=True)
def _encoder_gradient(
    places: np.ndarray, rows: np.ndarray, weights: np.ndarray, x: np.ndarray, start: int, scale: float,
    gradient: np.ndarray,
) -> None:  # fmt: skip
    given = x.reshape(-1)
    for part in prange(_PARTS):
        low, high = _share(places, len(rows), part), _share(places, len(rows), part + 1)
        sums = _aligned((high - low) * SLICE)
        sums[:] = 0
        for t in range(len(places) - 1):
            for n in range(low, high):
                _sum_rows(sums, (n - low) * SLICE, weights, rows, places[t, n], places[t + 1, n], given)
        _add_slice(gradient, low, start, scale, sums)


@njit(nogil=True, cache=True)
def _share(places: np.ndarray, pairs: int, part: int) -> Any:
    """The first latent of a part, where parts have about as many pairs."""
    return places.shape[1] if part == _PARTS else np.searchsorted(places[0], part * pairs // _PARTS)


@njit(nogil=True, cache=True)
def _add_slice(gradient: np.ndarray, low: int, start: int, scale: float, sums: np.ndarray) -> None:
    width = min(SLICE, gradient.shape[1] - start)
    for n in range(len(sums) // SLICE):
        row, own = gradient[low + n, start : start + width], sums[n * SLICE : n * SLICE + width]
        for i in range(len(row)):
            row[i] += np.float32(scale) * own[i]


@njit(parallel=True, nogil=True, cache=True)
def _add_sums(places: np.ndarray, dots: np.ndarray, scale: float, out: np.ndarray) -> None:
    for n in prange(len(out)):
        total = np.float32(0)
        for p in range(places[0, n], places[-1, n]):
            total += dots[p]
        out[n] += np.float32(scale) * total
