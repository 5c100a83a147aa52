"""What a device sustains, for estimates of how long cells take: as a run measured it, else as measured on one of
another kind, at the vendors' proportions."""

import difflib
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from saescale.scaling.tables import Table
from saescale.storage.errors import SaescaleError

_GIVEN = "as given"


class Work(NamedTuple):
    """What training does, in the four things that take time: FLOPs of dense products, FLOPs over selected pairs (which
    are gathered and scattered, row by row), bytes of weights and scores on their way through the memory, and steps,
    each of which starts kernels and waits once for the device. Sparse FLOPs are the first two."""

    products: float = 0.0
    pairs: float = 0.0
    traffic: float = 0.0
    steps: float = 0.0

    def plus(self, other: "Work") -> "Work":
        return Work(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def flops(self) -> float:
        return self.products + self.pairs


class Rates(NamedTuple):
    """What a device does of each in a second, and seconds that a step takes whatever it does."""

    products: float
    pairs: float
    traffic: float
    step_s: float

    def seconds(self, work: Work) -> float:
        moved = work.pairs / self.pairs + work.traffic / self.traffic
        return work.products / self.products + moved + work.steps * self.step_s

    def scaled(self, products: float, memory: float) -> "Rates":
        """On a device with so many times the FLOP/s and the bandwidth of memory."""
        return Rates(self.products * products, self.pairs * memory, self.traffic * memory, self.step_s)


def step_work(d_model: int, n_latents: int, flops: float, pair_flops: float, batch_tokens: int, weights: float) -> Work:
    """Of one step: `flops` sparse ones of which `pair_flops` go over selected pairs, on `batch_tokens` rows of an SAE
    whose parameters take `weights` bytes.

    Traffic: parameters, two moments and the average are read and written, and [batch, n_latents] scores in bfloat16.
    """
    return Work(max(flops - pair_flops, 0.0), pair_flops, 8 * weights + 4.0 * batch_tokens * n_latents, 1.0)


class Device(NamedTuple):
    """`peak` FLOP/s of dense bf16 products, `bandwidth` of its memory, its `memory` in bytes and its `link` to other
    devices of a node (bytes a second one way), as the vendor states them; what it sustains (`rates`), and in words
    where that comes from.

    `flat`: sparse training FLOP/s, whatever the cell, in place of the rates, where a run or a user said so.
    """

    name: str
    peak: float
    bandwidth: float
    memory: float
    link: float
    rates: Rates
    speed_from: str
    flat: float | None = None

    @property
    def given(self) -> bool:
        """Whether a user said the speed, which no measurement replaces."""
        return self.speed_from == _GIVEN

    def seconds(self, work: Work) -> float:
        return self.rates.seconds(work) if self.flat is None else work.flops / self.flat

    def document(self, flops_per_s: float) -> dict[str, Any]:
        """As JSON, with the sparse training FLOP/s that the cells of a plan come to."""
        said = {"name": self.name, "peak": self.peak, "share": flops_per_s / self.peak, "memory": self.memory}
        return {**said, "speed_from": self.speed_from, "flops_per_s": flops_per_s}


# An NVIDIA H200 on 26 November 2026 (tests/benchmarks/results/cuda.json; d 768, N 32,768, k 32, bf16 product): the
# encoder's product alone 0.74 ms at a batch of 8,192 and 2.55 ms at 32,768, the whole step 3.8 and 8.6 ms. What grows
# with the batch beside the product is the pairs and the scores; what does not, weights and launches. The memory is
# taken to give 4 of its 4.8 TB/s. Not used for that, and predicted over measured by these four: N 131,072, k 64 at a
# batch of 32,768 (23.7 ms) 1.03; 28 cells of N 2,048 to 131,072, k 8 to 512 (161 ms) 1.19; N 8,192 at a batch of 2,048
# (bench_auxk, 3.3 ms, mostly launches) 0.6. Shares of the product of squares, 767e12 FLOP/s: 14, 25, 35 and 13 %.
H200 = Rates(products=6.0e14, pairs=2.2e12, traffic=4.0e12, step_s=1.7e-3)
# A worker on one of two cores of an AMD EPYC, the published quickstart (deploy/results/quickstart): 20 cells, N 512 to
# 8,192, k 8 to 64.
CPU = Rates(products=1.1e11, pairs=3.8e10, traffic=1e13, step_s=5.1e-3)

_H200_PEAK, _H200_BANDWIDTH = 989e12, 4.8e12


def _gpu(name: str, peak: float, bandwidth: float, memory: float, link: float) -> Device:
    rates = H200.scaled(peak / _H200_PEAK, bandwidth / _H200_BANDWIDTH)
    words = "measured on one H200" if name == "h200" else "assumed from an H200's by the vendors' figures"
    return Device(name, peak, bandwidth, memory, link, rates, f"{words} (--flops-per-s sets it)")


DEVICES = {
    device.name: device
    for device in (
        _gpu("h100", 989e12, 3.35e12, 80e9, 450e9),
        _gpu("h200", _H200_PEAK, _H200_BANDWIDTH, 141e9, 450e9),
        _gpu("b200", 2250e12, 8.0e12, 180e9, 900e9),
        _gpu("a100", 312e12, 2.0e12, 80e9, 300e9),
        _gpu("l40s", 362e12, 0.864e12, 48e9, 32e9),
        _gpu("rtx4090", 165e12, 1.008e12, 24e9, 32e9),
        Device("cpu", 2e11, 2e10, 8e9, 1e10, CPU, "measured by the published quickstart (--flops-per-s sets it)"),
    )
}


def find_device(name: str, flops_per_s: float | None = None) -> Device:
    """A device by name; `flops_per_s` replaces what it is assumed to sustain. Raises SaescaleError for another name."""
    device = DEVICES.get(name.lower())
    if device is None:
        close = difflib.get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SaescaleError(f"unknown device {name}; {hint}there are {', '.join(DEVICES)}")
    if flops_per_s is None:
        return device
    if not flops_per_s > 0:
        raise SaescaleError(f"FLOPs per second must be positive, got {flops_per_s:g}")
    return device._replace(flat=flops_per_s, speed_from=_GIVEN)


def rates_of(work: list[Work], seconds: np.ndarray) -> Rates:
    """What a device sustains, by what cells did and how long they took [cells]: non-negative least squares of the
    relative errors (Lawson and Hanson 1974). What the cells cannot tell apart from the rest takes no time.

    Raises ValueError where no cell took any.
    """
    from scipy.optimize import nnls

    if not len(work) or not (seconds > 0).all():
        raise ValueError("rates are those of cells that took time")
    relative = np.array(work) / seconds[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-300)
    each = nnls(relative / scale, np.ones(len(work)))[0] / scale
    with np.errstate(divide="ignore"):
        products, pairs, traffic = (1 / each[:3]).tolist()
    return Rates(products, pairs, traffic, float(each[3]))


def as_measured(device: Device, results: Table, curves: Table | None = None) -> Device:
    """The device at the speed at which the cells of `results` trained on devices of its kind, all cells together: by
    the tokens per second of their `curves`, else by the seconds of their own steps. Unchanged where no cell tells.

    A cell's `device` is what its maker calls it, such as "NVIDIA H100 80GB HBM3", or cpu.
    """
    if "device" not in results or results["device"].dtype.kind == "f":
        return device
    own = np.array([device.name in "".join(name.lower().split()) for name in results["device"].tolist()], dtype=bool)
    for flops, seconds in (_of_curves(results, curves, own), _of_steps(results, own)):
        if seconds > 0:
            words = f"measured by {int(own.sum())} cells of {results.source}"
            return device._replace(flat=flops / seconds, speed_from=words)
    return device


def _of_curves(results: Table, curves: Table | None, own: np.ndarray) -> tuple[float, float]:
    """(FLOPs, seconds) between the evaluations of the cells that are `own`, but not up to the first, when code is
    compiled. Cells of one pack share the stream, its rate and the seconds: these count once."""
    needed = {"cell_id", "step", "tokens", "flops", "tokens_per_s"}
    if curves is None or "cell_id" not in results or not needed <= set(curves.columns):
        return 0.0, 0.0
    rows_of, total = curves.rows_of("cell_id"), 0.0
    seconds: dict[tuple[float, float], float] = {}
    for cell in results["cell_id"][own].tolist():
        rows = rows_of.get(cell, np.empty(0, dtype=int))
        rows = rows[np.argsort(curves["step"][rows], kind="stable")]
        for before, row in pairwise(rows):
            rate = float(curves["tokens_per_s"][row])
            if rate > 0:
                total += float(curves["flops"][row] - curves["flops"][before])
                spent = float(curves["tokens"][row] - curves["tokens"][before]) / rate
                seconds[float(curves["step"][row]), rate] = spent
    return total, sum(seconds.values())


def _of_steps(results: Table, own: np.ndarray) -> tuple[float, float]:
    """(FLOPs, seconds) of the cells that are `own`."""
    if not {"flops", "wall_s"} <= set(results.columns):
        return 0.0, 0.0
    own = own & np.isfinite(results["flops"]) & (results["wall_s"] > 0)
    return float(results["flops"][own].sum()), float(results["wall_s"][own].sum())
