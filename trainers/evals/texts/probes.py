"""Logistic probes on single columns, many at once, by Newton-Raphson; and which of the columns has the best one.

With u = w z + b the mean cross-entropy is mean(softplus(u)) - w mean(truth z) - b mean(truth). softplus is convex, so
the first term only falls where the values of a column that lie in one bin are replaced by their mean (Jensen), whatever
w and b are: the least loss over BINS points bounds that over all rows from below, at a fraction of their cost. Columns
are fitted to all rows in the order of that bound, until it exceeds what was found.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from saescale.trainers.architectures.dense import CHUNK_ENTRIES

RIDGE = 1e-4  # of a weight on a standardised column
ITERATIONS, TOLERANCE = 50, 1e-6  # nats that a step has to promise
BINS = 64
WIDTH = math.asinh(2 * 64)  # of 4,096 rows one alone can be 64 deviations away
SLACK = 1e-5  # nats, of |u| = 1: for what losses are short of their least, and for rounding
_BLOCK = 2**17  # entries of a block of columns, which stays in the cache
_AT_A_TIME = 8  # columns that are fitted to all rows


class Probes(NamedTuple):
    """Of each column, float64 [columns]; `loss` is the mean cross-entropy and the ridge's part."""

    weight: Tensor
    bias: Tensor
    loss: Tensor
    least: Tensor  # bool: whether that is the least one, up to TOLERANCE; not where ITERATIONS were too few


class Best(NamedTuple):
    """The probe with the least loss, on column `column`: sigmoid(weight (values - mean) / scale + bias)."""

    column: int
    mean: float
    scale: float
    weight: float
    bias: float

    def logits(self, values: Tensor) -> Tensor:
        """Of that column's `values`, float64 of their shape."""
        return self.weight * (values.double() - self.mean) / self.scale + self.bias


class _Points(NamedTuple):
    """What a column is to a probe: float32 [columns, points], and how many rows each point stands for (None: one)."""

    z: Tensor
    counts: Tensor | None


class _Standard(NamedTuple):
    z: Tensor  # float32 [columns, rows], of mean 0 and variance 1, or all 0
    mean: Tensor  # float64 [columns]
    scale: Tensor


