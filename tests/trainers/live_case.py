"""A small live source, and cells over it."""

from typing import Any

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
