"""`saescale plan RUN --metric ...`: which (N, k) reaches a value of a metric for the least training compute."""

from typing import Any, NamedTuple

import numpy as np

from saescale.cluster.sweep.assumed import cells_to_come
from saescale.cluster.sweep.proposal import Prior, Request
from saescale.cluster.sweep.propose import grid_of, levels_of, prior_of
from saescale.cluster.sweep.spec import SweepSpec, parse_spec
from saescale.cluster.sweep.work import work_of
from saescale.scaling.kinds import largest_kind, without_diverged
from saescale.scaling.laws.fit import fit_laws
from saescale.scaling.laws.over_metrics import fit_metrics, require_metrics
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.planning.devices import Work
from saescale.scaling.planning.reach import Reached, smallest, target_of, target_words
from saescale.scaling.sources import load_evals, load_sources
from saescale.storage.documents import yaml_text
from saescale.storage.errors import SaescaleError


class Way(NamedTuple):
    """At one k what reaches the target, and what training it takes: tokens, sparse training FLOPs and hours of the N
    that the law says, and FLOPs of the one that is `sure`; None where no N does."""

    reached: Reached
    tokens: int | None
    flops: float | None
    hours: float | None
    sure_flops: float | None


class ReachPlan(NamedTuple):
    """The answer; `best` is the way of least compute by the law, `surest` that whose cell reaches it in 97.5 %."""

    metric: str
    words: str
    ways: tuple[Way, ...]
    best: Way
    surest: Way | None
    prior: Prior
    base: dict[str, Any]
    d_model: int

    @property
    def spec(self) -> SweepSpec:
        """The sweep of the cell to train: the surest, or where there is none the best by the law."""
        return parse_spec(self.base | {"grid": {"cells": [self._cell]}}, "the plan")

    @property
    def _cell(self) -> dict[str, Any]:
        way = self.surest or self.best
        n = way.reached.sure if self.surest else way.reached.n_latents
        return {"n_latents": n, "k": int(way.reached.k), "seed": 0, **self.prior.cell}

    @property
    def _flops_per_s(self) -> float:
        flops, hours = len(self.spec.stores) * (self.best.flops or 0.0), self.best.hours
        return flops / (3600 * hours) if hours else 0.0

    def document(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "metric": self.metric, "reach": self.words, "prior": {"from": self.prior.words},
            "device": self.prior.device.document(self._flops_per_s),
            "ways": [_row(way) for way in self.ways],
            "best": _row(self.best), "surest": self.surest and _row(self.surest),
        }  # fmt: skip

    def yaml(self) -> str:
        """The sweep file."""
        document = self.spec.model_dump(mode="json", exclude={"grid"}) | {"grid": {"cells": [self._cell]}}
        return f"# The cell of least compute with {self.words}, by {self.prior.words}.\n" + yaml_text(document)


def make_reach(request: Request, metric: str, within: float | None, reach: float | None) -> ReachPlan:
    """Raises SaescaleError for a source without that metric, a target without meaning, and where no N reaches it."""
    if request.source is None:
        raise SaescaleError("--metric plans from the cells of a run that saescale eval measured: name the run")
    results, _ = load_sources([request.source])
    evals = load_evals([request.source])
    require_metrics([metric], results, evals)
    prior, base, d_model = prior_of(request)
    _, own = largest_kind(without_diverged(results))
    (laws,) = fit_metrics(
        fit_laws(own, None, FitSettings(0, laws=("n_k",))), evals, [metric], FitSettings(laws=("n_k",))
    )
    distance = target_of(laws.scale, within, reach)
    sizes, ks = levels_of(request, prior.cells, d_model)
    found = smallest(laws, distance, ks, float(sizes.min()), float(sizes.max()))
    ways = tuple(_way(each, prior, base, d_model) for each in found)
    best = min((way for way in ways if way.flops is not None), key=lambda way: way.flops or 0.0)
    surest = min((way for way in ways if way.sure_flops), key=lambda way: way.sure_flops or 0.0, default=None)
    words = f"L(N, k) of {metric}, of {len(laws.cells)} cells of {results.source}"
    prior = prior._replace(words=words)
    return ReachPlan(metric, target_words(laws.scale, distance), ways, best, surest, prior, base, d_model)


def _way(reached: Reached, prior: Prior, base: dict[str, Any], d_model: int) -> Way:
    if reached.n_latents is None:
        return Way(reached, None, None, None, None)
    tokens, work, stores = _cost(reached.n_latents, reached.k, prior, base, d_model)
    sure = None if reached.sure is None else _cost(reached.sure, reached.k, prior, base, d_model)[1].flops
    return Way(reached, tokens, work.flops, stores * prior.device.seconds(work) / 3600, sure)


def _cost(n: int, k: float, prior: Prior, base: dict[str, Any], d_model: int) -> tuple[int, Work, int]:
    """(tokens, what training takes) of one cell, and over how many stores the sweep trains it."""
    grid = grid_of(np.array([n]), np.array([k]), [[0]], prior)
    spec: SweepSpec = parse_spec(base | {"grid": {"cells": grid}}, "the plan")
    (cell, *_) = cells_to_come(spec, d_model)
    return cell.tokens, work_of(cell), len(spec.stores)


def _row(way: Way) -> dict[str, Any]:
    costs = {"tokens": way.tokens, "flops": way.flops, "hours": way.hours, "sure_flops": way.sure_flops}
    return {**way.reached._asdict(), "k": int(way.reached.k), **costs}
