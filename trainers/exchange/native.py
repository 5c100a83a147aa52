"""saescale's own format: `cells/CELL_ID/sae.safetensors`, the averaged weights that a cell's nmse was measured with.

The tensors are the architecture's parameters, float32, under its names; the header holds the cell, as JSON, and says
how rows are preprocessed.
"""

import json

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from saescale.storage import files
from saescale.storage.errors import SaescaleError, one_line
from saescale.trainers.architectures.architecture import Shape
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.exchange.trained import Trained

FILE = "sae.safetensors"


def write(trained: Trained, url: str) -> list[str]:
    """Writes `url`/sae.safetensors, or `url` itself where it ends in .safetensors; the URL of what it wrote.

    Decoder rows are at most of unit norm (Adam.averaged). Raises SaescaleError where it cannot be written.
    """
    where = _file(url)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.sae.params.items()}
    metadata = {"cell": trained.cell.model_dump_json(), "preprocessing": "unit-norm"}
    files.write_atomic(where, save(tensors, metadata=metadata))
    return [where]


def read(url: str) -> Trained:
    """Reads what `write` wrote, on the CPU. Raises SaescaleError where no such SAE is, or none that can be run."""
    where = _file(url)
    try:
        data = files.read_bytes(where)
    except FileNotFoundError as error:
        raise SaescaleError(f"there is no SAE at {where}; a cell has one when it is done") from error
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        cell = Cell.model_validate_json(header["__metadata__"]["cell"])
        params = load(data)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        reason = problem["msg"].removeprefix("Value error, ")
        raise SaescaleError(f"{where} holds no cell that this version can run ({field}: {reason})") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SaescaleError(
            f"{where} is not an SAE written by saescale: its header holds no valid cell ({one_line(error)})"
        ) from error
    shape = Shape(cell.d_model, cell.n_latents)
    return Trained(SAE(cell.architecture, shape, cell.whole_settings, params, cell.precision), cell)


def _file(url: str) -> str:
    return url if url.endswith(".safetensors") else files.join(url, FILE)
