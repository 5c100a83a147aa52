"""Tasks at the site of a store, with the subject as it is, and its metric with another stream there."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.trainers.evals.evaluation import LeftOut, Unsuited
from saescale.trainers.evals.intervals import SEED
from saescale.trainers.evals.splice import TOKENS_AT_A_TIME
from saescale.trainers.subjects.subject import Subject
from saescale.trainers.subjects.transformer import Transformer
from saescale.trainers.tasks.task import METRIC, TASKS, Prompts, Task, find_task, read, steerable

PROMPTS = 32


class Case(NamedTuple):
    """A task at the site, with the subject as it is."""

    subject: Transformer
    site: Site
    name: str
    task: Task
    prompts: Prompts
    resid: Tensor  # [prompts, length, d_model], of the subject's dtype
    replaced: Tensor  # bool [prompts, length]
    read_from: Tensor  # bool [prompts, length]: those of them that the metric is read from

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


def cases(subject: Subject | None, site: Site) -> list[Case | LeftOut]:
    """The tasks on 32 prompts each, and which ones the subject cannot have. Raises Unsuited where it can have none."""
    assert subject is not None, "it is in `needs`"
    found: list[Case | LeftOut] = []
    for name in TASKS.names():
        try:
            found.append(_case(subject, site, name))
        except SaescaleError as error:
            found.append(LeftOut(name, str(error)))
    why = [f"{each.metric}: {each.left_out}" for each in found if isinstance(each, LeftOut)]
    if len(why) == len(found):
        raise Unsuited(f"the subject {subject.name} can have no task ({'; '.join(why)})")
    return found


def _case(subject: Subject, site: Site, name: str) -> Case:
    task, ours = find_task(name), steerable(subject)
    prompts = task.prompts(subject, PROMPTS, SEED)
    resid = stream_of(ours, site, prompts)
    replaced = prompts.within.to(resid.device)
    if getattr(subject, "bos_token_id", None) is not None:
        replaced[:, 0] = False
    read_from = torch.zeros_like(replaced)
    read_from[torch.arange(len(resid))[:, None], prompts.reads] = True
    return Case(ours, site, name, task, prompts, resid, replaced, read_from)


def stream_of(subject: Transformer, site: Site, prompts: Prompts) -> Tensor:
    """The stream at the site, [prompts, length, d_model], one that gradients may be taken at."""
    found = [subject.run(prompts.ids[some], [site]).resid[0] for some in _parts(prompts)]
    return torch.cat([each.clone() for each in found])


def _parts(prompts: Prompts) -> Sequence[slice]:
    step = max(1, TOKENS_AT_A_TIME // prompts.ids.shape[1])
    return [slice(start, start + step) for start in range(0, len(prompts.ids), step)]
