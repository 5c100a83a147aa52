"""How well the best single latent tells what is true of a token (Gao et al. 2024, section 4.2; paper.md).

Of each binary task the minimum over latents of the cross-entropy of a logistic probe on one latent's pre-activation,
sigmoid(w a + b), fitted by Newton-Raphson (probes.py); the mean over tasks, in nats a token. Tasks are computed from
text (tasks.py) where the subject reads one, and two of sentences with a singular or plural subject (agreement.py)
come to them; else its labels are the tasks: one for each value that a label takes, or for the second of two, up to 8
values and 64 tasks. The paper has 61 classification sets of its own instead.

Half of the documents (of sentences: of the nouns that are their subjects) fit the probes and choose the latent; the
loss is that on the other half, over whose documents the intervals are. Columns are standardised on the first half, and
RIDGE w^2 / 2 is added to the mean cross-entropy, without which there is no minimum where a latent separates a task. A
task that is true or false on fewer than 20 rows of a half is left out, with a warning.

| metric | what |
|---|---|
| `loss` | by the best latent of each task, mean over tasks; `at` is a task |
| `channels` | the same by the best of the d_model channels of preprocessed x |
| `random` | the same by the best of n_latents random directions of x |
| `chance` | by the share of rows on which the task is true: its entropy, where both halves have the same |
| `below_channels` | `channels` - `loss` |
| `latent`, `share` | `at` a task: which latent it was, and on which share of rows the task is true |

On the first 8,192 held-out rows, those at the end of a context left out. `channels` and `chance` are fitted once for
all cells, `random` once for each N, and the 320 sentences are read once. Cost: a forward pass, and for each task and
latent some 6 iterations over 64 bins of its values; few are fitted to all rows (probes.py). At N = 1,024 that is
5.5 s of one core, `random` included, where 119 s went into fitting all latents to all rows, with the same results.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.storage.source import Source
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.architecture import unit_rows
from saescale.trainers.architectures.dense import CHUNK_ENTRIES
from saescale.trainers.evals.evaluation import Measurement, Need, Unsuited
from saescale.trainers.evals.intervals import SEED, Sums, by_document
from saescale.trainers.evals.labels import heldout_labels
from saescale.trainers.evals.texts.agreement import last_activations, sentences
from saescale.trainers.evals.texts.probes import best_probes
from saescale.trainers.evals.texts.spelling import token_texts
from saescale.trainers.evals.texts.tasks import text_tasks
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.harvest.make_shard import prefix_of
from saescale.trainers.harvest.retrace import heldout_places
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.subjects.subject import ReadsText, Subject

ROWS = 8_192
DIRECTIONS_SEED = 104_729  # that of no cell, whose first encoder they would be
LEAST = 20  # rows of a half on which a task is true, and on which it is not
VALUES, LABEL_TASKS = 8, 64  # of a label that are tasks; tasks of labels

needs: frozenset[Need] = frozenset({"subject"})
metrics = {
    "loss": Metric("lower", beside=("channels", "random", "chance")),
    "below_channels": Metric("higher"),
}


class Group(NamedTuple):
    """Rows, and tasks of all of them."""

    x: Tensor  # preprocessed, float32 [rows, d_model], on the CPU
    doc: np.ndarray  # [rows]
    learns: np.ndarray  # bool [rows]: the half that probes are fitted on
    tasks: dict[str, np.ndarray]  # where each is true, bool [rows]
    chance: np.ndarray  # cross-entropies, float64 [tasks, rows that do not learn], as the following ones
    channels: np.ndarray
    random: dict[int, np.ndarray]  # by the number of directions; filled when one is asked for


def prepare(source: Source, subject: Subject | None) -> list[Group]:
    """Tasks and baselines. Raises SaescaleError where there is no task."""
    assert subject is not None, "it is in `needs`"
    if not isinstance(source, ActivationStore):
        raise SaescaleError(f"tasks are computed for activation stores, not for {type(source).__name__}")
    number = min(ROWS, source.rows("heldout"))
    reads = isinstance(subject, ReadsText)
    tasks, inside = _of_text(source, subject, number) if reads else _of_labels(source, subject, number)
    rows = source.heldout(number, ("act", "doc"))
    raw = to_tensor(rows.act, source.dtype)[torch.from_numpy(inside)]
    made = [(raw, rows.doc[inside], {name: values[inside] for name, values in tasks.items()})]
    if reads:
        texts, noun, of_sentences = sentences()
        made.append((last_activations(subject, source.site, texts), noun, of_sentences))
    asked = [name for _, _, tasks in made for name in tasks]
    groups = [group(*each) for each in made]
    there = {name for each in groups for name in each.tasks}
    left_out = [name for name in asked if name not in there]
    if not there:
        raise SaescaleError(
            f"none of its {len(asked)} tasks is true and false on {LEAST} held-out rows of either half of the "
            "documents; harvest more held-out tokens"
        )
    if left_out:
        warnings.warn(
            f"probe_loss: {len(left_out)} of {len(asked)} tasks are left out, since they are true or false on fewer "
            f"than {LEAST} held-out rows of a half of the documents: {', '.join(left_out)}",
            SaescaleWarning,
            stacklevel=2,
        )
    return [each for each in groups if each.tasks]


def group(raw: Tensor, doc: np.ndarray, tasks: dict[str, np.ndarray]) -> Group:
    """Of raw rows [rows, d_model], with those of the tasks that both halves of the documents have enough of."""
    x, learns = normalise(raw), _half(doc)

    def least(truth: np.ndarray) -> int:
        return min(int((half == side).sum()) for half in (truth[learns], truth[~learns]) for side in (True, False))

    kept = {name: truth for name, truth in tasks.items() if least(truth) >= LEAST}
    none = np.empty((0, int((~learns).sum())))
    chance = np.stack([_by_share(truth, learns) for truth in kept.values()]) if kept else none
    found = Group(x, doc, learns, kept, chance, chance, {})
    return found._replace(channels=_best(x, found)[0]) if kept else found


def measure(trained: Trained, source: Source, subject: Subject | None, prepared: list[Group]) -> Iterator[Measurement]:
    latents: dict[str, int] = {}
    columns: dict[str, np.ndarray] = {}
    doc, parts = _documents(prepared)
    for each, part in zip(prepared, parts, strict=True):
        losses, best = _best(_pre_activations(trained, each.x), each)
        of_ways = {
            "loss": losses, "channels": each.channels, "random": _random(each, trained.sae.shape.n_latents),
            "chance": each.chance, "rows": np.ones_like(losses),
        }  # fmt: skip
        for i, task in enumerate(each.tasks):
            latents[task] = int(best[i])
            for way, values in of_ways.items():
                columns[f"{way} {task}"] = column = np.zeros(len(doc))
                column[part] = values[i]
    statistics = {f"{way} ": _mean(way, [*latents]) for way in ("loss", "channels", "random", "chance")}
    statistics["below_channels "] = lambda sums: statistics["channels "](sums) - statistics["loss "](sums)
    statistics |= {f"{way} {task}": _mean(way, [task]) for task in latents for way in of_ways if way != "rows"}
    rows = {task: int((~each.learns).sum()) for each in prepared for task in each.tasks}
    for name, found in by_document(doc, columns, statistics).items():
        metric, _, task = name.partition(" ")
        yield Measurement(metric, *found, at=task, n=rows.get(task, len(doc)), seed=SEED)
    for each in prepared:
        for task, truth in each.tasks.items():
            yield Measurement("latent", latents[task], at=task, n=int(each.learns.sum()), seed=SEED)
            yield Measurement("share", float(truth.mean()), at=task, n=len(truth))


def _documents(groups: list[Group]) -> tuple[np.ndarray, list[slice]]:
    """The document of each row that does not learn, numbered over all groups, and which rows are of each group."""
    doc, parts = np.zeros(0, np.int64), []
    for each in groups:
        own = np.unique(each.doc[~each.learns], return_inverse=True)[1] + doc.max(initial=-1) + 1
        parts.append(slice(len(doc), len(doc) + len(own)))
        doc = np.concatenate([doc, own])
    return doc, parts


def _mean(way: str, tasks: list[str]) -> Callable[[Sums], np.ndarray]:
    return lambda sums: np.asarray(sum(sums[f"{way} {task}"] / sums[f"rows {task}"] for task in tasks) / len(tasks))


def _random(group: Group, number: int) -> np.ndarray:
    if number not in group.random:
        directions = unit_rows(number, group.x.shape[1], torch.Generator().manual_seed(DIRECTIONS_SEED))
        group.random[number] = _best(group.x @ directions.T, group)[0]
    return group.random[number]


def _of_text(source: ActivationStore, subject: Subject, number: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Where each task is true, bool [rows], and which rows have a next token in their context."""
    places, skipped = heldout_places(source, subject, number), len(prefix_of(subject)[0])
    contexts = [ids[skipped:] for ids in places.contexts]
    texts = token_texts(subject, np.unique(np.concatenate(contexts)).tolist())
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in contexts])])
    pos = places.pos - skipped
    at = starts[places.context] + pos
    tasks = {name: np.concatenate(values)[at] for name, values in text_tasks(contexts, texts).items()}
    return tasks, pos < np.diff(starts)[places.context] - 1


