"""What lies at a URL, in a few lines: an activation store, a run directory, or a trained SAE."""

from collections.abc import Mapping
from typing import Any

from saescale.storage.errors import SaescaleError
from saescale.storage.files import exists, join, list_names
from saescale.storage.live import LIVE
from saescale.storage.recorded import recorded_sources
from saescale.storage.rundir import RunDirectory, has_weights
from saescale.storage.sharded import INDEX, SUFFIX
from saescale.storage.store import ActivationStore


def describe(url: str, verify: bool = False) -> dict[str, str]:
    """Names and values to show. Raises SaescaleError where nothing of saescale's lies at `url`, or it is damaged."""
    if exists(join(url, "manifest.json")):
        return _store(url, verify)
    if exists(join(url, "sweep.yaml")):
        return _run(RunDirectory(url))
    if url.endswith((SUFFIX, INDEX)) or has_weights(set(list_names(url))):
        return _sae(url)
    raise SaescaleError(_nothing(url))


def _nothing(url: str) -> str:
    """Why there is nothing to describe."""
    from saescale.trainers.harvest.spec import PLAN  # takes torch

    if exists(join(url, LIVE)):
        return f"{url} holds blocks of a live source, which come and go with the sweep that streams from it"
    if exists(join(url, PLAN)):
        return f"{url} is a harvest that is not finished; run the same harvest again, which goes on"
    return (
        f"{url}: no activation store (manifest.json), run directory (sweep.yaml), cell (sae.safetensors) or SAE's file"
    )


def _store(url: str, verify: bool) -> dict[str, str]:
    store = ActivationStore.open(url)
    store.verify(full=verify)
    manifest = store.manifest
    cut = f", documents cut at {manifest.documents_cut:,} characters" if manifest.documents_cut else ""
    column = f", column {manifest.text_column}" if manifest.text_column else ""
    across = " that run over document boundaries" if manifest.contexts_cross_documents else ""
    text = f"{manifest.corpus}{column}{cut}, contexts of {manifest.context_length} tokens{across}"
    size, dropped = sum(shard.bytes for shard in manifest.shards) / 2**20, ", ".join(manifest.dropped) or "nothing"
    return {
        "store": f"{url} ({store.fingerprint})",
        "subject": f"{manifest.subject} ({manifest.fingerprint})",
        "site": f"{manifest.site.hook} of layer {manifest.site.layer}, {manifest.site.positions}",
        "rows": f"{store.rows('train'):,} train, {store.rows('heldout'):,} held out, d_model {manifest.d_model}",
        "stored as": f"{manifest.dtype}, {size:,.1f} MiB in {len(manifest.shards)} shards",
        "split": {
            "content": "by text: equal texts, and all of a document, lie in one split",
            "subject": "by the subject",
        }.get(manifest.split_by or "", "not said"),
        "text": f"{text}, dropped: {dropped}",
        "mean square": f"{manifest.mean_square:.5g}, the mean squared norm of a row",
        "checked": "checksums, shapes and values" if verify else "sizes and shapes (--verify reads every byte)",
    }


def _run(run: RunDirectory) -> dict[str, str]:
    spec = run.read_spec() or {}
    grid = spec["grid"] if isinstance(spec.get("grid"), dict) else {}
    rows = run.read_results().to_pylist()
    statuses = [row["status"] for row in rows]
    fits = run.read_fits()
    return {
        "run": f"{run.url}: {spec.get('name')}",
        "store": ", ".join(source.words() for source in recorded_sources(spec)),
        "grid": ", ".join(f"{name} {values}" for name, values in grid.items()),
        "cells": ", ".join(f"{statuses.count(s)} {s}" for s in sorted(set(statuses))),
        "laws": _laws(fits),
    }


def _laws(fits: Mapping[str, Any] | None) -> str:
    """Each that was fitted, to however many kinds of cells."""
    if not fits:
        return "not fitted yet"
    return ", ".join(dict.fromkeys(entry["law"] for entry in fits["fits"])) or "none could be fitted"


def _sae(url: str) -> dict[str, str]:
    from saescale.trainers.exchange import native

    sae, cell = native.read(url)
    cells, _, cell_id = url.rstrip("/").rpartition("/")
    if cells.endswith("/cells"):
        RunDirectory(cells.removesuffix("/cells")).check_cell(cell_id)
    settings = "".join(f", {name} {value}" for name, value in cell.settings.items())
    return {
        "cell": cell.cell_id,
        "sae": f"{cell.architecture}, n_latents {cell.n_latents}, k {cell.k}, d_model {cell.d_model}{settings}, "
        "unit-norm preprocessing",
        "trained": f"{cell.tokens:,} tokens in batches of {cell.batch_tokens:,}, lr {cell.lr:.3g}, seed {cell.seed}",
    } | {name: _described(tensor) for name, tensor in sae.params.items()}


def _described(tensor: Any) -> str:
    shape = " x ".join(str(size) for size in tensor.shape)
    if tensor.ndim < 2:
        return f"[{shape}], norm {tensor.norm():.4g}"
    norms = tensor.norm(dim=-1)
    return f"[{shape}], norms of rows {norms.min():.3g} to {norms.max():.3g}, median {norms.median():.3g}"
