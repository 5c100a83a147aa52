"""How much of the board linear probes read from a layer, from what an SAE makes of it, and without any training.

A probe is a ridge regression onto mine, yours and empty of every square, fitted on half of the held-out games and
measured on the other half (Nanda 2023, Du et al. 2025). The board is the one after the token; `at`: "" for all of it,
"corner", "edge" (without corners), "inside", "changed" (discs whose colour is not the one that they were laid with), or
"before" for the whole board before the token.

| metric | of what |
|---|---|
| `accuracy` | x, the residual stream of the layer: the same for all cells |
| `accuracy_x_hat` | x_hat of the SAE |
| `accuracy_untrained` | the stream of the same subject with random weights |
| `majority` | the most frequent of the three on each square, whatever x is |
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.scaling.metrics import Metric
from saescale.storage.source import Source
from saescale.trainers.evals.boards.boards import Boards, heldout_boards, othello_of
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.intervals import SEED, Estimate, by_document, ratio
from saescale.trainers.evals.streams import streams_of_rows
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.othello.labels import TILES
from saescale.trainers.subjects.subject import Subject

needs: frozenset[Need] = frozenset({"labels"})
metrics = {"accuracy_x_hat": Metric("higher", bounded=True, beside=("accuracy", "accuracy_untrained", "majority"))}

RIDGE = 1e-4  # of standardised features, times the number of rows


class Prepared(NamedTuple):
    boards: Boards
    shared: dict[str, dict[str, Estimate]]  # by metric and `at`: what is the same for all cells


def prepare(source: Source, subject: Subject | None) -> Prepared:
    """Labels, and the probes that need no SAE."""
    boards, othello = heldout_boards(source, subject), othello_of(subject)
    untrained = streams_of_rows(source, othello.untrained(), othello, len(boards.act))
    return Prepared(
        boards,
        {
            "accuracy": probe(boards, boards.act),
            "accuracy_untrained": probe(boards, untrained),
            "majority": probe(boards, torch.empty(len(boards.act), 0)),
        },
    )


def measure(trained: Trained, source: Source, subject: Subject | None, prepared: Prepared) -> Iterator[Measurement]:
    boards = prepared.boards
    found = prepared.shared | {"accuracy_x_hat": probe(boards, trained.reconstruct(boards.act).cpu())}
    n = int((~boards.first).sum())
    for metric, parts in found.items():
        for at, estimate in parts.items():
            yield Measurement(metric, *estimate, at=at, n=n, seed=SEED)


def read_boards(boards: Boards, features: Tensor, names: Sequence[str] = ("after", "before")) -> dict[str, np.ndarray]:
    """The tiles that probes on `features` [rows, any] read on the rows of the second half, int64 [rows, squares], of
    the board after the token and of that before it."""
    first = torch.from_numpy(boards.first)
    x = features.double()
    x = x - x[first].mean(dim=0)
    x = x / x[first].square().mean(dim=0).sqrt().clamp_min(1e-12)
    gram = x[first].T @ x[first] + RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    found = {}
    for board in names:
        truth = torch.from_numpy(boards.labels[f"tile_{board}"]).long()
        wanted = torch.nn.functional.one_hot(truth[first], len(TILES)).double().flatten(1)
        mean = wanted.mean(dim=0)
        weights = torch.linalg.solve(gram, x[first].T @ (wanted - mean))
        found[board] = (x[~first] @ weights + mean).unflatten(1, (-1, len(TILES))).argmax(dim=2).numpy()
    return found


def probe(boards: Boards, features: Tensor) -> dict[str, Estimate]:
    """The accuracy of probes on `features` [rows, any]; without a feature they give the most frequent tile."""
    found = read_boards(boards, features)
    columns = {board: tiles == boards.labels[f"tile_{board}"][~boards.first] for board, tiles in found.items()}
    right, changed = columns["after"], boards.labels["changed_after"][~boards.first]
    parts = {"": (right, np.ones_like(right)), "before": (columns["before"], np.ones_like(right))}
    parts["changed"] = (right & changed, changed)
    parts |= {name: (right[:, there], np.ones_like(right[:, there])) for name, there in boards.regions().items()}
    sums = {f"{name} {which}": array.sum(axis=1) for name, pair in parts.items() for which, array in
            zip(("right", "all"), pair, strict=True)}  # fmt: skip
    statistics = {name: ratio(f"{name} right", f"{name} all") for name in parts}
    return by_document(boards.doc[~boards.first], sums, statistics)
