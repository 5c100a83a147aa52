"""Every implementation of the sparse algebra held to plain float64, operation by operation."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from saescale.trainers.kernels import eager as sparse_eager
from saescale.trainers.kernels.interface import Moments, Pairs, Selected, Term
from tests.trainers.implementations import implementation
from tests.trainers.kernel_cases import (
    ADAM,
    Generator,
    close,
    dense,
    dense_rows,
    every_implementation,
    few,
    pieces_of,
)

# --- encode_select


def exact_selection(x: Tensor, W_enc: Tensor, bias: Tensor, k: int) -> list[dict[int, float]]:
    """By sorting, in float64: index and value of each token's k largest positive pre-activations."""
    pre = x.cpu().double() @ W_enc.cpu().double().T + bias.cpu().double()
    order = pre.sort(dim=1, descending=True, stable=True)
    return [
        {int(i): float(v) for i, v in zip(indices[:k], values[:k], strict=True) if v > 0}
        for indices, values in zip(order.indices, order.values, strict=True)
    ]


def as_dicts(selected: Selected) -> list[dict[int, float]]:
    found = []
    for indices, z in zip(selected.indices.tolist(), selected.z.tolist(), strict=True):
        assert all(value > 0 if index >= 0 else value == 0 for index, value in zip(indices, z, strict=True))
        pairs = {index: value for index, value in zip(indices, z, strict=True) if index >= 0}
        assert len(pairs) == sum(index >= 0 for index in indices)
        found.append(pairs)
    return found


@every_implementation
@few
@given(
    batch=st.integers(1, 4), d_model=st.integers(1, 12), n_latents=st.integers(1, 90),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=3), seed=st.integers(0, 10_000),
    kind=st.sampled_from(["many ties", "few ties", "negative", "zeros"]), half=st.booleans(),
)  # fmt: skip
@example(2, 3, 7, [0.0, 1.0], 0, "many ties", False)
@example(2, 3, 33, [1.0], 1, "few ties", True)
@example(1, 2, 5_000, [0.0004], 2, "many ties", True)
@example(1, 2, 5_000, [0.0004, 0.01], 3, "few ties", False)
@example(2, 4, 90, [0.5], 4, "negative", True)
def test_selection_is_exact_and_gives_ties_to_the_lower_index(
    name: str, batch: int, d_model: int, n_latents: int, shares: list[float], seed: int, kind: str, half: bool
) -> None:
    kernels, device = implementation(name)
    random = Generator(seed, device)
    # Whole numbers of such a size that neither their products nor sums, rounded or not, are inexact.
    size = 1_000 if kind == "few ties" and not half else 3
    x, W_enc = random.whole(-size, size + 1, batch, d_model).float(), random.whole(-size, size + 1, n_latents, d_model)
    bias = random.whole(-8, 9, n_latents) / 4
    if kind == "negative":
        bias = bias - 1_000
    if kind == "zeros":
        x, bias = torch.zeros_like(x), torch.zeros_like(bias)
    dtype = torch.bfloat16 if half else torch.float32
    ks = [max(1, round(share * n_latents)) for share in shares]

    selections = kernels.encode_select(x.to(dtype), W_enc.to(dtype), bias, ks)

    for k, selected in zip(ks, selections, strict=True):
        assert selected.indices.dtype == torch.int32
        assert selected.z.dtype == torch.float32
        assert selected.z.shape == selected.indices.shape == (batch, k)
        assert as_dicts(selected) == exact_selection(x, W_enc, bias, k)


@every_implementation
@few
@given(batch=st.integers(1, 3), n_latents=st.integers(1, 90), share=st.floats(0, 1), half=st.booleans(),
       seed=st.integers(0, 10_000))  # fmt: skip
