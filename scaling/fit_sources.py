"""Laws of run directories and tables in one call, as a notebook asks for them."""

from collections.abc import Sequence
from typing import Any

from saescale.scaling.comparison.compare import side_by_side
from saescale.scaling.laws.fit import fit_laws
from saescale.scaling.laws.settings import DEFAULT_LAWS, FitSettings
from saescale.scaling.sources import load_sources


def fit(*sources: str, laws: Sequence[str] = DEFAULT_LAWS, bootstraps: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The document of fits.json for run directories, CSV or Parquet tables; several are put together.

    `laws` are their names, `bootstraps` the fits behind each 95 % interval, `seed` that of the bootstrap. Raises
    SaescaleError for what cannot be read, for an unknown law, and for values that no law can take.
    """
    results, curves = load_sources(sources)
    fitted = fit_laws(results, curves, FitSettings(bootstraps, seed=seed, laws=tuple(laws)))
    return fitted.document() | side_by_side(fitted, curves).document()
