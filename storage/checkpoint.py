"""Checkpoints of one cell: the newest two generations in safetensors, found by an atomic pointer, and whose turn it is.

A pointer is written last, and a file that it names is never written again, so a kill at any moment leaves the old
generations or the new ones. Whoever trains the cell takes a turn first: it creates the pointer `latest-TURN.json` of
the next number, which nobody else then can, and which only it writes. Readers go by the highest. The result takes the
number after the turn's, so that a turn that was followed by another one can end nothing. RUN.md says why that is safe.

The files themselves are tensors.py's.
"""

import json
import re
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from saescale.storage import files
from saescale.storage.documents import CHECKSUM, checksum, read_model
from saescale.storage.errors import Damaged, SaescaleError, SaescaleWarning, Superseded
from saescale.storage.tensors import Part, Tensors, write_tensors

_FORMAT = 1
POINTER = "latest.json"  # of no turn: of version 0.1.0, and of a folder that nobody else writes
KEPT = 2
_POINTER = re.compile(r"latest(?:-(\d+))?\.json")


class Generation(Part):
    """One checkpoint: its file, the step, and the caller's JSON.

    `more`: the files of the other processes, where several share the cell, in the order of their latents. A tensor that
    several files have is their rows one after another, whatever the number of processes was.
    """

    step: int = Field(ge=0, le=2**62)
    meta: dict[str, Any]
    more: list[Part] = Field(default=[])

    def parts(self) -> list[Part]:
        return [Part(file=self.file, bytes=self.bytes, xxh3=self.xxh3), *self.more]


class Pointer(BaseModel):
    """Content of a pointer, newest generation first. `ended`: the result, in the one that takes the last number."""

    # NaN in `meta` (a diverged loss) must come back as NaN.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    format: int = _FORMAT
    generations: list[Generation] = []
    ended: dict[str, Any] | None = None
    by: str = ""  # no two are alike, so that whoever created one knows it again

    def files(self) -> set[str]:
        """Of all its generations."""
        return {part.file for generation in self.generations for part in generation.parts()}

    def content(self) -> bytes:
        document = json.loads(self.model_dump_json())
        for generation in document["generations"]:
            if not generation["more"]:
                del generation["more"]
        return json.dumps(document | {CHECKSUM: checksum(document)}).encode()


class Turn(NamedTuple):
    """Whose turn it is at a cell: its number, and the cell's result where the last turn has ended."""

    number: int
    ended: dict[str, Any] | None = None


def take(url: str) -> Turn:
    """Takes the next turn at the cell with the folder `url`, with the checkpoints that the last one had.

    Takes none where the last turn has ended with a result, unless that says `failed`.
    """
    while True:
        last = _last_turn(files.list_names(url))
        before = _read(url, last)
        if before.ended is not None and before.ended.get("status") != "failed":
            return Turn(last, before.ended)
        mine = Pointer(generations=before.generations, by=uuid.uuid4().hex)
        where = files.join(url, pointer_name(last + 1))
        if files.create(where, mine.content()):
            break
    # What was saved between reading and taking may have replaced what was read, and nothing will from now on.
    if (now := _read(url, last).generations) != before.generations:
        files.write_atomic(where, mine.model_copy(update={"generations": now}).content())
    return Turn(last + 1)


def end(url: str, turn: int, result: dict[str, Any], keep: bool = False) -> None:
    """Ends a turn with the cell's result (JSON); `keep`: its checkpoints stay, for another try.

    Raises Superseded where another turn was taken.
    """
    generations = _read(url, turn).generations if keep else []
    pointer = Pointer(generations=generations, ended=result, by=uuid.uuid4().hex)
    if not files.create(files.join(url, pointer_name(turn + 1)), pointer.content()):
        raise _superseded(url)


def clear(url: str, failed: bool) -> None:
    """Removes the checkpoints of a cell that has its result; of one that failed, which may be tried again, only those
    that are not kept for it, and no numbers of turns."""
    if not failed:
        files.remove(url)
        return
    present = files.list_names(url)
    _remove_generations(url, present, _read(url, _last_turn(present)).files())


def save(
    url: str, step: int, tensors: Mapping[str, np.ndarray], meta: dict[str, Any], keep: int | None = None, turn: int = 0
) -> None:
    """Adds a checkpoint to the folder `url` and removes all but the newest two; `meta` is JSON.

    A generation at this step or a later one is replaced: whoever saves step s has gone back to before it. `keep`: the
    step to go back to, when this is one of several folders that go back together. A generation between the two is of
    an attempt that was given up, and would push that one out. Raises Superseded where a turn after `turn` was taken.
    """
    commit(url, step, [write_part(url, step, tensors, turn)], meta, keep, turn)