def test_selection_of_any_numbers_is_right_to_rounding(
    name: str, batch: int, n_latents: int, share: float, half: bool, seed: int
) -> None:
    kernels, device = implementation(name)
    random, d_model, k = Generator(seed, device), 24, max(1, round(share * n_latents))
    dtype = torch.bfloat16 if half else torch.float32
    x, W_enc = random.normal(batch, d_model).to(dtype), random.normal(n_latents, d_model).to(dtype)
    bias = random.normal(n_latents)

    (selected,) = kernels.encode_select(x, W_enc, bias, [k])

    product = x.cpu().double() @ W_enc.cpu().double().T
    pre = product + bias.cpu().double()
    # Half a unit in the last place of bfloat16, in which a product may come.
    slack = product.abs() * 2**-8 + 1e-5 if half else torch.full_like(pre, 1e-5)
    for token, pairs in enumerate(as_dicts(selected)):
        last = min(pairs.values(), default=0.0) if len(pairs) == k else 0.0
        for n in range(n_latents):
            if n in pairs:
                assert abs(pairs[n] - float(pre[token, n])) <= slack[token, n]
            else:
                assert pre[token, n] - slack[token, n] <= last


@every_implementation
def test_selection_in_several_products_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, device = implementation(name)
    random = Generator(0, device)
    x, W_enc, bias = random.normal(11, 6), random.normal(40, 6), random.normal(40)
    whole = kernels.encode_select(x, W_enc, bias, [3])[0]
    monkeypatch.setattr(kernels, "product_rows", lambda batch, n_latents, device: min(batch, 4), raising=False)
    monkeypatch.setattr(kernels, "ENTRIES", 4 * 40, raising=False)
    assert [sorted(pairs) for pairs in as_dicts(kernels.encode_select(x, W_enc, bias, [3])[0])] == [
        sorted(pairs) for pairs in as_dicts(whole)
    ]


# --- decode


@every_implementation
@few
@given(batch=st.integers(1, 4), d_model=st.integers(1, 40), n_latents=st.integers(1, 30), share=st.floats(0, 1),
       scale=st.sampled_from([None, -0.3]), seed=st.integers(0, 10_000))  # fmt: skip
def test_decode_gives_error_square_and_gradient(
    name: str, batch: int, d_model: int, n_latents: int, share: float, scale: float | None, seed: int
) -> None:
    kernels, device = implementation(name)
    random, k = Generator(seed, device), max(1, round(share * n_latents))
    x, offset, W_dec = random.normal(batch, d_model), random.normal(d_model), random.normal(n_latents, d_model)
    selected, error = random.selected(batch, n_latents, k), torch.full_like(x, math.nan)

    got = kernels.decode(x, offset, selected, W_dec, scale, error)

    wanted = x.cpu().double() - offset.cpu().double() - dense(selected, n_latents) @ W_dec.cpu().double()
    assert close(error, wanted)
    assert got.squared.dtype == torch.float64
    assert float(got.squared) == pytest.approx(float(wanted.square().sum()), rel=1e-5)
    if scale is None:
        assert got.dz.shape == (batch, 0)
        return
    dz = scale * (wanted @ W_dec.cpu().double().T).gather(1, selected.indices.cpu().clamp(min=0).long())
    assert close(got.dz, torch.where(selected.z.cpu() > 0, dz, 0.0))


@every_implementation
def test_nan_among_the_activations_shows(name: str) -> None:
    kernels, device = implementation(name)
    random = Generator(0, device)
    selected, error = random.selected(3, 9, 4), torch.empty(3, 5, device=device)
    z = torch.full_like(selected.z, math.nan)
    got = kernels.decode(
        random.normal(3, 5), random.normal(5), Selected(selected.indices, z), random.normal(9, 5), 1.0, error
    )
    assert bool(error.isnan().all())
    assert bool(got.squared.isnan())


@every_implementation
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_no_gradient_where_a_latent_is_not_active(name: str) -> None:
    kernels, device = implementation(name)
    random = Generator(0, device)
    selected, error = random.selected(3, 9, 4), torch.empty(3, 5, device=device)
    x = torch.full((3, 5), math.inf, device=device)
    dz = kernels.decode(x, random.normal(5), selected, random.normal(9, 5), 1.0, error).dz
    assert torch.equal(dz == 0, selected.z == 0)


# --- transpose and latent_sums


def active(pairs: Pairs) -> Pairs:
    """On the CPU, without what lies behind the last pair."""
    starts = pairs.starts.cpu()
    return Pairs(starts, *(values.cpu()[: int(starts[-1])] for values in pairs[1:]))


@every_implementation
@few
@given(batch=st.integers(1, 6), n_latents=st.integers(1, 20), shares=st.lists(st.floats(0, 1), min_size=1, max_size=3),
       seed=st.integers(0, 10_000))  # fmt: skip
