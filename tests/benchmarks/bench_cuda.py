"""Benchmark (e): training steps on a GPU, as tokens/s and as a share of what the device's matrix units reach.

    python -m tests.benchmarks.bench_cuda            needs a CUDA device; no Ray, no store

Steps: saescale's Triton kernels (bf16 and fp32), plain torch in their place, other libraries by their own training
loops with bfloat16 products (peers.py), and as the floor the bf16 encoder product alone, taking turns. A peer that
cannot run at a size is left out, in words. The peers' libraries are installed into .venv-peers on the first run;
without a network --without-peers measures the rest.

Grid: 28 cells, N in {2^11, 2^13, 2^15, 2^17} with 7 values of k, each batch through all of them as a pack does it, with
the peak memory beside the planner's prediction. FLOP utilisation counts the sparse training FLOPs (scaling/compute.py)
against the rate of a large square bf16 product measured in the same run.
"""

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saescale.scaling.compute import topk_flops
from saescale.trainers.architectures.architecture import Batch
from saescale.trainers.cell import Cell, auto_k_aux
from saescale.trainers.kernels import choose
from saescale.trainers.kernels import eager as sparse_eager
from saescale.trainers.kernels.interface import Kernels
from saescale.trainers.precision import Precision
from saescale.trainers.preprocess import Centre, measure_centre
from saescale.trainers.training.memory import StreamSize, pack_memory
from saescale.trainers.training.pack import Pack, RawBatch
from tests.benchmarks.environment import peers_python
from tests.benchmarks.harness import (
    BenchmarkError,
    Contender,
    alternate,
    console,
    machine,
    run,
    show_table,
    size_argument,
    write_result,
)
from tests.benchmarks.ours import training_cell
from tests.benchmarks.protocol import Size, unit_rows

CHOSEN = choose.kernels  # before anything else is put in its place
SIZES = [Size(8192, 768, 32768, 32), Size(32768, 768, 32768, 32), Size(32768, 768, 131072, 64)]
PEERS = ["sparsify-adam", "saelens-autocast", "dictionary_learning-autocast"]
GRID = [(n, k) for n in (2**11, 2**13, 2**15, 2**17) for k in (8, 16, 32, 64, 128, 256, 512)]
NEVER = 10**9  # tokens after which a latent counts as dead: none does


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sizes", nargs="+", type=size_argument, default=SIZES, metavar="B,D,N,K",
        help=f"batch tokens, d_model, latents, k; default: {' '.join(','.join(map(str, size)) for size in SIZES)}",
    )  # fmt: skip
    parser.add_argument("--without-grid", action="store_true", help="only the steps")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each that count (default: 15)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: tests/benchmarks/results/cuda.json)")
    parser.add_argument("--without-peers", action="store_true", help="only saescale and the floor")
    parser.add_argument("--peers-venv", type=Path, help="an environment that has the peers' libraries")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise BenchmarkError("torch sees no CUDA device here; this benchmark measures one")
    device = torch.device("cuda")
    where = machine() | {"gpu": torch.cuda.get_device_name(device), "kernels": choose.kernel_kind(device)}
    python = None if arguments.without_peers else peers_python(arguments.peers_venv)
    peak = _peak_rate(device, arguments.rounds)
    result = {
        "machine": where,
        "square_bf16_product_flops": peak,
        "grid": None if arguments.without_grid else _grid(device, peak, arguments.rounds),
        "sizes": [],
    }
    for size in arguments.sizes:
        result["sizes"].append(_measure(size, device, peak, arguments.rounds, python))
        torch.cuda.empty_cache()
        # Each size as it comes: whoever has a GPU for minutes keeps what was measured.
        path = write_result("cuda", result, arguments.out)
    console.print(f"{where['gpu']}; wrote {os.path.relpath(path)}")


