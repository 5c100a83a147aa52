"""A trained SAE on disk: `cells/CELL_ID/sae.safetensors`, the averaged weights that its nmse was measured with."""

import json
from typing import NamedTuple

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.trainers.architectures.topk import SAE
from saescale.trainers.cell import Cell
from safetensors.torch import load, save


class Trained(NamedTuple):
    sae: SAE  # expects rows preprocessed by saescale.trainers.preprocess.normalise
    cell: Cell


def save_trained(url: str, sae: SAE, cell: Cell) -> None:
    """Writes W_enc and W_dec [n_latents, d_model], b_enc and b_pre as float32, the cell in the header.

    `sae` is meant to be SAEAdam.averaged(), whose decoder rows are at most of unit norm. Raises SaescaleError where
    it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    files.write_atomic(url, save(tensors, metadata={"cell": cell.model_dump_json(), "preprocessing": "unit-norm"}))


def load_trained(url: str) -> Trained:
    """Reads what `save_trained` wrote. Raises SaescaleError where the file is not such an SAE."""
    data = files.read_bytes(url)
    length = int.from_bytes(data[:8], "little")
    try:
        cell = Cell.model_validate_json(json.loads(data[8 : 8 + length])["__metadata__"]["cell"])
    except (ValueError, KeyError) as error:
        raise SaescaleError(f"{url} is not an SAE written by saescale: its header holds no valid cell") from error
    sae = SAE(cell.d_model, cell.n_latents, cell.k)
    sae.load_state_dict(load(data))
    return Trained(sae, cell)