def test_pairs_are_sorted_by_latent_then_term_then_token(
    name: str, batch: int, n_latents: int, shares: list[float], seed: int
) -> None:
    kernels, device = implementation(name)
    random, terms, wanted = Generator(seed, device), [], []
    for number, share in enumerate(shares):
        k = max(1, round(share * n_latents))
        term = Term(random.selected(batch, n_latents, k), random.normal(batch, k), 0.5 - number)
        terms.append(term)
        columns = (t.flatten().tolist() for t in (*term.selected, term.dz))
        for place, (n, z, dz) in enumerate(zip(*columns, strict=True)):
            if z > 0:
                wanted.append((n, number * batch + place // k, term.scale * z, dz))
    wanted.sort(key=lambda pair: pair[:2])

    pairs = kernels.transpose(terms, n_latents)

    assert pairs.starts.dtype == torch.int64
    assert pairs.rows.dtype == torch.int32
    counts = torch.bincount(torch.tensor([n for n, *_ in wanted], dtype=torch.int64), minlength=n_latents)
    assert torch.equal(active(pairs).starts.diff(), counts)
    rows, decoder, encoder = (torch.tensor([pair[i] for pair in wanted]) for i in (1, 2, 3))
    assert active(pairs).rows.tolist() == rows.tolist()
    assert close(active(pairs).decoder, decoder.double())
    assert close(active(pairs).encoder, encoder.double())
    sums = [sum(pair[3] for pair in wanted if pair[0] == n) for n in range(n_latents)]
    assert close(kernels.latent_sums(pairs), torch.tensor(sums, dtype=torch.float64))


@every_implementation
@pytest.mark.parametrize("n_latents", [2**15 - 1, 2**15, 2**17])
def test_pairs_of_many_latents_are_sorted(name: str, n_latents: int) -> None:
    kernels, device = implementation(name)
    indices = torch.tensor([[n_latents - 1, 0], [-1, n_latents - 1], [40, 7]], dtype=torch.int32, device=device)
    z = torch.tensor([[1.0, 2.0], [0.0, 3.0], [4.0, 0.0]], device=device)
    pairs = active(kernels.transpose([Term(Selected(indices, z), -z, 2.0)], n_latents))
    assert pairs.rows.tolist() == [0, 2, 0, 1]
    assert pairs.decoder.tolist() == [4, 8, 2, 6]
    assert pairs.encoder.tolist() == [-2, -4, -1, -3]
    assert pairs.starts.shape == (n_latents + 1,)
    assert pairs.starts[[0, 1, 40, 41, n_latents - 1, n_latents]].tolist() == [0, 1, 1, 2, 2, 4]


@every_implementation
def test_sums_over_a_long_segment_are_exact_to_rounding(name: str) -> None:
    kernels, device = implementation(name)
    random, lengths = Generator(0, device), torch.tensor([0, 5_000, 1, 0, 256, 257])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device)
    values = random.normal(int(starts[-1]) + 7)
    rows = torch.zeros(len(values), dtype=torch.int32, device=device)
    got = kernels.latent_sums(Pairs(starts, rows, values, values))
    wanted = [part.double().sum() for part in values.cpu()[:-7].split(lengths.tolist())]
    assert close(got, torch.stack(wanted))


# --- update_rows


@few
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=9), count=st.integers(1, 6), d_model=st.integers(1, 20),
       shift=st.booleans(), seed=st.integers(0, 10_000))  # fmt: skip
def test_dense_gradient_is_the_sum_over_pairs(
    lengths: list[int], count: int, d_model: int, shift: bool, seed: int
) -> None:
    summands = Generator(seed, torch.device("cpu")).summands(
        lengths, count, d_model, list(range(0, len(lengths), 2)), shift
    )
    wanted = dense_rows(summands)
    assert close(sparse_eager.dense_gradient(summands), wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_eager, "ENTRIES", 2 * len(lengths))
        assert close(sparse_eager.dense_gradient(summands), wanted)


