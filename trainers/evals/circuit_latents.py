"""The fewest latents of an SAE that carry a task.

Every latent is set to its mean over the rows, m_none, and some get their values back. Which ones is told by attribution
patching (Nanda 2023, Marks et al. 2024): the metric's gradient at the latent times its distance from the mean, summed
over rows, with the gradient averaged over four points of the way from the means to all values. What so many of the
first ones bring back is not taken from there but run:

    share = (metric with m latents - m_none) / (metric with all - m_none)

m is doubled until the share is reached, then bisected to a twentieth: what is told is a number that reaches the share
and, as far as the share rises with m, the least. A row's norm and mean stay its own throughout.

| metric, behind the task's name | what |
|---|---|
| `latents80`, `latents90` | the fewest latents with a share of 80 and 90 % |
| `random80` | the share of as many latents as `latents80`, by lot among those that are active at all |
| `active` | how many latents are active anywhere in the prompts |
| `gain` | the metric with all less that with none; where that may be 0, nothing carries it, and it says so |

Intervals are over prompts. It costs some 25 passes through the blocks behind the site for each task.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from saescale.scaling.metrics import Metric as Declared
from saescale.storage.source import Source
from saescale.trainers.evals.circuit_cases import Case, cases
from saescale.trainers.evals.decoder import TRIED_ROWS, linear_decoder
from saescale.trainers.evals.evaluation import LeftOut, Measurement, Need
from saescale.trainers.evals.intervals import RESAMPLES, SEED, mean_of
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise
from saescale.trainers.subjects.subject import Subject
from saescale.trainers.tasks.task import TASKS

SHARES = {"latents80": 0.8, "latents90": 0.9}
POINTS = 4  # at which the gradient is taken
RANDOM = 3  # draws of as many latents by lot

Metric = Callable[[Tensor], Tensor]  # of rows in place of x, float32 [rows, d_model] -> [prompts]

needs: frozenset[Need] = frozenset({"subject"})
metrics = {f"{task}_{name}": Declared("lower") for task in TASKS.names() for name in SHARES}


def prepare(source: Source, subject: Subject | None) -> list[Case | LeftOut]:
    """Raises Unsuited where the subject can have no task."""
    return cases(subject, source.site)


def measure(
    trained: Trained, source: Source, subject: Subject | None, prepared: list[Case | LeftOut]
) -> Iterator[Measurement | LeftOut]:
    for case in prepared:
        if isinstance(case, LeftOut):
            yield case
            continue
        latents = Latents(trained, case.raw)
        for each in carriers(latents, lambda rows, case=case: case.metric(case.with_rows(rows))):  # type: ignore[misc]
            yield each._replace(metric=f"{case.name}_{each.metric}")


def carriers(latents: "Latents", metric: Metric) -> Iterator[Measurement | LeftOut]:
    """How many latents carry the metric, if the SAE recovers any of it."""
    order = latents.attribution(metric).argsort(descending=True, stable=True)
    none, whole = _measured(metric, latents.none), _measured(metric, latents.rows())
    gain = mean_of(whole - none)
    n = len(none)
    yield Measurement("active", len(order), n=n)
    yield Measurement("gain", *gain, n=n, seed=SEED)
    if gain.low is None or gain.low <= 0:
        yield LeftOut("latents", "no latents carry it: with none of them the metric may be what it is with all")
        return
    found = fewest(latents, metric, order, Kept(none, whole, len(order)))
    for name, share in SHARES.items():
        yield Measurement(name, *found.least(share), n=n, seed=SEED)
    few = int(found.least(SHARES["latents80"])[0])
    draw = torch.Generator().manual_seed(SEED)
    lots = [torch.randperm(len(order), generator=draw)[:few].to(order.device) for _ in range(RANDOM)]
    shares = [found.share(_measured(metric, latents.rows(lot))) for lot in lots]
    yield Measurement("random80", float(np.mean(shares)), n=n, seed=SEED)


class Latents:
    """What an SAE makes of rows, as a function of the latents that keep their values."""

    def __init__(self, trained: Trained, raw: Tensor) -> None:
        """Of the rows `raw` [rows, d_model]. Raises Unsuited where x_hat is not z W + b of latents without signs."""
        decoder = linear_decoder(trained.sae, normalise(raw[:TRIED_ROWS].to(trained.origin.device)))
        sparse = trained.encode_sparse(raw)
        active = sparse.indices >= 0
        self.ids, place = sparse.indices[active].unique(return_inverse=True)  # of those that are active, ascending
        z = torch.zeros(len(raw), len(self.ids), device=sparse.values.device)
        z[active.nonzero()[:, 0], place] = sparse.values[active]
        self.mean = z.mean(dim=0)
        self.away = z - self.mean  # [rows, active]
        self.W = decoder.W[self.ids]
        raw = raw.float().to(z.device)
        centre = raw.mean(dim=1, keepdim=True)
        self.norm = (raw - centre).norm(dim=1, keepdim=True)
        self.none = (self.mean @ self.W + decoder.b) * self.norm + centre  # all latents at their means

    def rows(self, kept: Tensor | None = None) -> Tensor:
        """x_hat in raw space, [rows, d_model], of the latents at these places (None: all)."""
        away, W = (self.away, self.W) if kept is None else (self.away[:, kept], self.W[kept])
        return self.none + away @ W * self.norm

    def attribution(self, metric: Metric) -> Tensor:
        """Of each active latent, in units of the metric, summed over prompts: [active]."""
        whole = self.rows() - self.none
        gradient = torch.zeros_like(whole)
        for point in range(POINTS):
            x = (self.none + (point + 0.5) / POINTS * whole).requires_grad_()
            gradient += torch.autograd.grad(metric(x).sum(), x)[0].to(x) / POINTS
        return (self.away * ((gradient * self.norm) @ self.W.T)).sum(dim=0)


class Kept:
    """The metric of each prompt, float64 [prompts], with all latents at their means, with all values, and with so many
    of the first ones."""

    def __init__(self, none: np.ndarray, whole: np.ndarray, number: int) -> None:
        self.none, self.whole = none, whole
        self.tried = {0: none, number: whole}

    def share(self, metric: np.ndarray) -> float:
        """What is back, over all prompts."""
        return float(self._shares(metric, np.ones((len(self.none), 1)))[0])

    def _shares(self, metric: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Over so many of each prompt, counts [prompts, resamples]: [resamples]."""
        return np.asarray((metric - self.none) @ counts / ((self.whole - self.none) @ counts))

    def least(self, share: float) -> tuple[float, float | None, float | None]:
        """The smallest number tried that brings back the share, and an interval over prompts: of the numbers at which
        resamples cross it, between the numbers that were tried on a logarithmic scale."""
        numbers = np.array(sorted(self.tried))
        value = next(float(m) for m in numbers if self.share(self.tried[m]) >= share)
        prompts = len(self.none)
        counts = np.random.default_rng(SEED).multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES).T
        with np.errstate(divide="ignore", invalid="ignore"):
            curves = np.stack([self._shares(self.tried[m], counts) for m in numbers])  # [numbers, resamples]
        curves = np.maximum.accumulate(np.nan_to_num(curves, nan=-np.inf), axis=0)
        after = (curves >= share).argmax(axis=0)
        low, high = np.log(numbers[np.maximum(after - 1, 0)].clip(1)), np.log(numbers[after].clip(1))
        each = np.arange(RESAMPLES)
        below, above = curves[np.maximum(after - 1, 0), each], curves[after, each]
        part = np.clip((share - below) / np.maximum(above - below, 1e-12), 0, 1)
        crossings = np.exp(low + part * (high - low))
        ends = np.quantile(crossings, [0.025, 0.975])
        return value, float(min(ends[0], value)), float(max(ends[1], value))


def fewest(latents: Latents, metric: Metric, order: Tensor, kept: Kept) -> Kept:
    """`kept` with the first latents of `order`, tried with as many as it takes to tell the least of each share."""

    def reaches(number: int, share: float) -> bool:
        if number not in kept.tried:
            kept.tried[number] = _measured(metric, latents.rows(order[:number]))
        return bool(kept.share(kept.tried[number]) >= share)

    for share in SHARES.values():
        high = 1
        while high < len(order) and not reaches(high, share):
            high *= 2
        low, high = high // 2, min(high, len(order))
        while high - low > max(1, high // 20):
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle, share) else (middle, high)
    return kept


def _measured(metric: Metric, rows: Tensor) -> np.ndarray:
    return metric(rows.detach()).detach().double().cpu().numpy()
