"""How well the best single latent tells what is true of a token (Gao et al. 2024, section 4.2; paper.md).

Of each binary task the minimum over latents of the cross-entropy of a logistic probe on one latent's pre-activation,
sigmoid(w a + b), fitted by Newton-Raphson; the mean over tasks, in nats a token. Tasks are computed from text
(text_tasks.py) where the subject reads one; else its labels are the tasks: one for each value that a label takes, or
for the second of two, up to 8 values and 64 tasks. The paper has 61 classification sets of its own instead.

Half of the documents fit the probes and choose the latent; the loss is that on the other half, over whose documents the
intervals are. Columns are standardised on the first half, and RIDGE w^2 / 2 is added to the mean cross-entropy, without
which there is no minimum where a latent separates a task. A task that is true or false on fewer than 20 rows of a half
is left out, with a warning.

| metric | what |
|---|---|
| `loss` | by the best latent of each task, mean over tasks; `at` is a task |
| `channels` | the same by the best of the d_model channels of preprocessed x |
| `random` | the same by the best of n_latents random directions of x |
| `chance` | by the share of rows on which the task is true: its entropy, where both halves have the same |
| `below_channels` | `channels` - `loss` |
| `latent`, `share` | `at` a task: which latent it was, and on which share of rows the task is true |

On the first 8,192 held-out rows, those at the end of a context left out. `channels` and `chance` are fitted once for
all cells, `random` once for each N. Cost: tasks * n_latents * rows / 2 logistic functions an iteration, some 6
iterations.
"""

import warnings
from collections.abc import Iterator
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
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.intervals import SEED, Estimate, Sums, by_document
from saescale.trainers.evals.labels import heldout_labels
from saescale.trainers.evals.text_tasks import text_tasks
from saescale.trainers.evals.texts import token_texts
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.harvest.make_shard import prefix_of
from saescale.trainers.harvest.retrace import heldout_places
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.subjects.subject import ReadsText, Subject

ROWS = 8_192
LEAST = 20  # rows of a half on which a task is true, and on which it is not
VALUES, LABEL_TASKS = 8, 64  # of a label that are tasks; tasks of labels
RIDGE = 1e-4  # of a weight on a standardised column
ITERATIONS, TOLERANCE = 50, 1e-6  # nats that a step has to promise
_BLOCK = 2**17  # entries of a block of columns, which stays in the cache

needs: frozenset[Need] = frozenset({"subject"})
metrics = {
    "loss": Metric("lower"),
    "below_channels": Metric("higher"),
}


class Prepared(NamedTuple):
    x: Tensor  # preprocessed, float32 [rows, d_model], on the CPU
    doc: np.ndarray  # [rows]
    learns: np.ndarray  # bool [rows]: the half that probes are fitted on
    tasks: dict[str, np.ndarray]  # where each is true, bool [rows]
    chance: np.ndarray  # cross-entropies, float64 [tasks, rows that do not learn], as the following ones
    channels: np.ndarray
    random: dict[int, np.ndarray]  # by the number of directions; filled when one is asked for


def prepare(source: Source, subject: Subject | None) -> Prepared:
    """Tasks and baselines. Raises SaescaleError where there is no task."""
    assert subject is not None, "it is in `needs`"
    if not isinstance(source, ActivationStore):
        raise SaescaleError(f"tasks are computed for activation stores, not for {type(source).__name__}")
    number = min(ROWS, source.rows("heldout"))
    tasks, inside = (
        _of_text(source, subject, number) if isinstance(subject, ReadsText) else _of_labels(source, subject, number)
    )
    rows = source.heldout(number, ("act", "doc"))
    doc, x = rows.doc[inside], normalise(to_tensor(rows.act, source.dtype)[torch.from_numpy(inside)])
    learns = _half(doc)
    kept, left_out = {}, []
    for name, values in tasks.items():
        truth = values[inside]
        least = min(int((half == side).sum()) for half in (truth[learns], truth[~learns]) for side in (True, False))
        if least >= LEAST:
            kept[name] = truth
        else:
            left_out.append(name)
    if not kept:
        raise SaescaleError(
            f"none of its {len(tasks)} tasks is true and false on {LEAST} held-out rows of either half of the "
            "documents; harvest more held-out tokens"
        )
    if left_out:
        warnings.warn(
            f"probe_loss: {len(left_out)} of {len(tasks)} tasks are left out, since they are true or false on fewer "
            f"than {LEAST} held-out rows of a half of the documents: {', '.join(left_out)}",
            SaescaleWarning,
            stacklevel=2,
        )
    chance = np.stack([_by_share(truth, learns) for truth in kept.values()])
    found = Prepared(x, doc, learns, kept, chance, chance, {})
    return found._replace(channels=_best(x, found)[0])


