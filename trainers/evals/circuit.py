"""How much of what the subject can do is left with x_hat in place of x.

For each task that the subject can have (trainers/tasks: indirect objects, greater-than, induction) on 32 prompts. At
every position but the first token of the subject the stream at the site becomes x_hat with the token's own mean and
norm put back; the task's metric is read, and

    recovered = (metric with x_hat - metric with the mean) / (metric as it is - metric with the mean)

where the mean is that of x over all those positions of all prompts, in which nothing is left of any of them. That is
whether x_hat is sufficient. Whether it is necessary says the rest, with x - x_hat + the mean in place of x (Makelov et
al. 2024):

    necessary = (metric as it is - metric with the rest) / (metric as it is - metric with the mean)

| metric, behind the task's name | what |
|---|---|
| `recovered`, `necessary` | as above |
| `sae`, `clean`, `mean` | the metric with x_hat, as it is, and with the mean |
| `end_recovered`, `end_necessary` | the same, where x is replaced at the positions alone that the metric is read from |
| `end_supervised`, `end_supervised_necessary` | there, of a dictionary made with the truth (circuit_supervised.py) |
| `end_gap` | what the SAE lacks of `end_supervised` |

Shares are told only of a subject that does the task: where the metric as it is may be what it is with the mean (its
95 % interval over prompts), there is nothing to recover, and it says so. Intervals are over prompts. circuit_latents.py
says how few latents carry what is recovered.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.source import Source
from saescale.trainers.evals.circuit_cases import Case, cases
from saescale.trainers.evals.circuit_supervised import supervised
from saescale.trainers.evals.evaluation import LeftOut, Measurement, Need
from saescale.trainers.evals.intervals import SEED, Sums, by_document, mean_of, ratio
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.subject import Subject
from saescale.trainers.tasks.task import TASKS

needs: frozenset[Need] = frozenset({"subject"})
metrics = {
    f"{task}_{name}": Metric(
        "higher", limit=1.0, beside=tuple(f"{task}_{other}" for other in beside), leads=name == "recovered"
    )
    for task in TASKS.names()
    for name, beside in (
        ("recovered", ()),
        ("necessary", ()),
        ("end_recovered", ("end_supervised",)),
        ("end_necessary", ("end_supervised_necessary",)),
    )
}


class Prepared(NamedTuple):
    """A task, and its metric of each prompt, [prompts]: as it is, with the mean everywhere, and where it is read from
    alone; and there with the supervised dictionary and with what that leaves, none where the task has no attributes."""

    case: Case
    average: Tensor  # of x, [d_model]
    clean: np.ndarray
    mean: np.ndarray
    end_mean: np.ndarray
    supervised: dict[str, np.ndarray]


def prepare(source: Source, subject: Subject | None) -> list[Prepared | LeftOut]:
    """Raises Unsuited where the subject can have no task."""
    return [case if isinstance(case, LeftOut) else _prepared(case) for case in cases(subject, source.site)]


def measure(
    trained: Trained, source: Source, subject: Subject | None, prepared: list[Prepared | LeftOut]
) -> Iterator[Measurement | LeftOut]:
    for of_task in prepared:
        if isinstance(of_task, LeftOut):
            yield of_task
            continue
        for each in _recovered(trained, of_task):
            yield each._replace(metric=f"{of_task.case.name}_{each.metric}")


def _prepared(case: Case) -> Prepared:
    average = case.raw.mean(dim=0)
    everywhere = average.expand(len(case.raw), -1)
    truth: dict[str, np.ndarray] = {}
    if case.prompts.attributes:
        found = supervised(case.subject, case.site, case.task, case.prompts)
        at = torch.arange(len(found))[:, None], case.prompts.reads
        for name, rows in (("truth", found), ("truth_rest", case.resid[at].float() - found + average)):
            stream = case.resid.clone()
            stream[at] = rows.to(stream)
            truth[name] = case.measured(stream)
    mean, end_mean = (case.measured(case.with_rows(everywhere, at)) for at in (None, case.read_from))
    return Prepared(case, average, case.measured(case.resid), mean, end_mean, truth)


def _recovered(trained: Trained, of: Prepared) -> Iterator[Measurement | LeftOut]:
    case = of.case
    rows = trained.reconstruct(case.raw)
    rest = case.raw - rows.to(case.raw) + of.average
    columns = {
        "sae": case.measured(case.with_rows(rows)),
        "rest": case.measured(case.with_rows(rest)),
        "end": case.measured(case.with_rows(rows, case.read_from)),
        "end_rest": case.measured(case.with_rows(rest, case.read_from)),
        "clean": of.clean,
        "mean": of.mean,
        "end_mean": of.end_mean,
        "prompts": np.ones(len(of.clean)),
        **of.supervised,
    }
    statistics = {name: ratio(name, "prompts") for name in ("sae", "clean", "mean")}
    if _does(of.clean - of.mean):
        statistics["recovered"] = _share("sae", "mean", "mean", "clean")
        statistics["necessary"] = _share("clean", "rest", "mean", "clean")
    does_at_end = _does(of.clean - of.end_mean)
    if does_at_end:
        statistics["end_recovered"] = _share("end", "end_mean", "end_mean", "clean")
        statistics["end_necessary"] = _share("clean", "end_rest", "end_mean", "clean")
    if of.supervised and does_at_end:
        statistics["end_supervised"] = _share("truth", "end_mean", "end_mean", "clean")
        statistics["end_supervised_necessary"] = _share("clean", "truth_rest", "end_mean", "clean")
        statistics["end_gap"] = _share("truth", "end", "end_mean", "clean")
    for name, found in by_document(np.arange(len(of.clean)), columns, statistics).items():
        yield Measurement(name, *found, n=len(of.clean), seed=SEED)
    for name, where in (("recovered", ""), ("end_recovered", " where it is read from")):
        if name not in statistics:
            yield LeftOut(name, f"the subject may not do it: with the mean of x{where} its metric may be the same")


def _does(gain: np.ndarray) -> bool:
    """Whether the mean of `gain` [prompts] is surely above 0."""
    low = mean_of(gain).low
    return low is not None and low > 0


def _share(of: str, less: str, low: str, high: str) -> Callable[[Sums], np.ndarray]:
    """(of - less) / (high - low)."""
    return lambda sums: np.asarray((sums[of] - sums[less]) / (sums[high] - sums[low]))
