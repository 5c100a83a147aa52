"""How laws are fitted: which ones, with how many refits behind each interval, from which seed."""

from dataclasses import dataclass

DEFAULT_LAWS = ("n_k", "n", "c")


@dataclass(frozen=True)
class FitSettings:
    """`bootstraps`: refits behind each interval (0: no intervals). Fits are deterministic in `seed`. `laws`: names.
    `keep_diverged`: whether cells with nmse above 1 are in the fits."""

    bootstraps: int = 1000
    seed: int = 0
    laws: tuple[str, ...] = DEFAULT_LAWS
    keep_diverged: bool = False
