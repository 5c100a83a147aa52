"""Benchmark (m): one cell shared by several processes; no Ray, no store.

    python -m tests.benchmarks.bench_mesh                   on CPUs
    python -m tests.benchmarks.bench_mesh --device cuda     processes on one GPU, or one GPU each where there are two

Tokens/s of one process without a mesh and with a mesh of one (taking turns in one process, so that the ratio is that of
the code), then of two processes as two shards and as two replicas: with the share of their time that they spend in
collectives, waiting for each other included, and the bytes that each sends a step, counted where they are sent. Every
process has as many threads, half of the cores unless --threads says otherwise.

On a GPU also the largest N that trains: by halving, then between what fits and what does not. `--largest` does it on
CPUs too, within the memory that is free.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from saescale.storage.errors import one_line
from saescale.trainers.architectures.architecture import Batch, Parameter
from saescale.trainers.cell import Cell, auto_k_aux
from saescale.trainers.device import fast_precision, is_out_of_memory, set_threads, usable_cores
from saescale.trainers.kernels.choose import kernel_kind
from saescale.trainers.mesh.distributed import Processes, join
from saescale.trainers.mesh.layout import Layout
from saescale.trainers.preprocess import Centre
from saescale.trainers.training import training_cell
from saescale.trainers.training.memory import StreamSize, pack_memory
from saescale.trainers.training.together import place
from saescale.trainers.training.training_cell import TrainingCell
from tests.benchmarks.harness import BenchmarkError, alternate, console, machine, run, show_table, write_result
from tests.benchmarks.protocol import Size

SIZES = {"cpu": [Size(2048, 512, 16384, 32)], "cuda": [Size(16384, 768, 131072, 64), Size(16384, 768, 1048576, 64)]}
LARGEST = Size(8192, 768, 2**23, 64)  # N is where the search begins
NEVER = 10**9  # tokens after which a latent counts as dead
DEADLINE_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_mesh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=10, help="steps that count (default: 10)")
    parser.add_argument("--size", help="B,D,N,K of one size in place of the usual ones")
    parser.add_argument("--threads", type=int, help="CPU threads of each process")
    parser.add_argument("--largest", action="store_true", help="look for the largest N on CPUs too")
    parser.add_argument("--out", type=Path, help="JSON file (default: tests/benchmarks/results/mesh-DEVICE.json)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("torch sees no CUDA device here")
    set_threads(arguments.threads or max(1, usable_cores() // 2))
    where = machine()
    if arguments.device == "cuda":
        where |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    sizes = [Size(*map(int, arguments.size.split(",")))] if arguments.size else SIZES[arguments.device]
    result: dict[str, Any] = {"machine": where, "sizes": []}
    path = None
    for size in sizes:
        result["sizes"].append(_measure(size, arguments.device, arguments.rounds))
        path = write_result(f"mesh-{arguments.device}", result, arguments.out)
    if arguments.device == "cuda" or arguments.largest:
        result["largest"] = _largest(arguments.device)
        path = write_result(f"mesh-{arguments.device}", result, arguments.out)
    console.print(f"{where.get('gpu', where['cpu'])}; wrote {os.path.relpath(path)}" if path else "nothing to measure")


# --- one size


def _measure(size: Size, device: str, rounds: int) -> dict[str, Any]:
    entry: dict[str, Any] = {**size._asdict(), "precision": fast_precision(torch.device(device))}
    entry["one"] = _one(size, device, rounds)
    for shards, replicas in ((2, 1), (1, 2)):
        name = f"{shards} shards x {replicas} replicas"
        entry[name] = _spawned(_steps, Layout(shards, replicas), device, size, rounds)
    names = [name for name in entry if isinstance(entry[name], dict)]
    rows = []
    for name in names:
        got = entry[name]
        sent = got.get("bytes_per_step", {})
        rows.append([
            name, f"{got['ms']:.1f}", f"{got['tokens_per_s']:,.0f}",
            f"{got['communication_share']:.1%}" if "communication_share" in got else "",
            ", ".join(f"{kind} {count / 2**20:.2f}" for kind, count in sent.items()),
        ])  # fmt: skip
    rows.insert(1, ["mesh of one", f"{entry['one']['mesh_ms']:.1f}", "", f"{entry['one']['overhead']:+.2%}", ""])
    show_table(
        f"{size}, {entry['precision']}, {device}",
        ["", "ms a step", "tokens/s", "in collectives", "MiB sent a step"],
        rows,
    )
    return entry


def _one(size: Size, device: str, rounds: int) -> dict[str, Any]:
    """Steps without a mesh and with a mesh of one, in turn."""
    own, _ = place(0, Layout(), device)
    with tempfile.TemporaryDirectory() as folder:
        group = join(Layout(), 0, f"file://{folder}/meeting", "gloo", own, DEADLINE_S)
        try:
            alone, meshed = (_Turn(name, size, own, of) for name, of in (("alone", None), ("mesh", group)))
            timings = alternate([alone, meshed], max(rounds, 20), warmup=3)
        finally:
            group.leave()
    seconds = timings["alone"].median
    ratios = [1 / speed for speed in timings["mesh"].speed_over(timings["alone"])]
    return {
        "ms": seconds * 1e3,
        "mesh_ms": timings["mesh"].median * 1e3,
        "tokens_per_s": size.batch_tokens / seconds,
        "overhead": statistics.median(ratios) - 1,
    }


class _Turn:
    """A cell that takes its turn."""

    def __init__(self, name: str, size: Size, device: torch.device, group: Processes | None) -> None:
        self.name, self.device = name, device
        self.cell = _cell(size, device, group)
        self.batch = _batch(size, device, self.cell.cell.precision == "bf16")

    def step(self) -> float:
        _wait(self.device)
        began = time.perf_counter()
        self.cell.train_on(self.batch)
        _wait(self.device)
        return time.perf_counter() - began


def _steps(group: Processes, size: Size, rounds: int) -> dict[str, Any]:
    """In one process of a mesh."""
    turn = _Turn("", size, group.device, group)
    for _ in range(3):
        turn.step()
    group.traffic.clear()
    seconds = [turn.step() for _ in range(rounds)]
    traffic = group.traffic
    return {
        "ms": statistics.median(seconds) * 1e3,
        "tokens_per_s": size.batch_tokens / statistics.median(seconds),
        "communication_share": sum(traffic.seconds.values()) / sum(seconds),
        "bytes_per_step": {kind: count / rounds for kind, count in traffic.bytes.items()},
        "calls_per_step": {kind: count / rounds for kind, count in traffic.calls.items()},
        "gpu_bytes": torch.cuda.max_memory_allocated() if group.device.type == "cuda" else None,
        "predicted_bytes": pack_memory(
            [turn.cell.cell],
            size.batch_tokens,
            StreamSize(8192, 2**18),
            kernel_kind(group.device),
            layout=group.layout,
        ).total,
        "threads": torch.get_num_threads(),
        "loss": turn.cell.loss,
    }


# --- the largest N


def _largest(device: str) -> dict[str, Any]:
    """N that trains, by one process and by two shards on the same device."""
    own, _ = place(0, Layout(), device)
    high, n = LARGEST.n_latents, LARGEST.n_latents
    while not _fits(None, n, own):
        high, n = n, n // 2
    low = n
    for _ in range(3 if low < high else 0):
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(None, middle, own) else (low, middle)
    found: dict[str, Any] = {"one process": low, "d_model": LARGEST.d_model, "batch_tokens": LARGEST.batch_tokens}
    if own.type == "cuda":
        found["predicted bytes at that N"] = pack_memory(
            [_cell_of(LARGEST._replace(n_latents=low), own)], LARGEST.batch_tokens, StreamSize(8192, 2**18), "cuda"
        ).total
        _fits(None, low, own)
        found["measured bytes at that N"] = torch.cuda.max_memory_allocated()
    for share in (1.0, 7 / 8, 3 / 4, 1 / 2):
        n = round(low * share)
        if all(answer is True for answer in _spawned(_fits, Layout(2, 1), device, n, everyone=True)):
            found["2 shards"] = n
            break
    console.print(f"largest N: {found}")
    return found


def _fits(group: Processes | None, n_latents: int, device: torch.device | None = None) -> bool:
    """Whether a cell of so many latents makes three steps here."""
    where = device if group is None else group.device
    assert where is not None
    size = LARGEST._replace(n_latents=n_latents)
    _free()
    try:
        turn = _Turn("", size, where, group)
        for _ in range(3):
            turn.step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


# --- cells and processes


def _cell_of(size: Size, device: torch.device) -> Cell:
    return Cell(
        store="random", d_model=size.d_model, n_latents=size.n_latents, k=size.k, tokens=10**6 * size.batch_tokens,
        batch_tokens=size.batch_tokens, lr=1e-4, settings={"k_aux": auto_k_aux(size.d_model)},
        dead_after_tokens=NEVER, precision=fast_precision(device),
    )  # fmt: skip


def _cell(size: Size, device: torch.device, group: Processes | None) -> TrainingCell:
    """Random from the start, and drawn where it is used: from a seed it would be drawn on the CPU, for minutes."""

    def start(cell: Cell, shape: Any, settings: Any, centre: Centre, mesh: Any) -> dict[str, Parameter]:
        here = mesh.here(cell.n_latents)
        W = torch.nn.functional.normalize(torch.randn(here, size.d_model, device=device), dim=1)
        return {
            "W_enc": Parameter(W.clone()), "b_enc": Parameter(torch.zeros(here, device=device)),
            "W_dec": Parameter(W, unit_rows=True), "b_pre": Parameter(centre.b_pre.to(device), common=True),
        }  # fmt: skip

    torch.manual_seed(0 if group is None else group.shard)
    usual, training_cell._start = training_cell._start, start
    try:
        centre, cell = Centre(torch.zeros(size.d_model), 1 / size.d_model), _cell_of(size, device)
        return TrainingCell(cell, centre, device) if group is None else TrainingCell(
            cell, centre, device, group.mesh(cell.n_latents)
        )  # fmt: skip
    finally:
        training_cell._start = usual


def _batch(size: Size, device: torch.device, bf16: bool) -> Batch:
    generator = torch.Generator(device).manual_seed(1)  # the same in every process
    x = torch.randn(size.batch_tokens, size.d_model, generator=generator, device=device)
    return Batch.of(torch.nn.functional.normalize(x, dim=1), torch.zeros(size.d_model, device=device), bf16)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spawned(work: Callable[..., Any], layout: Layout, device: str, *given: Any, everyone: bool = False) -> Any:
    """What `work(group, *given)` gives in the first of the mesh's processes, or in all."""
    _free()  # of what this process had, which they may need
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="saescale-mesh-") as folder:
        said = context.SimpleQueue()
        threads = torch.get_num_threads()
        processes = [
            context.Process(target=_work, args=(work, layout, rank, device, threads, folder, given, said), daemon=True)
            for rank in range(layout.ranks)
        ]
        for process in processes:
            process.start()
        answers = dict(said.get() for _ in processes)
        for process in processes:
            process.join()
    faults = [answer for answer in answers.values() if isinstance(answer, str)]
    if faults and not everyone:
        raise BenchmarkError("; ".join(faults))
    return [answers[rank] for rank in sorted(answers)] if everyone else answers[0]


def _work(
    work: Callable[..., Any], layout: Layout, rank: int, device: str, threads: int, folder: str, given: Any, said: Any
) -> None:
    own, backend = place(rank, layout, device)
    set_threads(threads)
    group = join(layout, rank, f"file://{folder}/meeting", backend, own, DEADLINE_S)
    try:
        said.put((rank, work(group, *given)))
    except Exception as error:
        said.put((rank, f"rank {rank}: {type(error).__name__}: {one_line(error)[:300]}"))
    finally:
        group.leave()


if __name__ == "__main__":
    run(main)
