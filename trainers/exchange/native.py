"""saescale's own format: `cells/CELL_ID/sae.safetensors`, the averaged weights that a cell's nmse was measured with.

The tensors are the architecture's parameters, float32, under its names; the header holds the cell, as JSON, and says
how rows are preprocessed. An SAE that several processes trained, or that was exported so, lies in several files with an
index (storage/sharded.py), which says the same.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import xxhash
from pydantic import ValidationError
from safetensors.torch import load

from saescale.storage import files, sharded
from saescale.storage.documents import problem_of, read_json
from saescale.storage.errors import Damaged, SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.storage.sharded import INDEX, SUFFIX, index_name
from saescale.storage.tensors import File, Part, Tensors, read_header, write_tensors
from saescale.trainers.architectures.architecture import Parameter, Shape, find_architecture
from saescale.trainers.architectures.own import digests, own_files, require_same
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.mesh.mesh import ALONE, Mesh
from saescale.trainers.preprocess import Centre

FILE = "sae.safetensors"


def write(trained: Trained, url: str) -> list[str]:
    """Writes `url`/sae.safetensors, or `url` itself where it ends in .safetensors; the URL of what it wrote.

    Decoder rows are at most of unit norm (Adam.averaged). Raises SaescaleError where it cannot be written.
    """
    where = _file(url)
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in sorted(trained.sae.params.items())}
    write_tensors(*sharded.split(where), tensors, metadata(trained.cell))
    return [where]


def metadata(cell: Cell) -> dict[str, str]:
    """What the header says of the cell."""
    return {"cell": cell.model_dump_json(), "preprocessing": "unit-norm"}


def read(url: str, mesh: Mesh = ALONE) -> Trained:
    """Reads what `write`, `copy` or a mesh wrote, on the CPU; that of a cell is held to the checksums in its result.

    `url`: the folder, the file or the index. `mesh`: of a process that is to have its share, and no more in memory.
    Raises SaescaleError where no such SAE is, or it is damaged, or none that can be run.
    """
    where = _find(url)
    if where.endswith(INDEX) or not mesh.alone:
        return _of_stored(where, mesh)
    data = files.read_bytes(where)
    try:
        header, _ = read_header(io.BytesIO(data), len(data), where)
        _require_result(where, xxhash.xxh3_64_hexdigest(data))
    except Damaged as error:
        raise Damaged(f"{error}; {_remedy(where)}", where) from error
    cell = _cell(where, header.pop("__metadata__", None))
    _require_shapes(where, cell, {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()})
    shape = Shape(cell.d_model, cell.n_latents)
    return Trained(SAE(cell.architecture, shape, cell.whole_settings, load(data), cell.precision), cell)


def copy(url: str, out: str, max_bytes: int | None = None) -> list[str]:
    """The SAE at `url` once more, in the file `out`, or where it takes more than `max_bytes` in several with an index
    (storage/sharded.py); some megabytes of it are in memory at a time. The URLs of what was written.

    Raises SaescaleError as `read` does, and where `out` is the place that it lies in.
    """
    where, target = _find(url), _file(out)
    if files.filesystem(_index_of(where)) == files.filesystem(_index_of(target)):
        raise SaescaleError(f"the SAE lies at {where} itself; give another place to write to")
    tensors, cell = _stored(where)
    return sharded.copy(tensors, target, metadata(cell), max_bytes)


def _of_stored(where: str, mesh: Mesh) -> Trained:
    """Tensor by tensor, so that nothing is in memory twice."""
    tensors, cell = _stored(where, mesh)
    own = _own(cell, mesh)
    common = {name for name, parameter in _small(cell).items() if parameter.common}
    params = {name: torch.from_numpy(tensors.rows(name, None if name in common else own)) for name in tensors}
    shape = Shape(cell.d_model, cell.n_latents)
    return Trained(SAE(cell.architecture, shape, cell.whole_settings, params, cell.precision, mesh), cell)


def _stored(where: str, mesh: Mesh = ALONE) -> tuple[Tensors, Cell]:
    """What lies in a file or by an index, as far as it concerns the mesh's process checked."""
    folder, name = sharded.split(where)
    remedy = _remedy(where)
    try:
        if where.endswith(INDEX):
            index = sharded.read_index(where, remedy)
            _require_result(where, xxhash.xxh3_64_hexdigest(files.read_bytes(where)))
            cell = _cell(where, index.metadata)
            tensors = index.tensors(where, _own(cell, mesh))
        else:
            part = Part(file=name, bytes=files.size(where), xxh3=_sum(where) or "")
            cell = _cell(where, File(folder, part).metadata)
            tensors = Tensors(folder, [part], _own(cell, mesh))
    except Damaged as error:
        raise Damaged(str(error) if remedy in str(error) else f"{error}; {remedy}", where) from error
    _require_shapes(where, cell, tensors.entries())
    return tensors, cell


def _own(cell: Cell, mesh: Mesh) -> slice | None:
    """The latents that a process of the mesh holds; None for all."""
    return None if mesh.shards == 1 else slice(mesh.first, mesh.first + mesh.here(cell.n_latents))


def find(url: str) -> str | None:
    """The file or the index of the SAE at `url`, which is a folder, a file or an index; None where there is none."""
    where = url if url.endswith((SUFFIX, INDEX)) else files.join(url, FILE)
    return next((each for each in dict.fromkeys((where, _index_of(where))) if files.exists(each)), None)


