"""Which truths about the board single latents tell, and how much of the board all of them together.

A property is "this square is mine" or "this square is yours"; only those that occur count. Active is a latent above a
share tau of its largest activation, tau in {0, 0.1 ... 0.9}. Beside the latents stands what needs no SAE; an SAE on a
subject with random weights is a cell over a store of `othello-random`.

| metric | what |
|---|---|
| `tile_pairs` | pairs of a latent and a tile, a square that is mine, yours or empty, with an AUROC above 0.7 |
| `tiles_told` | share of the tiles that some latent tells so |
| `stable_pairs` | pairs of a latent and a square whose disc is stable with an AUROC above 0.8; `at`: by which rule |
| `coverage` | mean over properties of the largest F1 of any latent |
| `coverage_always` | the same of one latent that is always active: what coverage is read beside |
| `reconstruction` | F1 of all properties on other games: predicted where a latent is active that is a sign |
| `reconstruction_tau`, `reconstruction_signs` | the best tau, and how many pairs of a latent and a property are signs |
| `..._channels` | the same of the coordinates of x, positive and negative parts |
| `..._neurons` | of the neurons of the layer's MLP |
| `..._untrained` | of the coordinates of x in the same subject with random weights |
| `..._random` | of as many random unit directions as the cell has latents, and TopK with them |

The first three are of the board before the token (Du et al. 2025), `tile_pairs` for each of the three as well (`at`).
Coverage and reconstruction are of the board after it (Karvonen et al. 2024, whose coverage divides by 3/2 as many
properties). What a reconstruction is made of is chosen on the first half of the games, and measured on the others: a
latent is a sign where the property held in 95 % of at least 10 cases, and tau is that of the largest F1. Coverage and
pairs are, as published, the best of many on the rows that they are chosen on, and so is what stands beside them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from saescale.scaling.metrics import Metric, shares
from saescale.storage.source import Source
from saescale.trainers.evals.boards.boards import Boards, heldout_boards, othello_of
from saescale.trainers.evals.boards.detectors import (
    THRESHOLDS,
    Active,
    active_latents,
    active_of,
    active_of_channels,
    active_of_neurons,
    auroc,
    best_f1,
    predict_by_union,
)
from saescale.trainers.evals.directions import largest, random_directions
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.intervals import SEED, by_document
from saescale.trainers.evals.streams import of_rows, streams_of_rows
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.othello.labels import MINE, TILES, YOURS
from saescale.trainers.subjects.subject import Subject

needs: frozenset[Need] = frozenset({"labels"})
BESIDE = ("channels", "neurons", "untrained", "random")
metrics = shares(
    {"reconstruction": (), "coverage": ("always",), "tiles_told": ()}, BESIDE,
    leads=("reconstruction", "coverage", "tiles_told"),
)  # fmt: skip
metrics |= {
    name: Metric("higher", beside=tuple(f"{name}_{other}" for other in BESIDE))
    for name in ("tile_pairs", "stable_pairs")
}

TILE_AUROC, STABLE_AUROC = 0.7, 0.8
PRECISION, LEAST = 0.95, 10  # of a latent that is a sign of a property


class Prepared(NamedTuple):
    boards: Boards
    beside: list[Measurement]  # the same for all cells


def prepare(source: Source, subject: Subject | None) -> Prepared:
    """Labels, and what coordinates of the stream and neurons tell, and coordinates without any training."""
    boards, othello = heldout_boards(source, subject), othello_of(subject)
    rows, layer = len(boards.act), source.site.layer
    others = {
        "channels": active_of_channels(boards.act),
        "neurons": active_of_neurons(of_rows(source, lambda ids: othello.neurons(ids, layer), othello, rows)),
        "untrained": active_of_channels(streams_of_rows(source, othello.untrained(), othello, rows)),
    }
    return Prepared(boards, [each for name, active in others.items() for each in _named(name, boards, active)])


def measure(trained: Trained, source: Source, subject: Subject | None, prepared: Prepared) -> Iterator[Measurement]:
    boards = prepared.boards
    n_latents, d_model = trained.cell.n_latents, trained.cell.d_model
    yield from recovered(boards, active_latents(trained, boards.act))
    random = largest(boards.act, random_directions(n_latents, d_model), trained.cell.k)
    yield from _named("random", boards, active_of(random, n_latents))
    share = _occurring(boards).mean(axis=0)
    yield Measurement("coverage_always", float(np.mean(2 * share / (1 + share))), n=len(boards.act))
    yield from prepared.beside


def _named(name: str, boards: Boards, active: Active) -> Iterator[Measurement]:
    """All metrics of what stands beside latents; what is random is so by the seed of intervals."""
    for each in recovered(boards, active):
        yield each._replace(metric=f"{each.metric}_{name}")


def recovered(boards: Boards, active: Active) -> Iterator[Measurement]:
    """All metrics, of latents or of what takes their place."""
    n = active.n_rows
    tiles = boards.labels["tile_before"]
    told, there = 0, 0
    pairs = {}
    for tile, name in enumerate(TILES):
        above = auroc(active, tiles == tile) > TILE_AUROC
        pairs[name] = int(above.sum())
        told += int(above.any(axis=0).sum())
        there += int((tiles == tile).any(axis=0).sum())
    yield Measurement("tile_pairs", sum(pairs.values()), n=n)
    for name, number in pairs.items():
        yield Measurement("tile_pairs", number, at=name, n=n)
    yield Measurement("tiles_told", told / there, n=n)
    for rule in ("du2025", "strict"):
        stable = auroc(active, boards.labels[f"stable_{rule}_before"]) > STABLE_AUROC
        yield Measurement("stable_pairs", int(stable.sum()), at=rule, n=n)
    yield Measurement("coverage", float(best_f1(active, _occurring(boards)).mean(axis=1).max()), n=n)
    found = reconstruct(boards, active)
    doc = boards.doc[~boards.first]
    f1 = by_document(doc, found.sums, {"f1": lambda of: 2 * of["both"] / (of["said"] + of["true"])})["f1"]
    yield Measurement("reconstruction", *f1, n=len(doc), seed=SEED)
    yield Measurement("reconstruction_tau", found.tau, n=len(doc))
    yield Measurement("reconstruction_signs", found.signs, n=int(boards.first.sum()))


def properties(boards: Boards) -> np.ndarray:
    """Whether each square is mine, then whether each is yours, bool [rows, 2 squares]."""
    return np.concatenate([boards.labels["tile_after"] == tile for tile in (MINE, YOURS)], axis=1)


def _occurring(boards: Boards) -> np.ndarray:
    """Those that ever hold, bool [rows, properties]."""
    found = properties(boards)
    return found[:, found.any(axis=0)]


class Reconstruction(NamedTuple):
    """What latents say of the rows of the second half, bool [rows, 2 squares], at the threshold `tau` that is best on
    the first, by so many `signs`; `sums` [rows]: how many properties are said rightly ("both"), "said", and "true"."""

    said: np.ndarray
    tau: float
    signs: int
    sums: dict[str, np.ndarray]


def reconstruct(boards: Boards, active: Active) -> Reconstruction:
    """The whole board by the union of latents that are signs of its properties on the first half."""
    truth, first = properties(boards), boards.first
    union = predict_by_union(active, truth, first, PRECISION, LEAST)
    chosen = (_sums(said[first], truth[first]) for said in union.predicted)
    best = int(np.argmax([2 * of["both"].sum() / max(of["said"].sum() + of["true"].sum(), 1) for of in chosen]))
    said = union.predicted[best][~first]
    return Reconstruction(said, float(THRESHOLDS[best]), int(union.rules[best]), _sums(said, truth[~first]))


def _sums(said: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    return {"both": (said & truth).sum(axis=1), "said": said.sum(axis=1), "true": truth.sum(axis=1)}
