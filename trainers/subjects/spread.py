"""Models that are larger than one device: their layers lie on several, by accelerate's device map."""

import re
import tempfile
from typing import Any

import torch

from saescale.storage.errors import SaescaleError

AUTO = "auto"
_UNITS = {"": 1} | {f"{p}{b}": base**e for e, p in enumerate("KMGT", 1) for b, base in (("B", 1000), ("iB", 1024))}
_ENTRY = re.compile(r"(\d+|cpu) *= *(\d+(?:\.\d+)?) *([KMGT]i?B|)")


def most_memory(device_map: str) -> dict[int | str, int] | None:
    """What `auto`, or bytes on each device (`0=70GB,1=70GB,cpu=200GB`), says of the most that weights take there; None:
    what is free. Raises SaescaleError for anything else."""
    if device_map == AUTO:
        return None
    found: dict[int | str, int] = {}
    for entry in device_map.split(","):
        match = _ENTRY.fullmatch(entry.strip())
        if match is None:
            raise SaescaleError(
                f"device_map: {entry.strip()!r} is no memory of a device: give auto, or as 0=70GB,1=70GB,cpu=200GB the "
                "most that weights may take on each GPU and in memory"
            )
        device = int(match[1]) if match[1].isdigit() else match[1]
        if device in found:
            raise SaescaleError(f"device_map names the device {device} twice; give each one memory")
        found[device] = int(float(match[2]) * _UNITS[match[3]])
    return found


class Spread:
    """How transformers is to lay out a model: on the GPUs first, then in memory, then on the disk, from where layers
    are read whenever they run. Some weights have to be written anew for that: they lie in a temporary folder.

    Raises SaescaleError for a GPU that is not here.
    """

    def __init__(self, device_map: str) -> None:
        self._most, there = most_memory(device_map), torch.cuda.device_count()
        if missing := [each for each in self._most or () if isinstance(each, int) and each >= there]:
            raise SaescaleError(f"device_map: there is no GPU {missing[0]}, counted from 0, of the {there} here")
        self._folder = tempfile.TemporaryDirectory(prefix="saescale-offload-")

    @property
    def options(self) -> dict[str, Any]:
        """For from_pretrained."""
        return {"device_map": AUTO, "max_memory": self._most, "offload_folder": self._folder.name}


def device_of(model: Any) -> torch.device:
    """Where ids go in and streams come out: the device of the model, or the first GPU of those on which it lies."""
    placed = getattr(model, "hf_device_map", None)
    if placed is None:
        found: torch.device = model.device
        return found
    parts = [each for each in placed.values() if each != "disk"]
    devices = [torch.device(f"cuda:{each}" if isinstance(each, int) else each) for each in parts]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def weight_of(model: Any, name: str) -> torch.Tensor:
    """The parameter of that name, read from the disk where it lies there."""
    parameter: torch.Tensor = model.get_parameter(name).detach()
    if parameter.device.type != "meta":
        return parameter
    from accelerate.utils import align_module_device

    with align_module_device(model.get_submodule(name.rpartition(".")[0]), torch.device("cpu")):
        return model.get_parameter(name).detach()


def words(model: Any) -> str:
    """How many of its parts lie where."""
    placed = getattr(model, "hf_device_map", {"": model.device})  # what fits one device has no map
    where = [f"GPU {each}" if isinstance(each, int) else str(each) for each in placed.values()]
    return ", ".join(f"{where.count(each)} on {each}" for each in dict.fromkeys(where))