def measure(trained: Trained, source: Source, subject: Subject | None, prepared: Prepared) -> Iterator[Measurement]:
    losses, latents = _best(_pre_activations(trained, prepared.x), prepared)
    n_latents = trained.sae.shape.n_latents
    if n_latents not in prepared.random:
        directions = unit_rows(n_latents, prepared.x.shape[1], torch.Generator().manual_seed(SEED))
        prepared.random[n_latents] = _best(prepared.x @ directions.T, prepared)[0]
    ways = {
        "loss": losses, "channels": prepared.channels, "random": prepared.random[n_latents], "chance": prepared.chance,
    }  # fmt: skip
    n = losses.shape[1]
    doc = prepared.doc[~prepared.learns]
    columns = {f"{way} {task}": of[i] for way, of in ways.items() for i, task in enumerate(prepared.tasks)}
    columns["rows"] = np.ones(n)

    def mean(way: str, tasks: list[str], sums: Sums) -> np.ndarray:
        return np.asarray(sum(sums[f"{way} {task}"] for task in tasks) / sums["rows"] / len(tasks))

    def estimates(tasks: list[str]) -> dict[str, Estimate]:
        statistics = {way: lambda sums, way=way: mean(way, tasks, sums) for way in ways}
        statistics["below_channels"] = lambda sums: mean("channels", tasks, sums) - mean("loss", tasks, sums)
        return by_document(doc, columns, statistics)

    for name, found in estimates([*prepared.tasks]).items():
        yield Measurement(name, *found, n=n, seed=SEED)
    for i, (task, truth) in enumerate(prepared.tasks.items()):
        for name, found in estimates([task]).items():
            yield Measurement(name, *found, at=task, n=n, seed=SEED)
        yield Measurement("latent", float(latents[i]), at=task, n=int(prepared.learns.sum()), seed=SEED)
        yield Measurement("share", float(truth.mean()), at=task, n=len(truth))


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
        raise SaescaleError(f"the subject {subject.name} reads no text and has no labels, so there is no task")
    tasks = {}
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


def _best(values: Tensor, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """Of each task the cross-entropies on rows that do not learn, float64 [tasks, rows], by the best of the columns of
    `values` [rows, columns] on rows that do; and which that is, int64 [tasks]."""
    learns = torch.from_numpy(prepared.learns).to(values.device)
    z = values[learns].double()
    mean, scale = z.mean(dim=0), z.std(dim=0, correction=0)
    scale = torch.where(scale > 1e-9 * z.abs().amax(dim=0), scale, torch.inf)  # of a column that never varies
    z = ((z - mean) / scale).float().T.contiguous()
    losses, columns = [], []
    for truth in prepared.tasks.values():
        probes = fit(z, torch.from_numpy(truth[prepared.learns]).to(z))
        best = int(probes.loss.argmin())
        logits = (values[~learns, best].double() - mean[best]) / scale[best] * probes.weight[best] + probes.bias[best]
        signs = torch.from_numpy(np.where(truth[~prepared.learns], -1.0, 1.0)).to(logits)
        losses.append(torch.nn.functional.softplus(signs * logits).cpu().numpy())
        columns.append(best)
    return np.stack(losses), np.array(columns)


class Probes(NamedTuple):
    """Of each column, float64 [columns]; `loss` is the mean cross-entropy and the ridge's part."""

    weight: Tensor
    bias: Tensor
    loss: Tensor


def fit(z: Tensor, truth: Tensor) -> Probes:
    """Minimises mean cross-entropy + RIDGE w^2 / 2 of sigmoid(w z + b) for each column z, [columns, rows] float32
    standardised, against `truth` [rows] of 0 and 1: by Newton-Raphson, steps halved where the loss would rise."""
    blocks = [_fit(block, truth) for block in z.split(max(1, _BLOCK // z.shape[1]))]
    return Probes(*map(torch.cat, zip(*blocks, strict=True)))


def _fit(z: Tensor, truth: Tensor) -> Probes:
    columns, rows = z.shape
    share = truth.double().mean()
    found = torch.zeros(3, columns, dtype=torch.float64, device=z.device)  # weight, bias and loss
    left = torch.arange(columns, device=z.device)
    at = torch.stack([found[0], (share / (1 - share)).log().expand(columns)])  # where the loss is known
    known = torch.full_like(found[0], torch.inf)
    step, decline = torch.zeros_like(at), torch.zeros_like(known)
    for _ in range(ITERATIONS):
        tried = at + step
        u = torch.addcmul(tried[1, :, None].float(), z, tried[0, :, None].float())
        loss = (torch.nn.functional.softplus(u).sum(dim=1) - u @ truth).double() / rows + RIDGE / 2 * tried[0] ** 2
        better = loss <= known + TOLERANCE / 10
        # Halved until it helps; then the next one is from there.
        at, known = torch.where(better, tried, at), torch.where(better, loss, known)
        p = u.sigmoid_()
        away = p - truth
        g0 = (away * z).sum(dim=1).double() / rows + RIDGE * tried[0]
        g1 = away.sum(dim=1).double() / rows
        curved = p.mul_(1 - p)
        h11 = curved.sum(dim=1).double() / rows + 1e-12
        curved.mul_(z)
        h01 = curved.sum(dim=1).double() / rows
        h00 = (curved * z).sum(dim=1).double() / rows + RIDGE
        determinant = (h00 * h11 - h01**2).clamp_min(1e-18)
        newton = torch.stack([h01 * g1 - h11 * g0, h01 * g0 - h00 * g1]) / determinant
        promised = -(newton[0] * g0 + newton[1] * g1) / 2
        step = torch.where(better, newton, step / 2)
        decline = torch.where(better, promised, decline / 2)
        moving = decline > TOLERANCE
        if not bool(moving.all()):
            found[:, left] = torch.stack([*at, known])
            if not bool(moving.any()):
                break
            left, z, at, known = left[moving], z[moving], at[:, moving], known[moving]
            step, decline = step[:, moving], decline[moving]
    found[:, left] = torch.stack([*at, known])
    return Probes(*found)
