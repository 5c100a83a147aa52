"""The manifest: what seals a store stays as it is, and says what it seals."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Manifest, Shard, write_manifest
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


def test_a_manifest_of_the_first_format_keeps_the_fingerprint_that_it_had() -> None:
    first = {
        "format": 1, "subject": "gpt2", "fingerprint": "ab12", "d_model": 2, "dtype": "float16", "context_length": 64,
        "site": {"layer": 3, "hook": "resid_post", "positions": "all but BOS"}, "dropped": ["bos"], "seed": 0,
        "corpus": "python-prose", "row_group_rows": 8, "mean": [0.5, -0.25], "mean_square": 1.5,
        "shards": [
            {"name": "train-00000.parquet", "split": "train", "rows": 4, "bytes": 100, "xxh3": "0123456789abcdef"}
        ],
        "created_with": {"numpy": "2.0.0"},
    }  # fmt: skip
    manifest = Manifest.model_validate(first)
    assert manifest.digest() == "42441970697364653fdaf5a600190a2b"  # as saescale 0.1.0 says
    assert (manifest.split_by, manifest.contexts_cross_documents) == (None, None)
    said = manifest.model_copy(update={"split_by": "content", "contexts_cross_documents": True})
    assert said.digest() != manifest.digest()
