"""A cell before its store is known."""

import json
from typing import Any, NamedTuple, Self

from saescale.cluster.sweep.grid import Combination
from saescale.cluster.sweep.train import Way
from saescale.storage.errors import SaescaleError
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.cell import whole_settings


class Planned(NamedTuple):
    """A combination of the grid, and the numbers of its training."""

    n_latents: int
    k: int
    architecture: str
    seed: int
    tokens: int
    batch_tokens: int
    lr: float
    ema: float
    dead_after_tokens: int
    stream_seed: int
    settings: str  # JSON; k_aux may be "auto" there

    @classmethod
    def of(cls, combination: Combination, way: Way) -> Self:
        n_latents = combination.n_latents
        return cls(
            *combination, way.tokens_at(n_latents), way.batch_tokens, way.rate_at(n_latents), way.ema,
            way.dead_after_tokens, way.stream_seed, way.settings,
        )  # fmt: skip

    @property
    def combination(self) -> Combination:
        return Combination(*self[:4])

    @property
    def name(self) -> str:
        """What it is called in what is said of it."""
        return f"the cells of n = {self.n_latents}, k = {self.k}, {self.architecture}"

    def check(self) -> None:
        """Raises ValueError, in one line, where its architecture cannot have these settings."""
        try:
            self._settings().check(self.n_latents)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def try_out(self) -> None:
        """Raises ValueError where its architecture is a file of the user's that fails on a few rows."""
        if ARCHITECTURES.own(self.architecture) is None:
            return
        from saescale.trainers.architectures.trial import try_out

        try:
            try_out(self.architecture, self._settings(), self.n_latents)
        except SaescaleError as error:
            raise ValueError(str(error)) from error

    def _settings(self) -> Any:
        """Those of its architecture; the defaults in place of what depends on the store."""
        settings = {name: value for name, value in json.loads(self.settings).items() if value != "auto"}
        return whole_settings(self.architecture, self.k, settings)