class _Turn(NamedTuple):
    """Something to do on the device, timed by its own clock."""

    name: str
    work: Callable[[], object]

    def step(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        self.work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _peak_rate(device: torch.device, rounds: int) -> float:
    """FLOP/s of a bf16 product of two matrices [8192, 8192]."""
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    timing = alternate([_Turn("square", lambda: square @ square)], rounds, warmup=3)["square"]
    return float(2 * 8192**3 / timing.median)


def _train(size: Size, device: torch.device, precision: Precision, kernels: Kernels) -> Callable[[], object]:
    x = unit_rows(size)[0]
    centre = measure_centre(x)
    cell = training_cell(size, centre, precision, auto_k_aux(size.d_model), str(device))
    rows, origin = x.to(device), centre.b_pre.to(device)

    def train() -> None:
        choose.kernels = lambda device: kernels
        cell.train_on(Batch.of(rows, origin, precision == "bf16"))

    return train


def _peers(size: Size, python: Path | None, stack: ExitStack) -> tuple[list[Contender], dict[str, str]]:
    """Those that can make a step of that size beside each other, and why the others cannot."""
    able, left_out = [], {}
    for name in PEERS if python else ():
        assert python is not None
        try:
            peer = Contender(name, "tests.benchmarks.peers", size, os.cpu_count() or 1, python, "cuda")
            stack.callback(peer.close)
            peer.step()
        except BenchmarkError as error:
            lines = str(error).strip().splitlines()
            left_out[name] = next((line for line in reversed(lines) if "Error" in line), lines[-1])
            console.print(f"{name} is left out: {left_out[name]}")
        else:
            able.append(peer)
    return able, left_out


def _that_fit(turns: list[_Turn]) -> tuple[list[_Turn], dict[str, str]]:
    """Those that can make a step beside each other, and why the others cannot: dense training may need more memory."""
    able, left_out = [], {}
    for turn in turns:
        try:
            turn.step()
        except torch.OutOfMemoryError as error:
            left_out[turn.name] = str(error).split(". ")[0]
            torch.cuda.empty_cache()
        else:
            able.append(turn)
    return able, left_out


def _measure(size: Size, device: torch.device, peak: float, rounds: int, python: Path | None) -> dict[str, Any]:
    ours = choose.kernels(device)
    x = torch.randn(size.batch_tokens, size.d_model, device=device, dtype=torch.bfloat16)
    W = torch.randn(size.n_latents, size.d_model, device=device, dtype=torch.bfloat16)
    pre = x.new_empty(size.batch_tokens, size.n_latents)
    turns = [
        _Turn("saescale bf16", _train(size, device, "bf16", ours)),
        _Turn("saescale fp32", _train(size, device, "fp32", ours)),
        _Turn("plain torch bf16", _train(size, device, "bf16", sparse_eager)),
        _Turn("bf16 encoder product", partial(torch.mm, x, W.T, out=pre)),
    ]
    with ExitStack() as stack:
        turns, too_large = _that_fit(turns)
        peers, left_out = _peers(size, python, stack)
        left_out |= too_large
        timings = alternate([*turns, *peers], rounds, warmup=5)
    batch = size.batch_tokens
    flops = topk_flops(size.d_model, size.n_latents, tokens=batch, selected=size.k * batch).sparse
    floor = timings["bf16 encoder product"].median
    fastest = min((timings[peer.name].median for peer in peers), default=None)
    rows, entries = [], []
    for turn in (*turns, *peers):
        seconds = timings[turn.name].median
        used = None if turn is turns[-1] else flops / seconds / peak
        rows.append([
            turn.name,
            f"{seconds * 1e3:.2f}",
            f"{size.batch_tokens / seconds / 1e6:.2f}",
            f"{fastest / seconds:.2f}x" if fastest else "-",
            f"{floor / seconds:.0%}",
            "-" if used is None else f"{used:.0%}",
        ])  # fmt: skip
        entries.append({"name": turn.name, "seconds": timings[turn.name].seconds, "utilisation": used})
    columns = ["training step", "median ms", "M tokens/s", "over fastest peer", "of bf16 GEMM", "FLOP utilisation"]
    why = "; ".join(f"{name} is left out: {reason}" for name, reason in left_out.items())
    show_table(str(size), columns, rows, why or None)
    return {**size._asdict(), "left_out": left_out, "contenders": entries}


def _grid(device: torch.device, peak: float, rounds: int) -> dict[str, Any]:
    size = Size(8192, 768, 2**17, 512)
    cells = [
        Cell(
            store="random", d_model=size.d_model, n_latents=n, k=k, tokens=size.batch_tokens,
            batch_tokens=size.batch_tokens, lr=2e-4 * (2**14 / n) ** 0.5, settings={"k_aux": auto_k_aux(size.d_model)},
            dead_after_tokens=NEVER, precision="bf16",
        ).model_copy(update={"tokens": 10**6 * size.batch_tokens})
        for n, k in GRID
    ]  # fmt: skip
    choose.kernels = CHOSEN
    torch.cuda.reset_peak_memory_stats(device)
    x = unit_rows(size)[0]
    sample = measure_centre(x)
    pack = Pack(cells, Centre(sample.b_pre, sample.variance), device)
    raw = x.half().to(device)
    timing = alternate([_Turn("grid", lambda: pack.training_step(RawBatch(raw), 0))], rounds, warmup=3)["grid"]
    flops = sum(float(cell.flops(size.batch_tokens).sparse) for cell in cells)
    measured = torch.cuda.max_memory_allocated(device)
    predicted = pack_memory(cells, 2**15, StreamSize(8192, 2**27), "cuda").total
    rate = size.batch_tokens / timing.median
    show_table(
        f"{len(cells)} cells from one pass, batches of {size.batch_tokens:,}",
        ["tokens/s", "trained tokens/s", "FLOP utilisation", "peak GiB", "predicted GiB"],
        [[f"{rate:,.0f}", f"{rate * len(cells):,.0f}", f"{flops / timing.median / peak:.0%}",
          f"{measured / 2**30:.1f}", f"{predicted / 2**30:.1f}"]],
    )  # fmt: skip
    return {"cells": len(cells), "seconds": timing.seconds, "tokens_per_s": rate, "flops_per_s": flops / timing.median,
            "peak_bytes": measured, "predicted_bytes": predicted}  # fmt: skip


if __name__ == "__main__":
    run(main)
