"""The `wandb:` section of a sweep file, and where W&B keeps its files. Imports no wandb."""

import hashlib
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator

from saescale.storage.cache import cache_folder
from saescale.storage.files import local_path

_REFUSED, _LONGEST = "/\\#?%:", 128
Mode = Literal["online", "offline", "off"]


class WandbSettings(BaseModel):
    """The `wandb:` section of a sweep file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project: str = "saescale"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "off"] = "auto"

    @field_validator("project", "entity")
    @classmethod
    def _as_wandb_takes_it(cls, name: str | None) -> str | None:
        """What W&B itself would refuse only when runs are opened, which is after the cells were trained."""
        if name is None:
            return name
        if not name.strip() or name != name.strip() or not name.isprintable():
            raise ValueError("a name of W&B is printable text without spaces around it")
        if odd := sorted(set(name) & set(_REFUSED)):
            raise ValueError(f"W&B takes no name with {' '.join(odd)} (none of {' '.join(_REFUSED)}): leave it out")
        if len(name) > _LONGEST:
            raise ValueError(f"W&B takes no name of more than {_LONGEST} characters, and this has {len(name)}")
        return name

    @field_validator("mode", mode="before")
    @classmethod
    def _yaml_off(cls, mode: object) -> object:
        # YAML reads an unquoted `off` as false.
        return "off" if mode is False else mode


def wandb_directory(run: str) -> str:
    """Where W&B keeps the files of a sweep on this machine: the run directory, or the cache when that is remote."""
    return local_path(run) or str(cache_folder() / "wandb" / hashlib.sha256(run.encode()).hexdigest()[:12])
