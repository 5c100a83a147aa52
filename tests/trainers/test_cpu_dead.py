"""AuxK's kernels on CPUs: held to float64 and autograd, and to selection from a product of their own."""

import numba
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saescale.trainers.architectures import auxk
from saescale.trainers.architectures.dead import DeadLatents
from saescale.trainers.kernels import cpu, cpu_dead
from saescale.trainers.kernels.interface import DeadGradient, Kept, Selected
from tests.trainers.topk_case import dense, random_sae, take_step


def chosen(batch: int, count: int, k: int, generator: torch.Generator) -> Selected:
    """Each token's latents in no order, of some tokens fewer than k, or none."""
    indices = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(batch)]).int()
    z = torch.rand(batch, k, generator=generator) + 0.01
    some = torch.arange(k) < torch.randint(0, k + 1, (batch, 1), generator=generator)
    return Selected(torch.where(some, indices, -1), torch.where(some, z, 0.0))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 130), d_model=st.integers(1, 300), count=st.integers(1, 200), share=st.floats(0, 1),
    group=st.sampled_from([1, 50, 2048]), seed=st.integers(0, 1000),
)  # fmt: skip
@example(97, 129, 97, 1.0, 2048, 0)
@example(96, 128, 48, 1.0, 48, 0)
def test_the_dead_rows_gradient_is_that_of_autograd(
    batch: int, d_model: int, count: int, share: float, group: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n_latents, k = 2 * count, max(1, round(share * count))
    x, error = (torch.randn(batch, d_model, generator=generator) for _ in range(2))
    W_dec = torch.randn(n_latents, d_model, generator=generator)
    latents = torch.randperm(n_latents, generator=generator)[:count].sort().values
    selected = chosen(batch, count, k, generator)
    # Pre-activations that are the chosen ones at W_enc = 0: autograd then says the gradient by W_enc.
    W_enc = torch.zeros(count, d_model, dtype=torch.float64, requires_grad=True)
    b_enc = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    rows = W_dec[latents].double().requires_grad_()
    z = torch.zeros(batch, count + 1, dtype=torch.float64)
    z.scatter_(1, torch.where(selected.indices < 0, count, selected.indices).long(), selected.z.double())
    z = z[:, :count]
    latent = z + (x.double() @ W_enc.T + b_enc) * (z > 0)
    squared = (latent @ rows - error.double()).square().sum()
    wanted = torch.autograd.grad(0.25 * squared, [W_enc, b_enc, rows])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_dead, "GROUP", group)
        got = cpu_dead.dead_rows(x, error, selected, W_dec, latents, 0.5)
    assert float(got.squared) == pytest.approx(float(squared.detach()), rel=1e-5)
    assert got.pairs == int((z > 0).sum())
    for mine, exact in zip((got.W_enc, got.b_enc, got.W_dec), wanted, strict=True):
        assert float((mine - exact).abs().max()) <= 1e-5 * float(exact.abs().max()) + 1e-6


def test_the_number_of_threads_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    x, error, W_dec = (torch.randn(n, 40, generator=generator) for n in (300, 300, 200))
    selected, before = chosen(300, 200, 30, generator), numba.get_num_threads()
    results: list[DeadGradient] = []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        results.append(cpu_dead.dead_rows(x, error, selected, W_dec, torch.arange(200), 0.5))
    numba.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_of_a_product_selects_as_a_product_of_its_own(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Whole numbers, exact in either type, and with many ties.
    x, W_enc = (torch.randint(-3, 4, size, generator=generator).to(dtype) for size in ((23, 6), (90, 6)))
    bias, latents = torch.randn(90, generator=generator), torch.arange(1, 90, 3)
    monkeypatch.setattr(cpu, "product_rows", lambda batch, n_latents, device: 5)
    kept = Kept(latents, torch.empty(23, len(latents), dtype=dtype))
    (main,) = cpu_dead.encode_select(x, W_enc, bias, [4], kept)
    for got, wanted in zip(main, cpu.encode_select(x, W_enc, bias, [4])[0], strict=True):
        assert torch.equal(got, wanted)
    revived = torch.arange(len(latents)) % 4 == 0
    got = cpu_dead.select(kept.pre, torch.where(revived, -torch.inf, bias[latents]), 7)
    (wanted,) = cpu.encode_select(x, W_enc[latents[~revived]], bias[latents[~revived]], [7])
    names = latents[~revived]
    for token in range(23):
        mine = {int(latents[i]): float(z) for i, z in zip(got.indices[token], got.z[token], strict=True) if i >= 0}
        other = {int(names[i]): float(z) for i, z in zip(wanted.indices[token], wanted.z[token], strict=True) if i >= 0}
        assert mine == other


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_the_same_from_one_product_and_from_two(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for entries in (auxk.KEPT_ENTRIES, 0):
        monkeypatch.setattr(auxk, "KEPT_ENTRIES", entries)
        sae = random_sae(16, 60, 3, seed=1, precision=precision, k_aux=6, auxk_coefficient=1.0)
        dead = DeadLatents(60)
        # Dead by this batch alone, dead before it, and some that it revives.
        dead.tokens_since[:30], dead.tokens_since[30:40] = 10_000, 990
        sae.params["b_enc"][:40] -= 0.3
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(2))
        made.append(take_step(sae, x, torch.zeros(16), dead, 1_000))
        idle = dead.after(1_000)
        assert 0 < int(idle.sum()) < 40
        assert made[-1].worked.dead == int(idle.sum()) * 20
    one, two = made
    assert one.worked == two.worked
    assert one.parts["auxk"] == pytest.approx(two.parts["auxk"], rel=1e-6)
    assert len(one.gradient.aux.latents) > len(two.gradient.aux.latents) > 0
    for name, wanted in dense(two.gradient, sae).items():
        # Products in bfloat16 of other shapes may round otherwise.
        tolerance = 1e-5 if precision == "fp32" else 1e-2
        difference = float((dense(one.gradient, sae)[name] - wanted).abs().max())
        assert difference <= tolerance * float(wanted.abs().max()), name
