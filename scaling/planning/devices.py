"""What a device sustains, for estimates of how long cells take. Assumptions, each of which a user can replace."""

import difflib
from typing import NamedTuple

from saescale.storage.errors import SaescaleError

# The share of the peak that training a TopK SAE's sparse FLOPs is assumed to reach: one large encoder product beside
# gathers, scatters and the optimiser's memory traffic. An assumption: no device has been measured for it but the CPU.
_SHARE = 0.2


class Device(NamedTuple):
    """`peak` FLOP/s of dense bf16 products as the vendor states it, the `share` of it that is assumed to be sustained
    in sparse training FLOPs, and `memory` in bytes."""

    name: str
    peak: float
    share: float
    memory: float

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
    return device._replace(peak=flops_per_s, share=1.0)
