"""The manifest: what seals a store stays as it is, and says what it seals."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Shard, write_manifest
from saescale.storage.rows import write_shard
from saescale.storage.store import ActivationStore

from tests.storage.small_rows import rows_of, varied

BuildStore = Callable[..., ActivationStore]


def test_a_sealed_store_is_immutable(build_store: BuildStore, any_url: str) -> None:
    store = build_store(any_url)
    act = varied(3, 4)
    with pytest.raises(SaescaleError, match="immutable"):
        write_shard(any_url, "more.parquet", "train", rows_of(act), "float16", 8)
    with pytest.raises(SaescaleError, match="immutable"):
        write_manifest(any_url, store.manifest)
    assert "more.parquet" not in files.list_names(any_url)


def test_a_manifest_is_not_written_over_missing_shards(build_store: BuildStore, tmp_path: Path) -> None:
    store = build_store(str(tmp_path / "a"))
    with pytest.raises(SaescaleError, match="the shard is missing"):
        write_manifest(str(tmp_path / "b"), store.manifest)
    assert not (tmp_path / "b").exists()


def test_the_fingerprint_follows_every_shard(build_store: BuildStore) -> None:
    manifest = build_store(f"memory://{uuid.uuid4().hex}").manifest
    other = manifest.shards[0].model_copy(update={"xxh3": "0" * 16})
    assert manifest.model_copy(update={"shards": [other, *manifest.shards[1:]]}).digest() != manifest.digest()
    assert manifest.model_copy().digest() == manifest.digest()


def test_a_shard_name_stays_inside_the_store() -> None:
    with pytest.raises(ValueError, match="name"):
        Shard(name="../x", split="train", rows=1, bytes=1, xxh3="")