def best_probes(values: Tensor, learns: Tensor, truths: Tensor) -> list[Best]:
    """Of each task the column of `values` [rows, columns] whose logistic probe has the least loss (see `fit`) against
    `truths` [tasks, rows], float32 of 0 and 1, on those rows that learn, bool [rows]: some of either kind."""
    truths = truths[:, learns]
    parts = values.split(max(1, CHUNK_ENTRIES // len(values)), dim=1)
    bounds = torch.cat([_bounds(_standard(some[learns]).z, truths) for some in parts], dim=1)
    return [_best(values, learns, truth, of_task) for truth, of_task in zip(truths, bounds, strict=True)]


def fit(z: Tensor, truth: Tensor) -> Probes:
    """Minimises mean cross-entropy + RIDGE w^2 / 2 of sigmoid(w z + b) for each column z, [columns, rows] float32
    standardised, against `truth` [rows] of 0 and 1: by Newton-Raphson, steps halved where the loss would rise."""
    return _fit(_Points(z, None), z.double() @ truth.double(), truth)


def _best(values: Tensor, learns: Tensor, truth: Tensor, bounds: Tensor) -> Best:
    order = bounds.argsort(stable=True)
    found: Best | None = None
    lowest = torch.inf
    for some in order.split(_AT_A_TIME):
        if not bounds[some[0]] < lowest:
            break
        standard = _standard(values[:, some][learns])
        probes = fit(standard.z, truth)
        i = int(probes.loss.argmin())
        if found is None or probes.loss[i] < lowest:
            lowest = float(probes.loss[i])
            of = standard.mean, standard.scale, probes.weight, probes.bias
            found = Best(int(some[i]), *(float(each[i]) for each in of))
    assert found is not None, "no bound is infinite"
    return found


def _bounds(z: Tensor, truths: Tensor) -> Tensor:
    """Below the least loss of each task and column, float64 [tasks, columns]."""
    points, sums = _binned(z), z.double() @ truths.T.double()
    found = []
    for truth, of_task in zip(truths, sums.T, strict=True):
        probes = _fit(points, of_task, truth)
        below = SLACK * (1 + probes.weight.abs() + probes.bias.abs())
        found.append(torch.where(probes.least, probes.loss - below, -torch.inf))
    return torch.stack(found)


def _binned(z: Tensor) -> _Points:
    """Bins are narrow where a standardised column has most of its values, and none is left out."""
    place = (torch.asinh(z * 2) * (BINS / 2 / WIDTH) + BINS / 2).clamp_(0, BINS - 1).long()
    empty = torch.zeros(len(z), BINS, device=z.device)
    counts = empty.scatter_add(1, place, torch.ones_like(z))
    return _Points(empty.scatter_add(1, place, z) / counts.clamp_min(1), counts)


def _standard(values: Tensor) -> _Standard:
    """Of columns [rows, columns]."""
    z = values.T.double()
    mean, scale = z.mean(dim=1), z.std(dim=1, correction=0)
    scale = torch.where(scale > 1e-9 * z.abs().amax(dim=1), scale, torch.inf)  # of a column that never varies
    return _Standard(((z - mean[:, None]) / scale[:, None]).float(), mean, scale)


def _fit(points: _Points, sums: Tensor, truth: Tensor) -> Probes:
    """`sums` float64 [columns]: of truth * z over all rows, of which `points` may be the means."""
    at_a_time = max(1, _BLOCK // points.z.shape[1])
    rows, true = len(truth), float(truth.double().sum())
    blocks = []
    for start in range(0, len(sums), at_a_time):
        some = slice(start, start + at_a_time)
        counts = None if points.counts is None else points.counts[some]
        blocks.append(_fit_block(_Points(points.z[some], counts), sums[some], rows, true))
    return Probes(*map(torch.cat, zip(*blocks, strict=True)))


def _fit_block(points: _Points, sums: Tensor, rows: int, true: float) -> Probes:
    z, n = points
    columns = len(z)
    mean, share = sums / rows, true / rows
    found = torch.zeros(3, columns, dtype=torch.float64, device=z.device)  # weight, bias and loss
    left = torch.arange(columns, device=z.device)
    at = torch.stack([found[0], torch.full_like(found[0], math.log(share / (1 - share)))])  # where the loss is known
    known = torch.full_like(found[0], torch.inf)
    step, decline = torch.zeros_like(at), torch.zeros_like(known)
    least = torch.ones(columns, dtype=torch.bool, device=z.device)

    def over_rows(of_points: Tensor) -> Tensor:
        return (of_points if n is None else of_points * n).sum(dim=1).double() / rows

    for _ in range(ITERATIONS):
        tried = at + step
        u = torch.addcmul(tried[1, :, None].float(), z, tried[0, :, None].float())
        linear = tried[0] * mean + tried[1] * share
        loss = over_rows(torch.nn.functional.softplus(u)) - linear + RIDGE / 2 * tried[0] ** 2
        better = loss <= known + TOLERANCE / 10
        # Halved until it helps; then the next one is from there.
        at, known = torch.where(better, tried, at), torch.where(better, loss, known)
        p = u.sigmoid_()
        g0 = over_rows(p * z) - mean + RIDGE * tried[0]
        g1 = over_rows(p) - share
        curved = p.mul_(1 - p)
        h11 = over_rows(curved) + 1e-12
        curved.mul_(z)
        h01 = over_rows(curved)
        h00 = over_rows(curved * z) + RIDGE
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
            step, decline, mean = step[:, moving], decline[moving], mean[moving]
            n = None if n is None else n[moving]
    else:
        found[:, left] = torch.stack([*at, known])
        least[left] = False
    weight, bias, loss = found
    return Probes(weight, bias, loss, least)
