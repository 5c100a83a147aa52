"""Benchmark (m): one cell shared by several processes; no Ray.

    python -m tests.benchmarks.bench_mesh                   on CPUs
    python -m tests.benchmarks.bench_mesh --device cuda     processes on one GPU, or one GPU each where there are two

One process without a mesh, a mesh of one, two processes as two shards and as two replicas take turns, a step each, so
that ratios within a round are those of the code: with the share of their time that processes spend in collectives,
waiting for each other included, and the bytes that each sends a step, counted where they are sent. Every process has
as many threads, half of the cores unless --threads says otherwise.

On a GPU also the largest N that trains: by halving, then between what fits and what does not. `--largest` does it on
CPUs too, within the memory that is free.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
ALONE = "one process"
NEVER = 10**9  # tokens after which a latent counts as dead
DEADLINE_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_mesh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that count (default: 10)")
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
    own, _ = place(0, Layout(), device)
    entry: dict[str, Any] = {**size._asdict(), "precision": fast_precision(own)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ends:
        group = join(Layout(), 0, f"file://{folder}/meeting", "gloo", own, DEADLINE_S)
        ends.callback(group.leave)
        turns: list[_Turn | _Several] = [_Turn(ALONE, size, own, None), _Turn("a mesh of one", size, own, group)]
        turns += [ends.enter_context(_several(Layout(*of), size, device)) for of in ((2, 1), (1, 2))]
        timings = alternate(turns, rounds, warmup=3)
        for turn in turns:
            timing = timings[turn.name]
            entry[turn.name] = {
                "ms": timing.median * 1e3,
                "tokens_per_s": size.batch_tokens / timing.median,
                "over_alone": statistics.median(1 / speed for speed in timing.speed_over(timings[ALONE])),
            } | (turn.told(rounds) if isinstance(turn, _Several) else {})
    entry["load_after"] = os.getloadavg()[0]
    rows = []
    for name in (turn.name for turn in turns):
        got = entry[name]
        sent = got.get("bytes_per_step", {})
        rows.append([
            name, f"{got['ms']:.1f}", f"{got['over_alone']:.3f}",
            f"{got['communication_share']:.1%}" if "communication_share" in got else "",
            ", ".join(f"{kind} {count / 2**20:.2f}" for kind, count in sent.items()),
        ])  # fmt: skip
    show_table(
        f"{size}, {entry['precision']}, {device}",
        ["", "ms a step", "over one process", "in collectives", "MiB sent a step"],
        rows,
    )
    return entry


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


class _Several:
    """The processes of a mesh that take their turn together."""

    def __init__(self, layout: Layout, ways: list[Any]) -> None:
        self.name, self._ways = str(layout), ways
        self._steps: list[dict[str, Any]] = []  # what the first process says of each

    def step(self) -> float:
        for way in self._ways:
            way.send("step")
        answers = [way.recv() for way in self._ways]
        if faults := [answer for answer in answers if isinstance(answer, str)]:
            raise BenchmarkError("; ".join(faults))
        self._steps.append(answers[0])
        return max(answer["seconds"] for answer in answers)

    def told(self, rounds: int) -> dict[str, Any]:
        steps = self._steps[-rounds:]
        return {
            "communication_share": statistics.median(step["in_collectives"] / step["seconds"] for step in steps),
            "bytes_per_step": steps[-1]["bytes"],
            "calls_per_step": steps[-1]["calls"],
            "threads": steps[-1]["threads"],
            "gpu_bytes": steps[-1]["gpu_bytes"],
            "predicted_bytes": steps[-1]["predicted_bytes"],
        }


@contextmanager
def _several(layout: Layout, size: Size, device: str) -> Iterator[_Several]:
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="saescale-mesh-") as folder:
        pairs = [context.Pipe() for _ in range(layout.ranks)]
        processes = [
            context.Process(
                target=_serve, args=(layout, rank, device, torch.get_num_threads(), folder, size, theirs), daemon=True
            )
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in processes:
            process.start()
        try:
            yield _Several(layout, [mine for mine, _ in pairs])
        finally:
            for mine, _ in pairs:
                mine.send("end")
            for process in processes:
                process.join()


def _serve(layout: Layout, rank: int, device: str, threads: int, folder: str, size: Size, way: Any) -> None:
    own, backend = place(rank, layout, device)
    set_threads(threads)
    group = join(layout, rank, f"file://{folder}/meeting", backend, own, DEADLINE_S)
    turn, traffic = _Turn("", size, own, group), group.traffic
    while way.recv() != "end":
        traffic.clear()
        try:
            seconds = turn.step()
        except Exception as error:
            way.send(f"rank {rank}: {type(error).__name__}: {one_line(error)[:300]}")
            continue
        way.send({
            "seconds": seconds, "in_collectives": sum(traffic.seconds.values()), "bytes": dict(traffic.bytes),
            "calls": dict(traffic.calls), "threads": torch.get_num_threads(),
            "gpu_bytes": torch.cuda.max_memory_allocated() if own.type == "cuda" else None,
            "predicted_bytes": pack_memory(
                [turn.cell.cell], size.batch_tokens, StreamSize(8192, 2**18), kernel_kind(own), layout=layout
            ).total,
        })  # fmt: skip
    group.leave()


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
