"""What a device sustains, for estimates of how long cells take: as a run measured it, else assumptions."""

import difflib
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


def as_measured(device: Device, results: Table) -> Device:
    """The device at the speed at which the cells of `results` trained on devices of its kind: their sparse training
    FLOPs over the seconds of their own steps, all cells together. Unchanged where no cell says that it was one.

    A cell's `device` is what its maker calls it, such as "NVIDIA H100 80GB HBM3", or cpu.
    """
    if not {"device", "flops", "wall_s"} <= set(results.columns) or results["device"].dtype.kind == "f":
        return device
    own = np.array([device.name in "".join(name.lower().split()) for name in results["device"].tolist()], dtype=bool)
    own &= np.isfinite(results["flops"]) & np.isfinite(results["wall_s"]) & (results["wall_s"] > 0)
    if not own.any():
        return device
    speed = float(results["flops"][own].sum() / results["wall_s"][own].sum())
    return device._replace(peak=speed, share=1.0, speed_from=f"measured by {int(own.sum())} cells of {results.source}")
