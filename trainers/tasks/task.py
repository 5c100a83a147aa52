"""The door of tasks: behaviours of a causal language model that have a metric.

A task is a file of this folder that defines `prompts` and `score` at its top level: see README.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.registry import Room
from saescale.trainers.subjects.subject import Patch, ReadsText, Subject
from saescale.trainers.subjects.transformer import Transformer

TASKS = Room("saescale.trainers.tasks", "task", marker="prompts")

METRIC = "metric"  # what `score` calls the task's own number; higher is better


class Prompts(NamedTuple):
    """Prompts of a task, int64 tensors of the host.

    `ids` [prompts, length]: behind the end of a prompt stands its last token again, which no earlier one sees.
    `corrupt` [prompts, length]: the same prompts, token by token, without what the answer depends on.
    `lengths` [prompts]; `reads` [prompts, reads]: the positions whose logits the metric is read from.
    `answers` [prompts, ...]: tokens that `score` needs. `places`: named positions, [prompts] each.
    `attributes`: what the behaviour is a function of, as numbers from 0 on, [prompts] each.
    """

    ids: Tensor
    corrupt: Tensor
    lengths: Tensor
    reads: Tensor
    answers: Tensor
    places: Mapping[str, Tensor]
    attributes: Mapping[str, Tensor]

    @property
    def within(self) -> Tensor:
        """bool [prompts, length]: what is a prompt, and not behind its end."""
        return torch.arange(self.ids.shape[1]) < self.lengths[:, None]

    @property
    def last(self) -> int:
        """How many positions at the end hold all that are read."""
        return self.ids.shape[1] - int(self.reads.min())

    def part(self, some: slice) -> Prompts:
        """Some of them."""
        places, attributes = ({name: of[some] for name, of in each.items()} for each in (self.places, self.attributes))
        ids, corrupt, lengths, reads, answers = (each[some] for each in self[:5])
        return Prompts(ids, corrupt, lengths, reads, answers, places, attributes)


class Task(Protocol):
    """What the file of a task defines."""

    unit: str  # of the metric, in words

    def prompts(self, subject: Subject, number: int, seed: int) -> Prompts:
        """A pure function of the arguments. Raises SaescaleError in one line where the subject, or its tokenizer,
        cannot have this task."""

    def score(self, prompts: Prompts, logits: Tensor) -> dict[str, Tensor]:
        """Of logits [prompts, reads, vocabulary], float32: the metric of each prompt under METRIC, and what it is made
        of, [prompts] each. Gradients go through it."""


def find_task(name: str) -> Task:
    """The task of that name. Raises SaescaleError with the nearest name for an unknown one."""
    return TASKS.load(name)


def steerable(subject: Subject) -> Transformer:
    """Raises SaescaleError unless tasks can be run on the subject."""
    if not isinstance(subject, Transformer):
        raise SaescaleError(f"tasks are run on causal models of transformers, and {subject.name} is none")
    return subject


def spelled(subject: Subject, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text. Raises SaescaleError where the subject reads none."""
    if not isinstance(subject, ReadsText):
        raise SaescaleError(f"the subject {subject.name} reads no text, and the task is of text; take a language model")
    return [ids.tolist() for ids in subject.tokenize(texts)]


def behind_bos(subject: Subject, prompts: Iterable[list[int]]) -> tuple[Tensor, Tensor]:
    """int64 [prompts, length], behind the subject's first token where it has one, and the lengths [prompts]."""
    bos = getattr(subject, "bos_token_id", None)
    whole = [([] if bos is None else [bos]) + ids for ids in prompts]
    longest = max(map(len, whole))
    ids = torch.tensor([each + each[-1:] * (longest - len(each)) for each in whole])
    return ids, torch.tensor([len(each) for each in whole])


def read(prompts: Prompts, logits: Tensor) -> Tensor:
    """What the metric is read from, float32 [prompts, reads, vocabulary], of logits of the last positions."""
    at = (prompts.reads - (prompts.ids.shape[1] - logits.shape[1])).to(logits.device)
    return logits[torch.arange(len(at), device=at.device)[:, None], at].float()


def measure_task(
    subject: Transformer, task: Task, prompts: Prompts, ids: Tensor, patch: Mapping[Site, Patch] | None = None
) -> dict[str, Tensor]:
    """What `score` says of a pass over `ids`, the prompts or the corrupted ones; `patch` as of `Subject.run`."""
    logits = subject.run(ids, [], patch, logits=True).logits
    assert logits is not None, "they were asked for"
    return task.score(prompts, read(prompts, logits[:, -prompts.last :]))
