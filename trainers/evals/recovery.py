"""How much of a known dictionary an SAE finds: its latents against the features that the activations were made of.

For subjects that are `Composed` (subjects/subject.py), on the first 16,384 held-out rows. Two views. By direction: the
|cosine| of rows of W_dec with the features' directions, less the mean over d_model that preprocessing takes away. By
activation: on which rows a latent and a feature are active together.

| metric | what |
|---|---|
| `mcc` | mean |cosine| over pairs of a latent and a feature, matched one to one at the largest sum (Hungarian method) |
| `uniqueness` | features that are nearest in direction to some latent, over the number of latents |
| `precision`, `recall`, `f1` | of a latent as a detector of the feature nearest in direction; mean over latents |
| `mmcs` | the largest |cosine| of any latent; mean over features |
| `found` | share of features to which some latent has a |cosine| above 0.9 |
| `feature_precision`, `feature_recall`, `feature_f1` | of the latent with the best F1; mean over features |
| `..._random` | of as many random unit directions, and of TopK with them: the k largest products with x |
| `..._true` | of the directions of the most frequent features, as many as there are latents, and of TopK with them |

mcc, uniqueness, precision, recall and f1 are as SynthSAEBench defines them (Chanin and Garriga-Alonso 2026, arXiv
2602.14687). Of features, `at` names those of a frequency, in bins of half a decade. Features that are active on no row
count by direction alone. Intervals are over features or latents; mcc and uniqueness, which are of all together, have
none. A matrix [n_latents, features] has to fit into memory.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saescale.scaling.metrics import shares
from saescale.storage.source import Source
from saescale.storage.store import ActivationStore
from saescale.trainers.evals.core import BIN_NAMES, bin_of
from saescale.trainers.evals.decoder import directions_of
from saescale.trainers.evals.directions import largest, over_latents, random_directions
from saescale.trainers.evals.evaluation import Measurement, Need, Unsuited
from saescale.trainers.evals.labels import heldout_label_parts
from saescale.trainers.exchange.trained import SparseLatents, Trained
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.subjects.subject import Composed, Subject

ROWS = 16_384
FOUND = 0.9
CHUNK_ROWS = 1_024

needs: frozenset[Need] = frozenset({"subject", "labels"})
_NAMES = (
    "mcc", "uniqueness", "precision", "recall", "f1", "mmcs", "found", "feature_precision", "feature_recall",
    "feature_f1",
)  # fmt: skip
metrics = shares(dict.fromkeys(_NAMES, ()), ("random", "true"), leads=("mcc", "f1", "uniqueness"))


class Truth(NamedTuple):
    raw: Tensor  # [rows, d_model], as the store has them
    directions: Tensor  # float32 [features, d_model], unit rows less their mean
    active: sparse.csr_array  # of features, int32 [rows, features]: 1 where one is active
    present: np.ndarray  # on how many rows each feature is active, int64 [features]


class Recovery(NamedTuple):
    """What some latents find of a truth: float64, [n_latents] or [features] each. `by_activation` is 0 of features that
    are active on no row."""

    mcc: float
    uniqueness: float
    of_latents: dict[str, np.ndarray]
    by_direction: dict[str, np.ndarray]
    by_activation: dict[str, np.ndarray]


def prepare(source: Source, subject: Subject | None) -> Truth:
    """The features of the held-out rows. Raises SaescaleError where the subject is not made of known ones."""
    if not isinstance(subject, Composed):
        name = "" if subject is None else subject.name
        raise Unsuited(f"the subject {name} is not composed of known features; `dictionary` is")
    assert isinstance(source, ActivationStore), "labels are of stores"
    rows, features = min(ROWS, source.rows("heldout")), len(subject.directions)
    places = []
    for here, labels in heldout_label_parts(source, subject, rows):
        row, feature = np.nonzero(labels["features"])
        places.append((here[row], feature))
    row, feature = (np.concatenate(each) for each in zip(*places, strict=True))
    active = sparse.csr_array((np.ones(len(row), np.int32), (row, feature)), (rows, features))
    raw = to_tensor(source.heldout(rows, ("act",)).act, source.dtype)
    return Truth(raw, normalise(subject.directions), active, _times(active))


def measure(trained: Trained, source: Source, subject: Subject | None, truth: Truth) -> Iterator[Measurement]:
    W_dec, k = directions_of(trained, truth.raw), trained.cell.k
    yield from _measurements(compare(W_dec, active_on(truth, trained.encode), truth), truth)
    random = random_directions(*W_dec.shape).to(W_dec.device)
    frequent = torch.from_numpy(np.argsort(-truth.present, kind="stable")[: len(W_dec)])
    for name, directions in (("random", random), ("true", truth.directions[frequent])):
        active = _places(largest(truth.raw, directions, k), len(directions))
        for row in _measurements(compare(directions, active, truth), truth):
            yield row._replace(metric=f"{row.metric}_{name}")


def active_on(truth: Truth, encode: Callable[[Tensor], Tensor]) -> sparse.csr_array:
    """Where latents are active: int32 [rows, n_latents]. `encode` gives them for raw rows."""
    device = truth.directions.device
    latents = (encode(raw.to(device)) != 0 for raw in truth.raw.split(CHUNK_ROWS))
    return sparse.csr_array(sparse.vstack([sparse.csr_array(some.int().cpu().numpy()) for some in latents]))


def _places(latents: SparseLatents, n_latents: int) -> sparse.csr_array:
    """The same of latents that are known: int32 [rows, n_latents]."""
    indices = latents.indices.cpu().numpy()
    row, place = np.nonzero(indices >= 0)
    return sparse.csr_array((np.ones(len(row), np.int32), (row, indices[row, place])), (len(indices), n_latents))


def compare(W_dec: Tensor, active: sparse.csr_array, truth: Truth) -> Recovery:
    """Latents of directions `W_dec` [n_latents, d_model], `active` on the truth's rows, against its features."""
    cosine = (torch.nn.functional.normalize(W_dec, dim=1) @ truth.directions.T).abs().cpu().numpy()
    paired = linear_sum_assignment(cosine, maximize=True)
    nearest = cosine.argmax(axis=1)
    fired, present = _times(active), truth.present
    both = sparse.coo_array(active.T @ truth.active)  # on how many rows a latent and a feature are active
    # Only pairs that are ever active together have an F1 above 0: few of all.
    f1 = sparse.csc_array((2 * both.data / (fired[both.row] + present[both.col]), (both.row, both.col)), both.shape)
    best = np.asarray(f1.argmax(axis=0)).ravel()
    together = sparse.csr_array(both)
    closest = cosine.max(axis=0).astype(np.float64)
    latents, features = np.arange(len(fired)), np.arange(len(present))
    of_best = _detection(together[best, features], fired[best], present)
    return Recovery(
        float(cosine[paired].mean()),
        len(np.unique(nearest)) / len(nearest),
        _detection(together[latents, nearest], fired, present[nearest]),
        {"mmcs": closest, "found": (closest > FOUND).astype(np.float64)},
        {f"feature_{name}": values for name, values in of_best.items()},
    )