def _find(url: str) -> str:
    if found := find(url):
        return found
    if RunDirectory(url).is_begun():
        raise SaescaleError(f"{url} is a run, which has an SAE for each cell; name one of them: {url}/cells/CELL_ID")
    raise SaescaleError(f"there is no SAE at {url}; a cell of a run has one when it is done: RUN/cells/CELL_ID")


def _remedy(where: str) -> str:
    """What to do where it is damaged."""
    if "/cells/" in where:
        return "restore it, or remove the cell's folder and run the same sweep again, which trains the cell anew"
    return "copy or export it again"


def _cell(where: str, told: Any) -> Cell:
    """The cell that a header or an index tells of."""
    try:
        cell = Cell.model_validate_json(told["cell"])
    except (KeyError, TypeError) as error:
        raise SaescaleError(
            f"{where} is not an SAE written by saescale: its header holds no cell; of another library's SAE "
            "name the format (saescale import --format NAME, with a file of yours for it: trainers/exchange/README.md)"
        ) from error
    except ValidationError as error:
        newer = "; was it written by a newer saescale?" if error.errors()[0]["type"] == "extra_forbidden" else ""
        raise SaescaleError(f"{where} holds no cell that this version can run ({problem_of(error)}){newer}") from error
    _require_file(where, cell)
    return cell


def _require_result(where: str, found: str) -> None:
    """Of a cell: the bytes that its result was written with (storage/RUN.md)."""
    if _sum(where) not in (None, found):
        raise Damaged(f"{where} is damaged: it is not what the cell's result.json was written with", where)


def _sum(where: str) -> str | None:
    """The checksum that the result of the cell has of its file; None where nothing says what it should be. Raises
    Damaged where the result names files, and this is none of them."""
    folder, name = sharded.split(where)
    try:
        sums = read_json(files.join(folder, "result.json"), "").get("xxh3")
    except (FileNotFoundError, Damaged):
        return None
    if not isinstance(sums, dict) or name not in (FILE, index_name(FILE)):
        return None
    if name not in sums:
        raise Damaged(f"{where} is none of the files that the cell's result.json was written with", where)
    return str(sums[name])


def _require_file(where: str, cell: Cell) -> None:
    """Of a cell of a run: that an architecture of the user's own is the file that it was trained with."""
    run, inside, _ = where.rpartition("/cells/")
    if not inside or not (here := digests(own_files([cell.architecture]))):
        return
    resolved = (RunDirectory(run).read_spec() or {}).get("resolved")
    recorded = resolved.get("architectures") if isinstance(resolved, Mapping) else None
    require_same(recorded if isinstance(recorded, Mapping) else {}, here, run)


def _require_shapes(where: str, cell: Cell, entries: Mapping[str, tuple[str, Sequence[int]]]) -> None:
    """Each parameter as the cell has it, before anything of its size is built; type and shape of each."""
    found = {name: tuple(shape) for name, (_, shape) in entries.items()}
    sizes = {size for shape in found.values() for size in shape}
    floats = all(kind == "F32" for kind, _ in entries.values())
    if floats and {cell.d_model, cell.n_latents} <= sizes and found == _shapes(cell):
        return
    raise Damaged(
        f"{where} is damaged: its tensors are not those of {cell.architecture} with n_latents = {cell.n_latents} and "
        f"d_model = {cell.d_model}, as its header says; {_remedy(where)}",
        where,
    )


def _shapes(cell: Cell) -> dict[str, tuple[int, ...]]:
    """Of each parameter, drawn on from those that two small SAEs of the cell's settings have."""

    def of(n_latents: int) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.data.shape) for name, parameter in _parameters(cell, n_latents).items()}

    small = _sizes(cell)
    if len(small) < 2:  # it is small itself, or its settings have none that is
        return of(cell.n_latents)
    (few, there), (more, then) = ((n_latents, of(n_latents)) for n_latents in small)
    return {
        name: tuple(
            a + (b - a) * (cell.n_latents - few) // (more - few) for a, b in zip(there[name], then[name], strict=True)
        )
        for name in there
    }


def _small(cell: Cell) -> dict[str, Parameter]:
    """The parameters of a small SAE of the cell's settings."""
    return _parameters(cell, next(iter(_sizes(cell)), cell.n_latents))


def _sizes(cell: Cell) -> list[int]:
    """Up to two numbers of latents below the cell's that its settings can have."""

    def can_be(n_latents: int) -> bool:
        try:
            cell.whole_settings.check(n_latents)
        except ValueError:
            return False
        return True

    return list(islice(filter(can_be, range(max(16, cell.k), cell.n_latents)), 2))


def _parameters(cell: Cell, n_latents: int) -> dict[str, Parameter]:
    centre, shape = Centre(torch.zeros(cell.d_model), 1.0), Shape(cell.d_model, n_latents)
    return find_architecture(cell.architecture).parameters(shape, cell.whole_settings, centre, 0)


def _index_of(where: str) -> str:
    """Of a file of tensors; an index's own."""
    return where if where.endswith(INDEX) else index_name(where)


def _file(url: str) -> str:
    return url if url.endswith(SUFFIX) else files.join(url, FILE)
