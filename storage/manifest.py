"""What a store holds: the manifest that seals it (FORMAT.md)."""

import json
import math
from typing import Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, model_validator

from saescale.storage import files
from saescale.storage.errors import SaescaleError

FORMAT = 2
MANIFEST = "manifest.json"
MOST = 2**62  # of what is counted: whatever says more is damaged
# More rows than so many times a shard's bytes are not in it, however well they were compressed.
_COMPRESSED = 64
Dtype = Literal["float16", "bfloat16"]
Split = Literal["train", "heldout"]


class Site(BaseModel):
    """Where in the subject the rows were taken; `positions` says which positions count (all but BOS)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layer: int
    hook: Literal["resid_post"] = "resid_post"
    positions: str

    @property
    def name(self) -> str:
        """As tables have it: resid_post.22."""
        return f"{self.hook}.{self.layer}"


class Shard(BaseModel):
    """One Parquet file: its name in the store, rows, size in bytes and the xxh3-64 (hex) of its bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1, pattern=r"^[^/\\]+$")
    split: Split
    rows: int = Field(ge=0, le=MOST)
    bytes: int = Field(ge=0, le=MOST)
    xxh3: str


class Manifest(BaseModel):
    """What a store holds.

    `mean` is [d_model], `mean_square` the mean of ||x||^2, both over the train rows in float64.
    `fingerprint` identifies the weights of the subject; `digest()` identifies the store. None is what a manifest does
    not say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = Field(FORMAT, ge=1, le=FORMAT)
    subject: str
    fingerprint: str
    site: Site
    d_model: int = Field(gt=0, le=MOST)
    dtype: Dtype
    context_length: int = Field(gt=0, le=MOST)
    dropped: list[str]
    corpus: str
    seed: int
    row_group_rows: int = Field(gt=0, le=MOST)
    shards: list[Shard]
    mean: list[float]
    mean_square: float = Field(allow_inf_nan=False)
    split_by: Literal["content", "subject"] | None = None
    contexts_cross_documents: bool | None = None
    text_column: str | None = None
    documents_cut: int | None = Field(None, gt=0)
    created_with: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if len(self.mean) != self.d_model or not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"mean must hold d_model = {self.d_model} finite numbers")
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("two shards have the same name")
        for shard in self.shards:
            if shard.rows * 2 * self.d_model > _COMPRESSED * shard.bytes:
                raise ValueError(f"{shard.name} cannot hold {shard.rows:,} rows in {shard.bytes:,} bytes")
        return self

    def digest(self) -> str:
        """xxh3-128 (hex) of the canonical JSON; with the shards' checksums in it, it changes with any row."""
        text = json.dumps(self.model_dump(mode="json", exclude_none=True), sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(text.encode())


def write_manifest(url: str, manifest: Manifest) -> None:
    """Seals the store: it is immutable from now on. SaescaleError when it is sealed or lacks a shard."""
    target = files.join(url, MANIFEST)
    if files.exists(target):
        raise SaescaleError(f"{target} exists and its store is immutable; write to another folder")
    for shard in manifest.shards:
        check_size(files.join(url, shard.name), shard)
    files.write_atomic(target, (manifest.model_dump_json(indent=1, exclude_none=True) + "\n").encode())


def check_size(where: str, shard: Shard, known: int | None = None) -> None:
    """Raises SaescaleError where the file is missing or has not the bytes that the manifest says. `known`: its bytes,
    where a listing told them already."""
    try:
        found = files.size(where) if known is None else known
    except FileNotFoundError as error:
        raise SaescaleError(f"{where}: the shard is missing; restore it or harvest again") from error
    if found != shard.bytes:
        fault = "truncated" if found < shard.bytes else "too long"
        raise SaescaleError(
            f"{where}: {fault}, {found} bytes where the manifest says {shard.bytes}; restore the shard or harvest again"
        )
