"""Inputs of the sparse algebra, and what they give by plain float64."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from saescale.trainers.kernels.interface import AdamStep, Moments, Selected, Summands, Term
from tests.trainers.implementations import NAMES

every_implementation = pytest.mark.parametrize("name", NAMES)
# Few, since an interpreted kernel is a thousand times as slow as a compiled one.
few = settings(max_examples=12, deadline=None)
ADAM = AdamStep(lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, correction1=1.5, correction2=2.0, decay=0.95)


class Generator:
    """Random tensors on a device, the same ones for the same seed on every device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def selected(self, batch: int, n_latents: int, k: int) -> Selected:
        """Different latents for each token, some of them not active, and -1 at some places, in no order."""
        scores = torch.rand(batch, n_latents, generator=self.generator)
        indices = scores.topk(k, dim=1).indices.int()
        z = torch.randn(batch, k, generator=self.generator).relu()
        indices[torch.rand(batch, k, generator=self.generator) < 0.2] = -1
        z[indices < 0] = 0
        return Selected(indices.to(self.device), z.to(self.device))

    def summands(
        self, lengths: list[int], count: int, d_model: int, extras: list[int], shift: bool
    ) -> Summands:  # fmt: skip
        """Segments of these lengths; behind the last there are pairs that do not count."""
        starts = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        size = int(starts[-1]) + 3
        weights = self.normal(size)
        weights[-3:] = math.nan
        return Summands(
            starts.to(self.device), self.whole(0, 2 * count, size).int(), weights, self.normal(count, d_model),
            self.normal(len(lengths)) if shift else None, self.normal(d_model),
            torch.tensor(extras, dtype=torch.int64, device=self.device), self.normal(len(extras), d_model),
        )  # fmt: skip


def dense(selected: Selected, n_latents: int) -> Tensor:
    """z as a float64 matrix [batch, n_latents]."""
    latents = torch.zeros(len(selected.z), n_latents, dtype=torch.float64)
    for token, (indices, z) in enumerate(zip(selected.indices.tolist(), selected.z.tolist(), strict=True)):
        for index, value in zip(indices, z, strict=True):
            if index >= 0:
                latents[token, index] = value
    return latents


def dense_rows(summands: Summands) -> Tensor:
    """The gradient that `summands` describes, pair by pair in float64."""
    starts, rows, weights, sources, shift, offset, latents, extra = (
        None if t is None else t.cpu() if not t.is_floating_point() else t.cpu().double() for t in summands
    )
    gradient = torch.zeros(len(starts) - 1, sources.shape[1], dtype=torch.float64)
    for n in range(len(gradient)):
        for p in range(int(starts[n]), int(starts[n + 1])):
            gradient[n] += weights[p] * sources[int(rows[p]) % len(sources)]
        if shift is not None:
            gradient[n] -= shift[n] * offset
    gradient[latents] += extra
    return gradient


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    scale = 1 + float(wanted.abs().max()) if wanted.numel() else 1.0
    return got.shape == wanted.shape and bool((got.cpu().double() - wanted).abs().le(tolerance * scale).all())


@contextmanager
def pieces_of(kernels: Any, size: int) -> Iterator[None]:
    """Long segments are cut into pieces of that size, where an implementation does that at all."""
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(kernels, "PIECE"):
            patch.setattr(kernels, "PIECE", size)
        yield


class Inputs(NamedTuple):
    x: Tensor
    offset: Tensor
    W_enc: Tensor
    W_dec: Tensor
    bias: Tensor

    @classmethod
    def on(cls, device: torch.device, batch: int = 12, d_model: int = 20, n_latents: int = 36) -> "Inputs":
        """One latent is active on every token."""
        random = Generator(3, device)
        bias = random.whole(-4, 5, n_latents) / 4
        bias[2] += 100
        return cls(
            random.whole(-3, 4, batch, d_model).float(), random.normal(d_model),
            random.whole(-3, 4, n_latents, d_model).float(), random.normal(n_latents, d_model), bias,
        )  # fmt: skip


def everything(kernels: Any, inputs: Inputs, k: int = 4) -> dict[str, Tensor]:
    """Results of every function, each from the results of those before."""
    x, offset, W_enc, W_dec, bias = inputs
    (batch, d_model), n_latents, device = x.shape, len(W_enc), x.device
    selections = kernels.encode_select(x, W_enc, bias, [k, min(4 * k, n_latents)])
    errors, terms = torch.empty(2, batch, d_model, device=device), []
    for selected, error in zip(selections, errors, strict=True):
        terms.append(Term(selected, kernels.decode(x, offset, selected, W_dec, 0.1, error).dz, 0.1))
    pairs = kernels.transpose(terms, n_latents)
    b_enc = kernels.latent_sums(pairs)
    none = torch.empty(0, dtype=torch.int64, device=device)
    parameters = {"W_dec": torch.nn.functional.normalize(W_dec), "W_enc": W_enc / 10}
    results = {"errors": errors, "b_enc": b_enc, "starts": pairs.starts} | parameters
    for key, weights, sources, shift, operand in (
        ("W_dec", pairs.decoder, errors.view(-1, d_model), None, None),
        ("W_enc", pairs.encoder, x, b_enc, W_enc.bfloat16()),
    ):
        summands = Summands(pairs.starts, pairs.rows, weights, sources, shift, offset, none, x[:0])
        moments = Moments(*(torch.ones(n_latents, d_model, device=device) for _ in Moments._fields))
        kernels.update_rows(parameters[key], moments, summands, ADAM, key == "W_dec", operand)
        results |= {f"{key}.{field}": value for field, value in moments._asdict().items()}
        if operand is not None:
            results[f"{key}.operand"] = operand
    return results
