"""Checkpoints of one cell: the newest two generations in safetensors, found by an atomic pointer.

The pointer `latest.json` is written last, and a file that it names is never written again, so a kill at any
moment leaves the old generations or the new ones.
"""

import warnings
from typing import Any

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from storage import files
from storage.errors import SaescaleError, SaescaleWarning

POINTER = "latest.json"
KEPT = 2


class Generation(BaseModel):
    """One checkpoint: file name, step, size in bytes, xxh3-64 (hex) of the file, and the caller's JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")
    file: str
    step: int
    bytes: int
    xxh3: str
    meta: dict[str, Any]


class Pointer(BaseModel):
    """Content of latest.json, newest generation first."""

    # NaN in `meta` (a diverged loss) must come back as NaN.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    generations: list[Generation]


def save(url: str, step: int, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Adds a checkpoint to the folder `url` and removes all but the newest two; `meta` is JSON.

    A generation at this step or a later one is replaced: whoever saves step s has gone back to before it.
    """
    older = [generation for generation in _generations(url) if generation.step < step]
    content = safetensors.save({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()})
    checksum = xxhash.xxh3_64_hexdigest(content)
    name = f"step-{step:08d}.safetensors"
    present = set(files.list_names(url))
    if name in present:
        name = f"step-{step:08d}-{checksum}.safetensors"
    newest = Generation(file=name, step=step, bytes=len(content), xxh3=checksum, meta=meta)
    pointer = Pointer(generations=[newest, *older[: KEPT - 1]])
    encoded = pointer.model_dump_json().encode()
    files.write_atomic(files.join(url, name), content)
    files.write_atomic(files.join(url, POINTER), encoded)
    kept = {generation.file for generation in pointer.generations}
    for stale in sorted(present - kept):
        if stale.startswith("step-") and stale.endswith(".safetensors"):
            files.remove(files.join(url, stale))


def steps(url: str) -> list[int]:
    """The steps that can be loaded, newest first; [] when there is no checkpoint."""
    return [generation.step for generation in _generations(url)]


def load(url: str, step: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
    """(tensors, meta, step) of the checkpoint at `step`, or of the newest sound one; the arrays are writable.

    A damaged newest is passed over with a warning when `step` is None. SaescaleError when nothing
    sound is there.
    """
    generations = _generations(url)
    wanted = [generation for generation in generations if step is None or generation.step == step]
    if not wanted:
        found = ", ".join(str(generation.step) for generation in generations) or "none"
        raise SaescaleError(
            f"no checkpoint{'' if step is None else f' of step {step}'} in {url} (steps there: {found}); "
            "give one of those steps, or train the cell again"
        )
    faults = []
    for generation in wanted:
        try:
            return _read(url, generation), generation.meta, generation.step
        except SaescaleError as error:
            faults.append(str(error))
            if generation is not wanted[-1]:
                warnings.warn(f"{error}; going back to the checkpoint before it", SaescaleWarning, stacklevel=2)
    raise SaescaleError(f"no sound checkpoint in {url}: {'; '.join(faults)}; remove the folder to start anew")


def _generations(url: str) -> list[Generation]:
    where = files.join(url, POINTER)
    try:
        return Pointer.model_validate_json(files.read_bytes(where)).generations
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise SaescaleError(f"{where} is damaged; remove its folder to train the cell from the start") from error


def _read(url: str, generation: Generation) -> dict[str, np.ndarray]:
    where = files.join(url, generation.file)
    try:
        content = files.read_bytes(where)
    except FileNotFoundError as error:
        raise SaescaleError(f"{where} is missing") from error
    if len(content) != generation.bytes:
        raise SaescaleError(f"{where} has {len(content)} bytes, not {generation.bytes}")
    if xxhash.xxh3_64_hexdigest(content) != generation.xxh3:
        raise SaescaleError(f"{where} has a wrong checksum")
    try:
        tensors = safetensors.load(content)
    except SafetensorError as error:
        raise SaescaleError(f"{where} is no safetensors file ({error})") from error
    # Copies: the arrays of safetensors are views of the file's bytes, and torch needs memory it may write.
    return {name: np.array(tensor) for name, tensor in tensors.items()}
