"""How much of what the subject can do is left with x_hat in place of x, and how few latents carry it.

For each task that the subject can have (trainers/tasks: indirect objects, greater-than, induction) on 32 prompts. At
every position but the first token of the subject the stream at the site becomes x_hat with the token's own mean and
norm put back; the task's metric is read, and

    recovered = (metric with x_hat - metric with the mean) / (metric as it is - metric with the mean)

where the mean is that of x over all those positions of all prompts, in which nothing is left of any of them.

| metric, behind the task's name | what |
|---|---|
| `recovered` | as above |
| `sae`, `clean`, `mean` | the metric with x_hat, as it is, and with the mean |
| `latents80`, `latents90` | the fewest latents that carry 80 and 90 % of what the SAE recovers (circuit_latents.py) |
| `random80` | what as many latents by lot bring back, of those that are active at all |
| `active` | how many latents are active anywhere in the prompts |
| `end_recovered` | the same as `recovered`, where x is replaced at the positions alone that the metric is read from |
| `end_supervised` | of a dictionary made with the truth in hand (circuit_supervised.py), at those positions |
| `end_gap` | what the SAE lacks of it |

Intervals are over prompts. Where the SAE recovers nothing that is surely above 0, there are no latents that carry it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.source import Source
from saescale.trainers.evals.circuit_latents import carriers
from saescale.trainers.evals.circuit_supervised import supervised
from saescale.trainers.evals.evaluation import Measurement, Need, Unsuited
from saescale.trainers.evals.intervals import SEED, by_document
from saescale.trainers.evals.splice import TOKENS_AT_A_TIME
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.subject import Subject
from saescale.trainers.subjects.transformer import Transformer
from saescale.trainers.tasks.task import METRIC, TASKS, Prompts, Task, find_task, read, steerable

PROMPTS = 32

needs: frozenset[Need] = frozenset({"subject"})
metrics = {
    f"{task}_{name}": metric
    for task in TASKS.names()
    for name, metric in {
        "recovered": Metric("higher", limit=1.0),
        "end_recovered": Metric("higher", limit=1.0),
        "latents80": Metric("lower"),
        "latents90": Metric("lower"),
    }.items()
}


class Case(NamedTuple):
    """A task at the site, with the subject as it is."""

    subject: Transformer
    site: Site
    name: str
    task: Task
    prompts: Prompts
    resid: Tensor  # [prompts, length, d_model], of the subject's dtype
    replaced: Tensor  # bool [prompts, length]
    read_from: Tensor  # bool [prompts, length], of the replaced ones
    clean: np.ndarray  # the metric, [prompts]; as all below
    mean: np.ndarray
    end_mean: np.ndarray  # with the mean at the positions alone that are read from
    end_supervised: np.ndarray | None  # None where the task has no attributes

    @property
    def raw(self) -> Tensor:
        """x, float32 [rows, d_model]: the stream at the positions that are replaced."""
        return self.resid[self.replaced].float()

    def with_rows(self, rows: Tensor, at: Tensor | None = None) -> Tensor:
        """The stream with `rows` at the replaced positions, or those that are `at` besides; gradients go through it."""
        where = self.replaced if at is None else at
        stream = self.resid.clone()
        stream[where] = (rows if at is None else rows[at[self.replaced]]).to(stream)
        return stream

    def metric(self, stream: Tensor) -> Tensor:
        """Of each prompt with that stream at the site, float32 [prompts]; gradients go through it."""
        found = []
        for some in _parts(self.prompts):
            prompts = self.prompts.part(some)
            logits = self.subject.resume(prompts.ids, self.site, stream[some], self.prompts.last)
            found.append(self.task.score(prompts, read(prompts, logits))[METRIC])
        return torch.cat(found)

    def measured(self, stream: Tensor) -> np.ndarray:
        """The same without gradients, float64."""
        return self.metric(stream.detach()).double().cpu().numpy()


def prepare(source: Source, subject: Subject | None) -> list[Case]:
    """The tasks that the subject can have. Raises Unsuited where there is none."""
    assert subject is not None, "it is in `needs`"
    found, why = [], []
    for name in TASKS.names():
        try:
            found.append(_case(subject, source.site, name))
        except SaescaleError as error:
            why.append(f"{name}: {error}")
    if not found:
        raise Unsuited(f"the subject {subject.name} can have no task ({'; '.join(why)})")
    return found


def measure(trained: Trained, source: Source, subject: Subject | None, prepared: list[Case]) -> Iterator[Measurement]:
    for case in prepared:
        for each in _of_case(trained, case):
            yield each._replace(metric=f"{case.name}_{each.metric}")


def _case(subject: Subject, site: Site, name: str) -> Case:
    task, ours = find_task(name), steerable(subject)
    prompts = task.prompts(subject, PROMPTS, SEED)
    resid = stream_of(ours, site, prompts)
    replaced = prompts.within.to(resid.device)
    if getattr(subject, "bos_token_id", None) is not None:
        replaced[:, 0] = False
    read_from = torch.zeros_like(replaced)
    read_from[torch.arange(len(resid))[:, None], prompts.reads] = True
    nothing = np.empty(0)
    case = Case(ours, site, name, task, prompts, resid, replaced, read_from, nothing, nothing, nothing, None)
    mean = case.raw.mean(dim=0).expand(int(replaced.sum()), -1)
    truth = None
    if prompts.attributes:
        rows = supervised(ours, site, task, prompts)
        stream = resid.clone()
        stream[torch.arange(len(resid))[:, None], prompts.reads] = rows.to(stream)
        truth = case.measured(stream)
    return case._replace(
        clean=case.measured(resid),
        mean=case.measured(case.with_rows(mean)),
        end_mean=case.measured(case.with_rows(mean, read_from)),
        end_supervised=truth,
    )


def _of_case(trained: Trained, case: Case) -> Iterator[Measurement]:
    rows = trained.reconstruct(case.raw)
    sae, end = case.measured(case.with_rows(rows)), case.measured(case.with_rows(rows, case.read_from))
    columns = {
        "sae": sae, "clean": case.clean, "mean": case.mean, "end": end, "end_mean": case.end_mean,
        "prompts": np.ones(len(sae)),
    }  # fmt: skip
    if case.end_supervised is not None:
        columns["end_supervised"] = case.end_supervised

    def recovered(of: str, zero: str) -> object:
        return lambda sums: (sums[of] - sums[zero]) / (sums["clean"] - sums[zero])

    def per_prompt(of: str) -> object:
        return lambda sums: sums[of] / sums["prompts"]

    statistics = {"recovered": recovered("sae", "mean"), "end_recovered": recovered("end", "end_mean")}
    if case.end_supervised is not None:
        statistics |= {
            "end_supervised": recovered("end_supervised", "end_mean"),
            "end_gap": lambda sums: (sums["end_supervised"] - sums["end"]) / (sums["clean"] - sums["end_mean"]),
        }
    statistics |= {of: per_prompt(of) for of in ("sae", "clean", "mean")}
    found = by_document(np.arange(len(sae)), columns, statistics)
    for name, estimate in found.items():
        yield Measurement(name, *estimate, n=len(sae), seed=SEED)
    low = found["recovered"].low
    if low is not None and low > 0:
        yield from carriers(trained, case.raw, lambda rows: case.metric(case.with_rows(rows)))


def stream_of(subject: Transformer, site: Site, prompts: Prompts) -> Tensor:
    """The stream at the site, [prompts, length, d_model], one that gradients may be taken at."""
    found = [subject.run(prompts.ids[some], [site]).resid[0] for some in _parts(prompts)]
    return torch.cat([each.clone() for each in found])


def _parts(prompts: Prompts) -> Sequence[slice]:
    step = max(1, TOKENS_AT_A_TIME // prompts.ids.shape[1])
    return [slice(start, start + step) for start in range(0, len(prompts.ids), step)]
