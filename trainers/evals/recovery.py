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
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.storage.source import Source
from saescale.storage.store import ActivationStore
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.intervals import SEED, by_document, ratio
from saescale.trainers.evals.labels import heldout_label_parts
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.subjects.subject import Composed, Subject

ROWS = 16_384
FOUND = 0.9
CHUNK_ROWS = 1_024
BINS = np.arange(-6.0, 0.5, 0.5)  # edges, log10 of a feature's frequency; rarer ones are in the first bin

needs: frozenset[Need] = frozenset({"subject", "labels"})


class Truth(NamedTuple):
    raw: Tensor  # [rows, d_model], as the store has them
    directions: Tensor  # float32 [features, d_model], unit rows less their mean
    active: sparse.csr_array  # of features, int32 [rows, features]: 1 where one is active
    frequency: np.ndarray  # float64 [features]


class Recovery(NamedTuple):
    """What of a truth some latents find. Of latents: float64 [n_latents]; of features, NaN where one is on no row:
    float64 [features]."""

    mcc: float
    uniqueness: float
    latents: dict[str, np.ndarray]
    features: dict[str, np.ndarray]


def prepare(source: Source, subject: Subject | None) -> Truth:
    """The features of the held-out rows. Raises SaescaleError where the subject is not made of known ones."""
    if not isinstance(subject, Composed):
        raise SaescaleError(f"the subject {getattr(subject, 'name', '')} is not composed of known features")
    assert isinstance(source, ActivationStore), "labels are of stores"
    rows = min(ROWS, source.rows("heldout"))
    places = []
    for here, labels in heldout_label_parts(source, subject, rows):
        row, feature = np.nonzero(labels["features"])
        places.append((here[row], feature))
    row, feature = (np.concatenate(each) for each in zip(*places, strict=True))
    active = sparse.csr_array((np.ones(len(row), np.int32), (row, feature)), (rows, len(subject.directions)))
    raw = to_tensor(source.heldout(rows, ("act",)).act, source.dtype)
    return Truth(raw, normalise(subject.directions), active, _times(active) / rows)


def measure(trained: Trained, source: Source, subject: Subject | None, truth: Truth) -> Iterator[Measurement]:
    decoder = trained.sae.params.get("W_dec")
    if decoder is None:
        raise SaescaleError(f"the architecture {trained.sae.name} has no W_dec, which gives each latent a direction")
    n_latents, k = len(decoder), trained.cell.k
    yield from _measurements(compare(decoder, active_on(truth, trained.encode), truth), truth)
    random = torch.randn(decoder.shape, generator=torch.Generator().manual_seed(SEED)).to(decoder.device)
    frequent = np.argsort(-truth.frequency, kind="stable")[:n_latents]
    true = truth.directions[torch.from_numpy(frequent).to(truth.directions.device)]
    for name, directions in (("random", normalise(random)), ("true", true)):
        active = active_on(truth, partial(_largest, directions=directions, k=k))
        yield from _measurements(compare(directions, active, truth), truth, f"_{name}")


def active_on(truth: Truth, encode: Callable[[Tensor], Tensor]) -> sparse.csr_array:
    """Where latents are active: int32 [rows, n_latents]. `encode` gives them for raw rows."""
    device = truth.directions.device
    latents = (encode(raw.to(device)) > 0 for raw in truth.raw.split(CHUNK_ROWS))
    return sparse.csr_array(sparse.vstack([sparse.csr_array(some.int().cpu().numpy()) for some in latents]))


def compare(decoder: Tensor, active: sparse.csr_array, truth: Truth) -> Recovery:
    """Latents with rows of `decoder` [n_latents, d_model], `active` on the rows of the truth, against its features."""
    cosine = (torch.nn.functional.normalize(decoder, dim=1) @ truth.directions.T).abs().cpu().numpy()
    paired = linear_sum_assignment(cosine, maximize=True)
    nearest = cosine.argmax(axis=1)
    fired, present = _times(active), _times(truth.active)
    both = sparse.csc_array(active.T @ truth.active)  # on how many rows a latent and a feature are active
    # Only pairs that are ever active together have an F1 above 0: few of all.
    f1 = both.copy().astype(np.float64)
    latent, feature = both.indices, np.repeat(np.arange(len(present)), np.diff(both.indptr))
    f1.data = 2 * both.data / (fired[latent] + present[feature])
    best = f1.argmax(axis=0)
    of_latents = _detection(_at(both, np.arange(len(fired)), nearest), fired, present[nearest])
    of_features = _detection(_at(both, best, np.arange(len(present))), fired[best], present)
    of_features = {f"feature_{name}": np.where(present > 0, each, np.nan) for name, each in of_features.items()}
    largest = cosine.max(axis=0).astype(np.float64)
    return Recovery(
        float(cosine[paired].mean()),
        len(np.unique(nearest)) / len(nearest),
        of_latents,
        {"mmcs": largest, "found": (largest > FOUND).astype(np.float64), **of_features},
    )


def _measurements(recovery: Recovery, truth: Truth, suffix: str = "") -> Iterator[Measurement]:
    seed = SEED if suffix == "_random" else None
    n_latents = len(next(iter(recovery.latents.values())))
    yield Measurement(f"mcc{suffix}", recovery.mcc, n=min(n_latents, len(truth.frequency)), seed=seed)
    yield Measurement(f"uniqueness{suffix}", recovery.uniqueness, n=n_latents, seed=seed)
    for name, values in recovery.latents.items():
        yield _mean(f"{name}{suffix}", values)
    for name, values in recovery.features.items():
        yield _mean(f"{name}{suffix}", values)
    band = np.digitize(np.log10(truth.frequency.clip(10 ** BINS[0])), BINS[1:-1])
    for number in np.unique(band):
        for name, values in recovery.features.items():
            at = f"frequency 1e{BINS[number]:g} to 1e{BINS[number + 1]:g}"
            yield _mean(f"{name}{suffix}", values[band == number], at)


def _mean(metric: str, values: np.ndarray, at: str = "") -> Measurement:
    """Over those that have a value, with an interval over them."""
    there = values[~np.isnan(values)]
    columns = {"value": there, "one": np.ones(len(there))}
    found = by_document(np.arange(len(there)), columns, {metric: ratio("value", "one")})[metric]
    return Measurement(metric, *found, at=at, n=len(there), seed=SEED)


def _detection(both: np.ndarray, fired: np.ndarray, present: np.ndarray) -> dict[str, np.ndarray]:
    """Of detectors that fire on so many rows for what is present on so many; 0 where one never does right."""
    return {
        "precision": both / fired.clip(1),
        "recall": both / present.clip(1),
        "f1": 2 * both / (fired + present).clip(1),
    }


def _at(matrix: sparse.csc_array, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return np.asarray(sparse.csr_array(matrix)[row, column]).astype(np.float64).ravel()


def _times(active: sparse.csr_array) -> np.ndarray:
    return np.bincount(active.indices, minlength=active.shape[1])


def _largest(raw: Tensor, directions: Tensor, k: int) -> Tensor:
    """The k largest products of each preprocessed row with the directions, [rows, n_latents]; 0 elsewhere."""
    product = normalise(raw) @ directions.T
    kept = product.topk(min(k, len(directions)), dim=1)
    return torch.zeros_like(product).scatter(1, kept.indices, kept.values)
