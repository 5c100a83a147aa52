"""saescale's own format: `cells/CELL_ID/sae.safetensors`, the averaged weights that a cell's nmse was measured with.

The tensors are the architecture's parameters, float32, under its names; the header holds the cell, as JSON, and says
how rows are preprocessed.
"""

import io
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
import xxhash
from pydantic import ValidationError
from safetensors.torch import load, save

from saescale.storage import files
from saescale.storage.checkpoint import read_header
from saescale.storage.documents import problem_of, read_json
from saescale.storage.errors import Damaged, SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.trainers.architectures.architecture import Shape, find_architecture
from saescale.trainers.architectures.own import digests, own_files, require_same
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import Centre

FILE = "sae.safetensors"
_REMEDY = "restore it, or remove the cell's folder and run the same sweep again, which trains the cell anew"


def write(trained: Trained, url: str) -> list[str]:
    """Writes `url`/sae.safetensors, or `url` itself where it ends in .safetensors; the URL of what it wrote.

    Decoder rows are at most of unit norm (Adam.averaged). Raises SaescaleError where it cannot be written.
    """
    where = _file(url)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.sae.params.items()}
    files.write_atomic(where, save(tensors, metadata=metadata(trained.cell)))
    return [where]


def metadata(cell: Cell) -> dict[str, str]:
    """What the header says of the cell."""
    return {"cell": cell.model_dump_json(), "preprocessing": "unit-norm"}


def read(url: str) -> Trained:
    """Reads what `write` wrote, on the CPU; that of a cell is held to the checksum in its result.

    Raises SaescaleError where no such SAE is, or it is damaged, or none that can be run.
    """
    where = _file(url)
    try:
        data = files.read_bytes(where)
    except FileNotFoundError as error:
        raise SaescaleError(f"there is no SAE at {where}; a cell has one when it is done") from error
    try:
        header, _ = read_header(io.BytesIO(data), len(data), where)
        _require_result(where, data)
    except Damaged as error:
        raise Damaged(f"{error}; {_REMEDY}", where) from error
    try:
        cell = Cell.model_validate_json(header["__metadata__"]["cell"])
    except (KeyError, TypeError) as error:
        raise SaescaleError(
            f"{where} is not an SAE written by saescale: its header holds no cell; give the library it is of: "
            f"saescale import {where} --format NAME"
        ) from error
    except ValidationError as error:
        newer = "; was it written by a newer saescale?" if error.errors()[0]["type"] == "extra_forbidden" else ""
        raise SaescaleError(f"{where} holds no cell that this version can run ({problem_of(error)}){newer}") from error
    _require_file(where, cell)
    _require_shapes(where, cell, {name: entry for name, entry in header.items() if name != "__metadata__"})
    shape = Shape(cell.d_model, cell.n_latents)
    return Trained(SAE(cell.architecture, shape, cell.whole_settings, load(data), cell.precision), cell)


def _require_result(where: str, data: bytes) -> None:
    """Of a cell: the bytes that its result was written with (storage/RUN.md)."""
    folder, _, name = where.rpartition("/")
    try:
        sums = read_json(files.join(folder, "result.json"), "").get("xxh3")
    except (FileNotFoundError, Damaged):
        return  # then nothing says what they should be
    if name == FILE and isinstance(sums, dict) and sums.get(FILE) not in (None, xxhash.xxh3_64_hexdigest(data)):
        raise Damaged(f"{where} is damaged: it is not what the cell's result.json was written with", where)


def _require_file(where: str, cell: Cell) -> None:
    """Of a cell of a run: that an architecture of the user's own is the file that it was trained with."""
    run, inside, _ = where.rpartition("/cells/")
    if not inside or not (here := digests(own_files([cell.architecture]))):
        return
    resolved = (RunDirectory(run).read_spec() or {}).get("resolved")
    recorded = resolved.get("architectures") if isinstance(resolved, Mapping) else None
    require_same(recorded if isinstance(recorded, Mapping) else {}, here, run)


def _require_shapes(where: str, cell: Cell, entries: Mapping[str, Any]) -> None:
    """Each parameter as the cell has it, before anything of its size is built."""
    found = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    sizes = {size for shape in found.values() for size in shape}
    floats = all(entry["dtype"] == "F32" for entry in entries.values())
    if floats and {cell.d_model, cell.n_latents} <= sizes and found == _shapes(cell):
        return
    raise Damaged(
        f"{where} is damaged: its tensors are not those of {cell.architecture} with n_latents = {cell.n_latents} and "
        f"d_model = {cell.d_model}, as its header says; {_REMEDY}",
        where,
    )


def _shapes(cell: Cell) -> dict[str, tuple[int, ...]]:
    """Of each parameter, drawn on from those that two small SAEs of the cell's settings have."""
    settings = cell.whole_settings

    def can_be(n_latents: int) -> bool:
        try:
            settings.check(n_latents)
        except ValueError:
            return False
        return True

    def of(n_latents: int) -> dict[str, tuple[int, ...]]:
        centre, shape = Centre(torch.zeros(cell.d_model), 1.0), Shape(cell.d_model, n_latents)
        made = find_architecture(cell.architecture).parameters(shape, settings, centre, 0)
        return {name: tuple(parameter.data.shape) for name, parameter in made.items()}

    small = list(islice(filter(can_be, range(max(16, cell.k), cell.n_latents)), 2))
    if len(small) < 2:  # it is small itself, or its settings have none that is
        return of(cell.n_latents)
    (few, there), (more, then) = ((n_latents, of(n_latents)) for n_latents in small)
    return {
        name: tuple(
            a + (b - a) * (cell.n_latents - few) // (more - few) for a, b in zip(there[name], then[name], strict=True)
        )
        for name in there
    }


def _file(url: str) -> str:
    return url if url.endswith(".safetensors") else files.join(url, FILE)
