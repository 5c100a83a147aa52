"""In which order architectures are named, everywhere: a pure function of the names."""

from collections.abc import Iterable

# Those that select exactly, those with a penalty, and the baselines which they must beat; each with its kin.
KNOWN = (
    "topk", "batchtopk", "matryoshka", "hierarchical_topk", "switch",
    "jumprelu", "gated", "prolu", "relu",
    "frozen_decoder", "frozen_encoder", "pca",
)  # fmt: skip
# Their latents, or half of them, were never trained.
BASELINES = ("frozen_decoder", "frozen_encoder", "pca")


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once: trained ones of saescale, then a user's by name, then baselines."""
    places = {name: place for place, name in enumerate(KNOWN)}
    return tuple(sorted(set(names), key=lambda name: (name in BASELINES, places.get(name, len(KNOWN)), name)))
