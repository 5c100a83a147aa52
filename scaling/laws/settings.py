"""How laws are fitted: which ones, with how many refits behind each interval, from which seed."""

from dataclasses import dataclass

DEFAULT_LAWS = ("n_k", "n", "c")
LEAST_BOOTSTRAPS = 40  # of fewer refits none stands for the outer 2.5 % on either side


@dataclass(frozen=True)
class FitSettings:
    """`bootstraps`: refits behind each interval (fewer than 40: no intervals). Fits are deterministic in `seed`.
    `laws`: names. `keep_diverged`: whether cells with nmse above 1 are in the fits."""

    bootstraps: int = 1000
    seed: int = 0
    laws: tuple[str, ...] = DEFAULT_LAWS
    keep_diverged: bool = False

    @property
    def refits(self) -> int:
        """How many refits are made: none where they would be too few for an interval."""
        return self.bootstraps if self.bootstraps >= LEAST_BOOTSTRAPS else 0
