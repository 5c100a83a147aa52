"""Benchmark (c): how fast storage/stream.py hands out batches, beside the fastest reading of the same bytes.

    python -m tests.benchmarks.bench_stream          writes about 1 GB to a temporary folder

One activation store of random float16 rows is written to a temporary folder, and the same rows to one raw file. What
takes turns: the stream with each batch size, over one epoch, with a consumer that does nothing with the batches;
np.fromfile of the raw file; and np.copyto of the rows in memory, into memory that is there already. The stream permutes
and mixes rows besides reading them, so that a memcpy is a bound, not a goal. Every pass begins with a new Stream: its
start-up counts.

Files lie in the page cache, being just written. The values of a row group (NaN, Inf, zero norm) are checked when a
process first reads it: the first pass is reported on its own.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saescale.storage.store import ActivationStore
from saescale.storage.stream import Stream
from tests.benchmarks.harness import alternate, console, machine, quartiles, run, show_table, write_result
from tests.trainers.synthetic import write_store

HELDOUT = 1024  # rows, which are not read


class Pass(NamedTuple):
    """One reading of all rows."""

    name: str
    read: Callable[[], object]

    def step(self) -> float:
        began = time.perf_counter()
        self.read()
        return time.perf_counter() - began


def main() -> None:
    arguments = _arguments()
    where = machine()
    with tempfile.TemporaryDirectory(prefix="saescale-", dir=arguments.folder) as folder:
        act = _random_rows(arguments.rows, arguments.d_model)
        url = write_store(str(Path(folder, "store")), act, act[:HELDOUT], arguments.row_group_rows)
        raw = Path(folder, "rows.raw")
        act.tofile(raw)
        passes = _passes(ActivationStore.open(url), raw, act, arguments.batch_tokens)
        gigabytes = act.nbytes / 1e9
        checked = gigabytes / passes[0].step()
        timings = alternate(passes, arguments.rounds, warmup=1)

    rows, readings = [], []
    for name, timing in timings.items():
        low, median, high = quartiles([gigabytes / seconds for seconds in timing.seconds])
        over_raw, over_copy = (quartiles(timing.speed_over(timings[other]))[1] for other in ("np.fromfile", "memcpy"))
        rows.append([name, f"{median:.2f}", f"{low:.2f}-{high:.2f}", f"{over_raw:.0%}", f"{over_copy:.0%}"])
        readings.append({
            "name": name,
            "seconds": timing.seconds,
            "gb_per_s": [low, median, high],
            "speed_over_fromfile": over_raw,
            "speed_over_memcpy": over_copy,
        })  # fmt: skip
    show_table(
        f"{arguments.rows:,} rows of {arguments.d_model} float16, {gigabytes:.2f} GB",
        ["reading", "GB/s", "quartiles", "of fromfile", "of memcpy"],
        rows,
        f"{arguments.rounds} rounds; ratios: medians over rounds; first pass, with its checks: {checked:.2f} GB/s",
    )
    settings = {name: getattr(arguments, name) for name in ("rows", "d_model", "row_group_rows", "rounds")}
    result = {"machine": where, **settings, "first_pass_gb_per_s": checked, "readings": readings}
    console.print(f"wrote {os.path.relpath(write_result('stream', result, arguments.out))}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_stream",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=262_144, help="of the store (default: 262144)")
    parser.add_argument("--d-model", type=int, default=768, help="width of a row (default: 768)")
    parser.add_argument(
        "--batch-tokens", nargs="+", type=int, default=[1024, 2048, 4096, 8192], metavar="ROWS",
        help="batch sizes (default: 1024 2048 4096 8192)",
    )  # fmt: skip
    parser.add_argument("--row-group-rows", type=int, default=8192, help="of the store (default: 8192)")
    parser.add_argument("--rounds", type=int, default=7, help="passes of each that count (default: 7)")
    parser.add_argument("--folder", type=Path, help="where the files go for the time being (default: the system's)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: tests/benchmarks/results/stream.json)")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.d_model, arguments.row_group_rows, *arguments.batch_tokens) < 1:
        parser.error("numbers have to be at least 1")
    if arguments.rows < HELDOUT or any(arguments.rows % size for size in arguments.batch_tokens):
        parser.error(f"--rows has to be a multiple of every batch size, and at least {HELDOUT}")
    return arguments


def _random_rows(rows: int, d_model: int) -> np.ndarray:
    """Float16 [rows, d_model]: drawn in blocks, so that the float32 draws need little memory."""
    rng = np.random.default_rng(0)
    act = np.empty((rows, d_model), np.float16)
    for block in np.array_split(act, max(1, rows // 8192)):
        block[:] = rng.standard_normal(block.shape, np.float32)
    return act


def _passes(store: ActivationStore, raw: Path, act: np.ndarray, batch_sizes: list[int]) -> list[Pass]:
    target = np.zeros_like(act)  # written to once: the copy does not wait for the system to find memory

    def stream(batch_tokens: int) -> None:
        with Stream(store, batch_tokens=batch_tokens, seed=0, batches=len(act) // batch_tokens) as batches:
            for _ in batches:
                pass

    return [
        *(Pass(f"Stream, batches of {size}", partial(stream, size)) for size in batch_sizes),
        Pass("np.fromfile", partial(np.fromfile, raw, np.float16)),
        Pass("memcpy", partial(np.copyto, target, act)),
    ]


if __name__ == "__main__":
    run(main)