def write_part(
    url: str, step: int, tensors: Mapping[str, np.ndarray], turn: int = 0, shard: int = 0, shards: int = 1
) -> Part:
    """Writes what one of `shards` processes has of a checkpoint, which counts when `commit` was told of all parts."""
    present = _present(url, turn)
    of_shard = f"-shard-{shard:05d}-of-{shards:05d}" if shards > 1 else ""
    return write_tensors(url, next(name for name in _names(step, turn, of_shard) if name not in present), tensors)


def commit(
    url: str, step: int, parts: Sequence[Part], meta: dict[str, Any], keep: int | None = None, turn: int = 0
) -> None:
    """Makes parts that were written, in the order of their shards, the newest checkpoint; see `save`."""
    present = _present(url, turn)
    bound = step - 1 if keep is None else min(keep, step - 1)
    mine = _read(url, turn)
    older = [generation for generation in mine.generations if generation.step <= bound]
    newest = Generation(**parts[0].model_dump(), step=step, meta=meta, more=list(parts[1:]))
    pointer = Pointer(generations=[newest, *older[: KEPT - 1]], by=mine.by)
    files.write_atomic(files.join(url, pointer_name(turn)), pointer.content())
    # Whoever takes a turn after this finds the new pointer; whoever took one before may need what the old one names.
    _present(url, turn)
    _remove_generations(url, present, pointer.files())
    for stale in present:
        if (match := _POINTER.fullmatch(stale)) and int(match[1] or 0) < turn:
            files.remove(files.join(url, stale))


def pointer_name(turn: int) -> str:
    """The file of a turn's pointer."""
    return f"latest-{turn:05d}.json" if turn else POINTER


def _last_turn(names: Iterable[str]) -> int:
    """The highest turn of those files; 0 where nobody has taken one."""
    return max((int(match[1] or 0) for name in names if (match := _POINTER.fullmatch(name))), default=0)


def _present(url: str, turn: int) -> list[str]:
    """The names in the folder. Raises Superseded where a turn after `turn` was taken."""
    names = files.list_names(url)
    if _last_turn(names) > turn:
        raise _superseded(url)
    return names


def _superseded(url: str) -> Superseded:
    return Superseded(f"{url}: the cell has been taken over by another worker; this one stops")


def _remove_generations(url: str, present: Iterable[str], kept: set[str]) -> None:
    for stale in sorted(set(present) - kept):
        if stale.startswith("step-") and stale.endswith(".safetensors"):
            files.remove(files.join(url, stale))


def _names(step: int, turn: int, of_shard: str) -> Iterator[str]:
    """What a part may be called: the first of these that is free, since no file is ever written again."""
    of_turn = (f"-turn-{turn:05d}" if turn else "") + of_shard
    yield f"step-{step:08d}{of_turn}.safetensors"
    for number in range(1, 10**6):
        yield f"step-{step:08d}{of_turn}-{number}.safetensors"


def has_any(names: Iterable[str]) -> bool:
    """Whether there is a checkpoint among the files of a cell (`RunDirectory.cell_files`)."""
    return any(name.startswith("checkpoint/step-") for name in names)


def steps(url: str) -> list[int]:
    """The steps that can be loaded, newest first; [] when there is no checkpoint."""
    return [generation.step for generation in _generations(url)]


def load(
    url: str, step: int | None = None, rows: slice | None = None
) -> tuple[Tensors, dict[str, Any], int]:  # fmt: skip
    """(tensors, meta, step) of the checkpoint at `step`, or of the newest sound one.

    Whole files are checked now; a tensor is read when it is asked for, into memory of its own. `rows`: the latents of
    which the caller wants to know, when several processes share the cell; files of others are left alone. A damaged
    newest is passed over with a warning when `step` is None. SaescaleError when nothing sound is there.
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
            return Tensors(url, generation.parts(), rows), generation.meta, generation.step
        except SaescaleError as error:
            faults.append(str(error))
            if generation is not wanted[-1]:
                warnings.warn(f"{error}; going back to the checkpoint before it", SaescaleWarning, stacklevel=2)
    raise SaescaleError(f"no sound checkpoint in {url}: {'; '.join(faults)}; remove the folder to start anew")


def _generations(url: str) -> list[Generation]:
    return _read(url, _last_turn(files.list_names(url))).generations


def _read(url: str, turn: int) -> Pointer:
    where = files.join(url, pointer_name(turn))
    try:
        return read_model(where, Pointer, "its cell has no checkpoint any more and starts from the beginning", _FORMAT)
    except FileNotFoundError:
        return Pointer()
    except Damaged as error:
        warnings.warn(str(error), SaescaleWarning, stacklevel=4)
        return Pointer()
