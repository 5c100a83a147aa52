"""How much of what the subject can do is left with x_hat in place of x.

For each task that the subject can have (trainers/tasks: indirect objects, greater-than, induction) on 32 prompts. At
every position but the first token of the subject the stream at the site becomes x_hat with the token's own mean and
norm put back; the task's metric is read, and

    recovered = (metric with x_hat - metric with the mean) / (metric as it is - metric with the mean)

where the mean is that of x over all those positions of all prompts, in which nothing is left of any of them.

| metric, behind the task's name | what |
|---|---|
| `recovered` | as above |
| `sae`, `clean`, `mean` | the metric with x_hat, as it is, and with the mean |
| `end_recovered` | the same as `recovered`, where x is replaced at the positions alone that the metric is read from |
| `end_supervised` | of a dictionary made with the truth in hand (circuit_supervised.py), at those positions |
| `end_gap` | what the SAE lacks of it |

Intervals are over prompts. circuit_latents.py says how few latents carry what is recovered.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from saescale.scaling.metrics import Metric
from saescale.storage.sources.source import Source
from saescale.trainers.evals.circuit_cases import Case, cases
from saescale.trainers.evals.circuit_supervised import supervised
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.intervals import SEED, Sums, by_document, ratio
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.subject import Subject
from saescale.trainers.tasks.task import TASKS

needs: frozenset[Need] = frozenset({"subject"})
metrics = {
    f"{task}_{name}": Metric("higher", limit=1.0, beside=tuple(f"{task}_{other}" for other in beside))
    for task in TASKS.names()
    for name, beside in (("recovered", ()), ("end_recovered", ("end_supervised",)))
}


class Prepared(NamedTuple):
    """A task, and its metric of each prompt, [prompts]: as it is, with the mean everywhere, and where it is read from
    alone; and with the supervised dictionary there, None where the task has no attributes."""

    case: Case
    clean: np.ndarray
    mean: np.ndarray
    end_mean: np.ndarray
    end_supervised: np.ndarray | None


def prepare(source: Source, subject: Subject | None) -> list[Prepared]:
    """Raises Unsuited where the subject can have no task."""
    return [_prepared(case) for case in cases(subject, source.site)]


def measure(
    trained: Trained, source: Source, subject: Subject | None, prepared: list[Prepared]
) -> Iterator[Measurement]:
    for of_task in prepared:
        for each in _recovered(trained, of_task):
            yield each._replace(metric=f"{of_task.case.name}_{each.metric}")


def _prepared(case: Case) -> Prepared:
    mean = case.raw.mean(dim=0).expand(int(case.replaced.sum()), -1)
    truth = None
    if case.prompts.attributes:
        rows = supervised(case.subject, case.site, case.task, case.prompts)
        stream = case.resid.clone()
        stream[torch.arange(len(stream))[:, None], case.prompts.reads] = rows.to(stream)
        truth = case.measured(stream)
    return Prepared(
        case,
        case.measured(case.resid),
        case.measured(case.with_rows(mean)),
        case.measured(case.with_rows(mean, case.read_from)),
        truth,
    )


def _recovered(trained: Trained, of: Prepared) -> Iterator[Measurement]:
    case = of.case
    rows = trained.reconstruct(case.raw)
    columns = {
        "sae": case.measured(case.with_rows(rows)),
        "end": case.measured(case.with_rows(rows, case.read_from)),
        "clean": of.clean,
        "mean": of.mean,
        "end_mean": of.end_mean,
        "prompts": np.ones(len(of.clean)),
    }
    statistics = {
        "recovered": _share("sae", "mean"),
        "end_recovered": _share("end", "end_mean"),
        **{name: ratio(name, "prompts") for name in ("sae", "clean", "mean")},
    }
    if of.end_supervised is not None:
        columns["truth"] = of.end_supervised
        statistics["end_supervised"] = _share("truth", "end_mean")
        statistics["end_gap"] = lambda sums: (sums["truth"] - sums["end"]) / (sums["clean"] - sums["end_mean"])
    for name, found in by_document(np.arange(len(of.clean)), columns, statistics).items():
        yield Measurement(name, *found, n=len(of.clean), seed=SEED)


def _share(of: str, zero: str) -> Callable[[Sums], np.ndarray]:
    return lambda sums: np.asarray((sums[of] - sums[zero]) / (sums["clean"] - sums[zero]))
