"""Laws of run directories and tables in one call, as a notebook asks for them."""

from collections.abc import Sequence
from typing import Any

from saescale.scaling.comparison.compare import side_by_side
from saescale.scaling.comparison.peaks import find_peaks
from saescale.scaling.laws.fit import fit_laws
from saescale.scaling.laws.over_metrics import fit_metrics, require_metrics
from saescale.scaling.laws.settings import DEFAULT_LAWS, FitSettings
from saescale.scaling.sources import load_evals, load_sources
from saescale.scaling.where import parse_condition
from saescale.storage.columns import EVALS


def fit(
    *sources: str,
    laws: Sequence[str] = DEFAULT_LAWS,
    bootstraps: int = 1000,
    seed: int = 0,
    metric: str | Sequence[str] = (),
    where: str | Sequence[str] = (),
    keep_diverged: bool = False,
) -> dict[str, Any]:
    """The document of fits.json for run directories, CSV or Parquet tables; several are put together.

    `laws` are their names, `bootstraps` the fits behind each 95 % interval, `seed` that of the bootstrap, `metric` what
    evaluations measured and laws are fitted to besides nmse, such as "downstream_loss.kl" or, of a part of it,
    "board_probe.accuracy_x_hat@corner", under `metrics` of the document; `where` the cells that are fitted, such as
    "architecture=topk" or ("k>=16", "k<=64"); `keep_diverged` fits those with nmse above 1 too. Cells of several
    architectures or sites have laws of their own, whose entries say `of` what they are. Raises SaescaleError for what
    cannot be read, for an unknown law or metric, and for values that no law can take.
    """
    metrics = [metric] if isinstance(metric, str) else metric
    conditions = [parse_condition(text) for text in ([where] if isinstance(where, str) else where)]
    results, curves = load_sources(sources, where=conditions)
    settings = FitSettings(bootstraps, seed=seed, laws=tuple(laws), keep_diverged=keep_diverged)
    evals = load_evals(sources) if metrics else EVALS.empty_table()
    require_metrics(metrics, results, evals)  # before anything is fitted
    fitted = fit_laws(results, curves, settings)
    found = fitted.document() | side_by_side(fitted, curves).document()
    of_metrics = fit_metrics(fitted, evals, metrics, settings) if metrics else ()
    peaks = [peaks.document() for peaks in find_peaks(of_metrics)]
    return found | ({"metrics": [m.document() for m in of_metrics], "peaks": peaks} if metrics else {})
