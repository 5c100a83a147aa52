"""A trained SAE by where it lies: a cell's folder, or a file."""

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.trainers.exchange.native import read
from saescale.trainers.exchange.trained import Trained

SAE_FILE = "sae.safetensors"


def load(url: str) -> Trained:
    """The SAE of a cell's folder, or that of the file `url`. Raises SaescaleError where there is none."""
    in_folder = files.join(url, SAE_FILE)
    where = in_folder if not url.endswith(".safetensors") and files.exists(in_folder) else url
    try:
        return read(where)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise SaescaleError(f"{url} is no trained SAE: give a finished cell's folder or its {SAE_FILE}") from error
