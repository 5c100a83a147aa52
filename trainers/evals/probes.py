"""Logistic probes on single columns, many at once, by Newton-Raphson."""

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-4  # of a weight on a standardised column
ITERATIONS, TOLERANCE = 50, 1e-6  # nats that a step has to promise
_BLOCK = 2**17  # entries of a block of columns, which stays in the cache


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
