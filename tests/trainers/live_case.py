"""A small live source, the store that a harvest of the same fields writes, and who watches the disk."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.harvest.live_spec import LiveSpec
from saescale.trainers.training.train import PackJob

BLOCK, WINDOW, TOKENS = 2_048, 2, 16_384  # 8 blocks in 4 windows


def live_spec(subject: str, corpus: str, **fields: Any) -> LiveSpec:
    given = {
        "subject": subject, "corpus": corpus, "layer": 2, "tokens": TOKENS, "heldout_tokens": 1_024,
        "context_length": 32, "block_rows": BLOCK, "row_group_rows": 512, "window_blocks": WINDOW,
        "compute_dtype": "float32", "max_bytes": 10**9,
    }  # fmt: skip
    return LiveSpec.model_validate(given | fields)


def cell_of(source: Any, **fields: Any) -> Cell:
    given = {
        "store": source.identity, "d_model": source.d_model, "n_latents": 64, "k": 4, "tokens": TOKENS,
        "batch_tokens": 512, "lr": 3e-3, "dead_after_tokens": 4_096, "ema": 0.9,
    }  # fmt: skip
    return Cell.model_validate(given | fields)


def job_of(source: Any, run: str, cells: list[Cell], **fields: Any) -> PackJob:
    given = {"eval": EvalSpec(tokens=1_024, every_tokens=4_096)} | fields
    return PackJob(cells=cells, store=source.url, run=run, sweep="live", threads=1, **given)


class Watch:
    """The most bytes, and the most blocks, that ever lay below a folder when something was about to get its name:
    then what is written and what it replaces are both there."""

    def __init__(self, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.bytes, self.blocks, self.writes = folder, 0, 0, 0
        replace: Callable[..., None] = os.replace

        def watched(*arguments: Any, **more: Any) -> None:
            self.look()
            replace(*arguments, **more)

        monkeypatch.setattr(os, "replace", watched)

    def look(self) -> None:
        total = blocks = 0
        for path in Path(self.folder).rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                continue
            blocks += "train-" in path.name
        self.bytes, self.blocks, self.writes = max(self.bytes, total), max(self.blocks, blocks), self.writes + 1