def _of_labels(source: ActivationStore, subject: Subject, number: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    if not subject.labels:
        raise Unsuited(f"the subject {subject.name} reads no text and has no labels, so there is no task")
    tasks: dict[str, np.ndarray] = {}
    for name, values in heldout_labels(source, subject, number).items():
        for place in np.ndindex(values.shape[1:]):
            column = values[(slice(None), *place)]
            taken = np.unique(column).tolist()
            of = f"{name}[{','.join(map(str, place))}]" if place else name
            if 2 <= len(taken) <= VALUES:
                tasks |= {f"{of} = {value}": column == value for value in (taken[1:] if len(taken) == 2 else taken)}
    names = [*tasks]
    # Spread over all of them: a board's squares are many and alike.
    chosen = np.linspace(0, len(names) - 1, min(len(names), LABEL_TASKS)).round().astype(int)
    return {names[i]: tasks[names[i]] for i in chosen}, np.ones(number, bool)


def _half(doc: np.ndarray) -> np.ndarray:
    """bool [rows]: documents, in an order drawn at random, until half of the rows are theirs."""
    ids, place, counts = np.unique(doc, return_inverse=True, return_counts=True)
    order = np.random.default_rng(SEED).permutation(len(ids))
    first = np.zeros(len(ids), bool)
    first[order[np.cumsum(counts[order]) - counts[order] / 2 < len(doc) / 2]] = True
    return np.asarray(first[place])


def _by_share(truth: np.ndarray, learns: np.ndarray) -> np.ndarray:
    share = truth[learns].mean()
    return -np.log(np.where(truth[~learns], share, 1 - share))


@torch.no_grad()
def _pre_activations(trained: Trained, x: Tensor) -> Tensor:
    """float32 [rows, n_latents], on the SAE's device."""
    sae = trained.sae
    device = next(iter(sae.params.values())).device
    chunks = x.split(max(1, CHUNK_ENTRIES // sae.shape.n_latents))
    # What is behind the latents' own (a router's) is no latent's.
    return torch.cat([sae.forward(rows.to(device)).pre_activations[:, : sae.shape.n_latents] for rows in chunks])


def _best(values: Tensor, group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Of each task the cross-entropies on rows that do not learn, float64 [tasks, rows], by the best of the columns of
    `values` [rows, columns] on rows that do; and which that is, int64 [tasks]."""
    learns = torch.from_numpy(group.learns).to(values.device)
    truths = torch.from_numpy(np.stack([*group.tasks.values()])).to(values)
    probes = best_probes(values, learns, truths)
    logits = torch.stack([probe.logits(values[~learns, probe.column]) for probe in probes])
    losses = torch.nn.functional.softplus((1 - 2 * truths[:, ~learns]) * logits).cpu().numpy()
    return losses, np.array([probe.column for probe in probes])