def _detection(both: sparse.csr_array | np.ndarray, fired: np.ndarray, present: np.ndarray) -> dict[str, np.ndarray]:
    """Of detectors that fire on so many rows for what is present on so many, and on how many both."""
    right = (both if isinstance(both, np.ndarray) else both.toarray()).astype(np.float64).ravel()
    return {
        "precision": right / fired.clip(1),
        "recall": right / present.clip(1),
        "f1": 2 * right / (fired + present).clip(1),
    }


def _measurements(recovery: Recovery, truth: Truth) -> Iterator[Measurement]:
    n_latents, features = len(recovery.of_latents["f1"]), len(truth.present)
    yield Measurement("mcc", recovery.mcc, n=min(n_latents, features))
    yield Measurement("uniqueness", recovery.uniqueness, n=n_latents)
    yield from over_latents(recovery.of_latents)
    there = np.flatnonzero(truth.present)
    bins = bin_of(truth.present.clip(1) / len(truth.raw))
    named = [(BIN_NAMES[number], bins == number) for number in np.unique(bins[there])]
    for at, among in [("", np.ones(features, bool)), *named]:
        yield from over_latents({name: values[among] for name, values in recovery.by_direction.items()}, at)
        seen = there[among[there]]
        yield from over_latents({name: values[seen] for name, values in recovery.by_activation.items()}, at)


def _times(active: sparse.csr_array) -> np.ndarray:
    """On how many rows each is active, int64."""
    return np.bincount(active.indices, minlength=active.shape[1])
