"""What a device sustains, for estimates of how long cells take: as a run measured it, else assumptions."""

import difflib
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from saescale.scaling.tables import Table
from saescale.storage.errors import SaescaleError

# The share of the peak that training a TopK SAE's sparse FLOPs is assumed to reach: one large encoder product beside
# gathers, scatters and the optimiser's memory traffic. An assumption: no device has been measured for it but the CPU.
_SHARE = 0.2
_GIVEN = "as given"


class Device(NamedTuple):
    """`peak` FLOP/s of dense bf16 products as the vendor states it, the `share` of it that is assumed to be sustained
    in sparse training FLOPs, and `memory` in bytes. `speed_from` says in words where the speed comes from."""

    name: str
    peak: float
    share: float
    memory: float
    speed_from: str = "assumed (--flops-per-s sets it)"

    @property
    def given(self) -> bool:
        """Whether a user said the speed, which no measurement replaces."""
        return self.speed_from == _GIVEN

    @property
    def flops_per_s(self) -> float:
        """Sparse training FLOPs a second that it is assumed to sustain."""
        return self.peak * self.share

    def hours(self, flops: float) -> float:
        """How long it takes for so many sparse training FLOPs."""
        return flops / self.flops_per_s / 3600


DEVICES = {
    device.name: device
    for device in (
        Device("h100", 989e12, _SHARE, 80e9),
        Device("h200", 989e12, _SHARE, 141e9),
        Device("b200", 2250e12, _SHARE, 180e9),
        Device("a100", 312e12, _SHARE, 80e9),
        Device("l40s", 362e12, _SHARE, 48e9),
        Device("rtx4090", 165e12, _SHARE, 24e9),
        # Sustained in the published quickstart, 20 cells on two cores: sum of FLOPs over sum of seconds.
        Device("cpu", 0.8e11, 1.0, 8e9),
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
    return device._replace(peak=flops_per_s, share=1.0, speed_from=_GIVEN)


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
            return device._replace(peak=flops / seconds, share=1.0, speed_from=words)
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