@every_implementation
@few
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=7), longest=st.integers(0, 60), count=st.integers(1, 6),
    d_model=st.integers(1, 40), shift=st.booleans(), extras=st.sets(st.integers(0, 6)), unit_rows=st.booleans(),
    piece=st.sampled_from([1, 4, 10_000]), half=st.booleans(), seed=st.integers(0, 10_000),
)  # fmt: skip
@example(
    lengths=[3, 0, 8], longest=64, count=4, d_model=17, shift=True, extras={0, 2}, unit_rows=True, piece=4,
    half=True, seed=0,
)  # fmt: skip
def test_update_equals_the_plain_step_in_float64(
    name: str, lengths: list[int], longest: int, count: int, d_model: int, shift: bool, extras: set[int],
    unit_rows: bool, piece: int, half: bool, seed: int,
) -> None:  # fmt: skip
    kernels, device = implementation(name)
    lengths = [longest, *lengths]
    random, n_latents = Generator(seed, device), len(lengths)
    summands = random.summands(lengths, count, d_model, sorted(n for n in extras if n < n_latents), shift)
    parameter = torch.nn.functional.normalize(random.normal(n_latents, d_model) + 0.1)
    # Adam's step is smooth in the gradient where the mean square is not about to be 0.
    moments = Moments(*(random.normal(n_latents, d_model).square() + 0.1 for _ in Moments._fields))
    w, m, v, average = (t.cpu().double() for t in (parameter, *moments))
    operand = torch.empty(n_latents, d_model, dtype=torch.bfloat16, device=device) if half else None

    with pieces_of(kernels, piece):
        kernels.update_rows(parameter, moments, summands, ADAM, unit_rows, operand)

    gradient = dense_rows(summands)
    if unit_rows:
        gradient -= (gradient * w).sum(dim=1, keepdim=True) * w
    m = 0.9 * m + (1 - 0.9) * gradient
    v = 0.99 * v + (1 - 0.99) * gradient**2
    w = w - 0.01 * 1.5 * m / (v.sqrt() * 2.0 + 1e-8)
    if unit_rows:
        w = w / w.norm(dim=1, keepdim=True)
    average = 0.95 * average + (1 - 0.95) * w
    assert close(moments.exp_avg, m)
    assert close(moments.exp_avg_sq, v, 1e-4)
    assert close(parameter, w)
    assert close(moments.average, average)
    assert operand is None or torch.equal(operand, parameter.bfloat16())


@every_implementation
def test_what_no_pair_names_does_not_count(name: str) -> None:
    kernels, device = implementation(name)
    random = Generator(0, device)
    summands = random.summands([4, 0, 2], 5, 6, [1], shift=True)
    unused = [row for row in range(5) if row not in (summands.rows[:6] % 5).tolist()]
    assert unused
    summands.sources[unused] = math.nan
    parameter = random.normal(3, 6)
    moments = Moments(*(torch.ones_like(parameter) for _ in Moments._fields))
    kernels.update_rows(parameter, moments, summands, ADAM, True, None)
    assert all(bool(t.isfinite().all()) for t in (parameter, *moments))


@every_implementation
def test_rows_are_rounded_as_torch_rounds(name: str) -> None:
    kernels, device = implementation(name)
    random = Generator(0, device)
    # Any bits; then halves between neighbours, where the even one wins, the largest number, infinity and NaN.
    bits = random.whole(-(2**31), 2**31, 4, 40).int()
    bits[0, :20] = (bits[0, :20] & -65536) | 0x8000
    parameter = bits.view(torch.float32)
    parameter[1, :6] = torch.tensor([3.4028235e38, -3.4028235e38, math.inf, -math.inf, math.nan, 0.0])
    # The smallest numbers, which the devices' arithmetic need not keep.
    parameter[parameter.abs() < 1e-30] = 1.0
    moments = Moments(*(torch.zeros_like(parameter) for _ in Moments._fields))
    summands = random.summands([0, 0, 0, 0], 2, 40, [], shift=False)
    operand = torch.zeros(4, 40, dtype=torch.bfloat16, device=device)
    before = parameter.clone()
    kernels.update_rows(parameter, moments, summands, ADAM, False, operand)
    known = ~before.isnan()
    assert torch.equal(parameter[known], before[known])
    assert torch.equal(operand[known].view(torch.int16), before[known].bfloat16().view(torch.int16))
    assert bool(operand[1, 4].isnan())
