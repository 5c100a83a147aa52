"""`dictionary` and `dictionary:SPEC.yaml`: activations that are sums of known features, so that what an SAE
finds can be held to what is there.

There is no model. An activation is sum_f z_f d_f + noise; which features z fire, with whom and how strongly is set by a
spec (dictionary_spec.py). A sequence is two ids that are its seed, and behind them the numbers of its rows: whoever has
the ids has the features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site, Split
from saescale.trainers.device import default_device
from saescale.trainers.subjects.dictionary_spec import DictionarySpec, Hierarchy, read_spec
from saescale.trainers.subjects.hashed import hashed, normal, uniform
from saescale.trainers.subjects.subject import Patch, Run, Sequence

NAMES_A_PATH = True
ROWS = 64  # of a sequence
_SEED_IDS = 2
_AT_A_TIME = {"cpu": 2**17, "cuda": 2**24}  # entries of [rows, features]: what a core's cache holds, what fills a GPU
_REPULSIONS = 500
# What is drawn for a row, and once for the dictionary: each from a stream of its own.
_FIRES, _FACTORS, _CHOICE, _SIZE, _NOISE, _DIRECTIONS, _WEIGHTS, _SPREADS = range(8)


class Dictionary:
    """A subject of one site, layer 0. `directions` float32 [features, d_model] have unit rows; the label `features` is
    the magnitude of each feature, 0 where it does not fire, float32 [batch, length, features]."""

    d_model: int
    n_layers, dtype = 1, torch.float32
    labels = ("features",)

    def __init__(self, name: str, spec: DictionarySpec, device: torch.device) -> None:
        self.name, self.spec, self.fingerprint, self.d_model = name, spec, spec.fingerprint(), spec.d_model
        self._device = device
        self.directions = _directions(spec, device)
        self._numbers = torch.arange(spec.features, device=device)
        frequency = _frequencies(spec)
        chance = _compensated(frequency, spec.hierarchy).to(device)
        self._chance, self._threshold = chance.float(), torch.special.ndtri(chance).float()
        magnitudes = spec.magnitudes
        # In float64 and rounded, which hides in what order a processor computes it.
        means = torch.linspace(magnitudes.first, magnitudes.last, spec.features, dtype=torch.float64)
        self._mean = means.float().to(device)
        self._spread = (magnitudes.spread + magnitudes.spread_deviation * self._once(_SPREADS, spec.features)).abs()
        if spec.correlations is not None:
            weights = self._once(_WEIGHTS, spec.features * spec.correlations.rank).view(spec.features, -1)
            # So that not more than 99 % of a feature is common.
            weights = weights * spec.correlations.scale
            weights = weights * (0.99 / weights.square().sum(dim=1, keepdim=True)).sqrt().clamp(max=1)
            self._weights = _stepped(weights, 10)
            self._own = (1 - self._weights.square().sum(dim=1)).sqrt()

    def sequences(self, split: Split, seed: int) -> Iterator[Sequence]:
        keep = np.arange(_SEED_IDS + ROWS) >= _SEED_IDS
        of_seed = torch.tensor(seed)
        for first in range(0, 2**62, 256):
            bits = hashed(of_seed, torch.arange(first, first + 256)).numpy()
            for high, low in zip(bits >> 33 & 0x7FFFFFFF, bits & 0x7FFFFFFF, strict=True):
                # The last bit of the seed says where a sequence belongs, so that no seed puts one into both splits.
                own = [high, (low & ~1) | (split == "heldout"), *range(ROWS)]
                yield Sequence(np.array(own, np.int32), keep)

    def check_site(self, layer: int, length: int) -> None:
        if layer != 0:
            raise SaescaleError(f"{self.name} has no layer {layer}: its one site is layer 0")

    @torch.no_grad()
    def run(
        self, ids: Tensor, sites: Iterable[Site], patch: Mapping[Site, Patch] | None = None, logits: bool = False
    ) -> Run:
        """There is nothing behind the site: no logits. Positions of the seed are zero."""
        keys = self._keys(ids)
        resid = torch.zeros(*ids.shape, self.d_model, device=self._device)
        parts = [self._sums(some) for some in keys.flatten().split(self._rows_at_a_time())]
        resid[:, _SEED_IDS:] = torch.cat(parts).view(*keys.shape, self.d_model)
        for change in (patch or {}).values():
            resid = change(resid)
        return Run(tuple(resid for _ in sites), None)

    @torch.no_grad()
    def label(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        keys = self._keys(torch.from_numpy(ids))
        found = np.zeros((*ids.shape, self.spec.features), np.float32)
        parts = [self._magnitudes(some).cpu() for some in keys.flatten().split(self._rows_at_a_time())]
        found[:, _SEED_IDS:] = torch.cat(parts).view(*keys.shape, -1).numpy()
        return {"features": found}

    # --- one row after the other, whatever its neighbours

    def _keys(self, ids: Tensor) -> Tensor:
        """Of each row behind the seed of its sequence, int64 [batch, length - 2]."""
        ids = ids.to(self._device).long()
        key = hashed(hashed(torch.tensor(self.spec.seed, device=self._device), ids[:, :1]), ids[:, 1:2])
        return hashed(key, ids[:, _SEED_IDS:])

    def _stream(self, keys: Tensor, number: int) -> Tensor:
        return hashed(keys, torch.tensor(number, device=self._device))

    def _once(self, stream: int, number: int) -> Tensor:
        return _once(self.spec.seed, stream, number, self._device)

    def _rows_at_a_time(self) -> int:
        return max(1, _AT_A_TIME[self._device.type] // self.spec.features)

    def _sums(self, keys: Tensor) -> Tensor:
        """Activations [rows, d_model]."""
        magnitudes = self._magnitudes(keys)
        active = magnitudes > 0
        per_row = active.sum(dim=1)
        total = torch.nn.functional.embedding_bag(
            active.nonzero()[:, 1],
            self.directions,
            per_row.cumsum(0) - per_row,
            mode="sum",
            per_sample_weights=magnitudes[active],
        )
        if self.spec.noise:
            places = torch.arange(self.d_model, device=self._device)
            total += self.spec.noise * normal(hashed(self._stream(keys, _NOISE)[:, None], places))
        return total

    def _magnitudes(self, keys: Tensor) -> Tensor:
        """Of each feature, 0 where it does not fire, float32 [rows, features]."""
        fires = self._fires(keys)
        row, feature = fires.nonzero(as_tuple=True)
        drawn = normal(hashed(self._stream(keys, _SIZE)[row], feature))
        found = torch.zeros(fires.shape, device=self._device)
        found[row, feature] = (self._mean[feature] + self._spread[feature] * drawn).abs()
        if self.spec.hierarchy is not None and self.spec.hierarchy.scaled:
            for parents, children in _generations(self.spec.hierarchy):
                scale = found[:, parents] / self._mean[parents]
                found[:, children] *= scale.repeat_interleave(self.spec.hierarchy.branching, dim=1)
        return found

    def _fires(self, keys: Tensor) -> Tensor:
        """Bool [rows, features]."""
        drawn = uniform(hashed(self._stream(keys, _FIRES)[:, None], self._numbers))
        fires = drawn < self._chances(keys)
        if self.spec.hierarchy is not None:
            for parents, children in _generations(self.spec.hierarchy):
                family = fires[:, children].view(len(keys), -1, self.spec.hierarchy.branching)
                family &= fires[:, parents, None]
                if self.spec.hierarchy.exclusive:
                    self._choose(keys, family, self._numbers[children])
        # A row of nothing has no direction: where no feature fires, the most frequent one does.
        fires[:, 0] |= ~fires.any(dim=1)
        return fires

    def _chances(self, keys: Tensor) -> Tensor:
        """With which probability each feature would fire if its parent did, [features] or [rows, features]."""
        if self.spec.correlations is None:
            return self._chance
        ranks = torch.arange(self.spec.correlations.rank, device=self._device)
        factors = _stepped(normal(hashed(self._stream(keys, _FACTORS)[:, None], ranks)), 8)
        return torch.special.ndtr((factors @ self._weights.T + self._threshold) / self._own)

    def _choose(self, keys: Tensor, family: Tensor, numbers: Tensor) -> None:
        """Of siblings that fire together one is kept by lot: `family` bool [rows, parents, siblings], in place."""
        row, parent = (family.sum(dim=2) > 1).nonzero(as_tuple=True)
        siblings = numbers.view(family.shape[1:])[parent]
        lots = uniform(hashed(self._stream(keys, _CHOICE)[row, None], siblings))
        best = lots.masked_fill_(~family[row, parent], -1).argmax(dim=1)
        family[row, parent] = torch.nn.functional.one_hot(best, family.shape[2]).bool()


def load(rest: str, cache: Path, dtype: str, notify: Callable[[str], None]) -> Dictionary:
    """The dictionary of the spec in the YAML file `rest`, the built-in one where that is empty. Raises SaescaleError
    for a spec that is missing or wrong."""
    name = f"dictionary:{rest}" if rest else "dictionary"
    if dtype == "bfloat16":
        raise SaescaleError(f"{name} computes in float32 alone; leave --compute-dtype out")
    return Dictionary(name, read_spec(rest) if rest else DictionarySpec(), default_device())


def _once(seed: int, stream: int, number: int, device: torch.device) -> Tensor:
    """Standard normal numbers of the dictionary itself, float32 [number]."""
    key = hashed(torch.tensor(seed), torch.tensor(-1 - stream)).to(device)
    return normal(hashed(key, torch.arange(number, device=device)))


def _stepped(x: Tensor, bits: int) -> Tensor:
    """To multiples of 2^-bits: sums of products of such numbers are exact, whatever the order of a matrix product."""
    return (x * 2.0**bits).round_() * 2.0**-bits


def _frequencies(spec: DictionarySpec) -> Tensor:
    """How often each feature is to fire, float64 [features]: r^-exponent, stretched to reach from highest to lowest."""
    zipf = torch.arange(1, spec.features + 1, dtype=torch.float64) ** -spec.frequencies.exponent
    share = (zipf - zipf[-1]) / (zipf[0] - zipf[-1]).clamp_min(1e-30)
    return spec.frequencies.lowest + (spec.frequencies.highest - spec.frequencies.lowest) * share


def _compensated(frequency: Tensor, hierarchy: Hierarchy | None) -> Tensor:
    """With which probability each feature has to be drawn so that it fires about as often as `frequency` [features].

    A child is drawn frequency / frequency of its parent; an exclusive one as much more as it has rivals, which is
    near where siblings are rare, and at most 1.
    """
    chance = frequency.clone()
    if hierarchy is None:
        return chance
    for parents, children in _generations(hierarchy):
        family = frequency[children].view(-1, hierarchy.branching) / frequency[parents, None]
        if hierarchy.exclusive:
            family = family * (1 + family.sum(dim=1, keepdim=True) - family)
        chance[children] = family.flatten().clamp(max=1)
    return chance


def _generations(hierarchy: Hierarchy) -> Iterator[tuple[slice, slice]]:
    """Where the parents and the children of each level stand; the children of a parent stand side by side."""
    start = 0
    for parents, children in pairwise(hierarchy.levels()):
        yield slice(start, start + parents), slice(start + parents, start + parents + children)
        start += parents


def _directions(spec: DictionarySpec, device: torch.device) -> Tensor:
    """Unit rows [features, d_model]. Raises SaescaleError where they do not come as far apart as the spec asks."""
    found = _once(spec.seed, _DIRECTIONS, spec.features * spec.d_model, device).view(spec.features, -1)
    found = found / found.norm(dim=1, keepdim=True)
    if spec.coherence is None:
        return found
    for _ in range(_REPULSIONS):
        moved, worst = _apart(found, spec.coherence)
        if worst <= spec.coherence:
            return found
        found = moved
    raise SaescaleError(
        f"the dictionary's coherence {spec.coherence:g} was not reached: {spec.features:,} directions in "
        f"{spec.d_model} dimensions came to a largest |cosine| of {worst:.3g}; allow more, or ask for fewer features"
    )


def _apart(directions: Tensor, coherence: float) -> tuple[Tensor, float]:
    """Where a step takes them in which directions that are too near repel each other, and the largest |cosine| now."""
    moved, worst = [], 0.0
    size = 2**24 // len(directions) + 1
    for first, some in zip(range(0, len(directions), size), directions.split(size), strict=True):
        cosine = some @ directions.T
        cosine.diagonal(first).zero_()
        worst = max(worst, float(cosine.abs().max()))
        # A little further than asked, or the last steps would be endless.
        excess = cosine.sign() * (cosine.abs() - 0.95 * coherence).clamp_min(0)
        moved.append(some - 0.5 * excess @ directions)
    together = torch.cat(moved)
    return together / together.norm(dim=1, keepdim=True), worst
