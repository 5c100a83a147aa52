"""A subject's circuit of a task, as far as scores and patching tell it."""

from contextlib import suppress
from typing import Any

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.subject import Subject
from saescale.trainers.tasks.heads import Scores, scores_by_attention, scores_of_names
from saescale.trainers.tasks.patching import Part, Patched, Progress, patch_parts
from saescale.trainers.tasks.task import Prompts, find_task, measure_task, steerable

FIRST = 3  # heads of each kind that are named


def circuit(
    subject: Subject, name: str, number: int = 16, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Of the task `name`: the metric and what it is made of, on the prompts and the corrupted ones; every head and MLP
    by what noising it loses; and the heads of each kind with the highest scores.

    Raises SaescaleError for an unknown task, and where the subject cannot have it or its parts are not known.
    """
    task, ours = find_task(name), steerable(subject)
    prompts = task.prompts(subject, number, seed)
    clean, corrupt = (measure_task(ours, task, prompts, ids) for ids in (prompts.ids, prompts.corrupt))
    patched = patch_parts(ours, task, prompts, progress)
    return {
        "task": name,
        "unit": task.unit,
        "prompts": number,
        "clean": {key: float(value.mean()) for key, value in clean.items()},
        "corrupt": {key: float(value.mean()) for key, value in corrupt.items()},
        "parts": [
            {"part": part.name, "layer": part.layer, "head": part.head, **effect._asdict()}
            for part, effect in sorted(patched.effects.items(), key=lambda item: -abs(item[1].noising))
        ],
        "heads": {kind: _first(scores) for kind, scores in _scores(subject, name, patched, prompts).items()},
    }


def _scores(subject: Subject, name: str, patched: Patched, prompts: Prompts) -> Scores:
    ours = steerable(subject)
    found: Scores = {}
    with suppress(SaescaleError):  # of a subject whose tokens cannot be drawn by lot
        found = scores_by_attention(ours)
    return found | (scores_of_names(ours, prompts, patched) if name == "ioi" else {})


def _first(scores: dict[Part, float]) -> list[dict[str, Any]]:
    best = sorted(scores.items(), key=lambda item: -item[1])[:FIRST]
    return [{"part": part.name, "score": score} for part, score in best]
