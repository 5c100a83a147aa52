"""Benchmark (a): one training step of a TopK SAE on the CPU, saescale beside three other libraries.

    python -m tests.benchmarks.bench_step            all cores, three sizes; minutes on an idle machine

Contenders are saescale with a bf16 and an fp32 encoder product (ours.py), sparsify, SAELens and dictionary_learning in
their own environment and by their own training loops (peers.py says what each step holds), and as floors the encoder
product alone. All take turns in one run, on the same random inputs of unit norm, each with all threads to itself.

The default has each peer's fastest setting in float32 on the CPU. `--contenders all` adds sparsify's and SAELens'
defaults and SAELens in bfloat16, which may be faster on a CPU with AMX. Where the CPU has no hardware for bfloat16, the
contenders in it are left out, in words.

The peers' libraries are installed into .venv-peers on the first run; --peers-venv or SAESCALE_PEERS_VENV names an
environment that has them already.
"""

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.benchmarks.environment import peers_python
from tests.benchmarks.harness import (
    Contender,
    Timing,
    alternate,
    console,
    machine,
    quartiles,
    run,
    show_table,
    size_argument,
    slow_bf16,
    write_result,
)
from tests.benchmarks.protocol import Size

SIZES = [Size(2048, 768, 16384, 32), Size(4096, 576, 4096, 32), Size(8192, 512, 32768, 64)]
PEERS = ["sparsify-adam", "saelens-sparse", "dictionary_learning"]
OTHER_SETTINGS = ["sparsify-signum", "saelens-dense", "saelens-autocast"]
OURS = ["saescale-bf16", "saescale-fp32"]
FLOORS = ["gemm-bf16", "gemm-fp32"]
IN_BF16 = ["saescale-bf16", "saelens-autocast", "gemm-bf16"]  # their products
EVERY = [*OURS, *PEERS, *OTHER_SETTINGS, *FLOORS]
DEFAULT = [*OURS, *PEERS, *FLOORS]
IDLE_SHARE = 0.01  # CPU time that a contender may take while others work; more is worth a warning


def main() -> None:
    arguments = _arguments()
    where = machine()
    reason = slow_bf16()
    left_out = {name: reason for name in arguments.contenders if name in IN_BF16 and reason}
    for name in left_out:
        console.print(f"{name} is left out: {reason}")
    arguments.contenders = [name for name in arguments.contenders if name not in left_out]
    others = {*PEERS, *OTHER_SETTINGS} & {*arguments.contenders}
    python = peers_python(arguments.peers_venv) if others else Path(sys.executable)
    results = [_measure(size, arguments, python) for size in arguments.sizes]
    settings = {"rounds": arguments.rounds, "warmup": arguments.warmup, "threads": arguments.threads}
    path = write_result("step", {"machine": where, **settings, "left_out": left_out, "sizes": results}, arguments.out)
    console.print(f"wrote {os.path.relpath(path)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sizes", nargs="+", type=size_argument, default=SIZES, metavar="B,D,N,K",
        help=f"batch tokens, d_model, latents, k; default: {' '.join(','.join(map(str, size)) for size in SIZES)}",
    )  # fmt: skip
    parser.add_argument(
        "--contenders", nargs="+", choices=[*EVERY, "all"], default=DEFAULT, metavar="NAME",
        help=f"of {', '.join(EVERY)}; or all. Default: {' '.join(DEFAULT)}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="steps of each contender that count (default: 7)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each before those (default: 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for each contender (default: all cores)")
    parser.add_argument("--peers-venv", type=Path, help="an environment that has the peers' libraries")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: tests/benchmarks/results/step.json)")
    arguments = parser.parse_args()
    arguments.contenders = EVERY if "all" in arguments.contenders else list(dict.fromkeys(arguments.contenders))
    if arguments.rounds < 1 or arguments.warmup < 1 or arguments.threads < 1:
        # Without a warm-up kernels are compiled, and optimisers' memory is taken, within what counts.
        parser.error("--rounds, --warmup and --threads have to be at least 1")
    return arguments


def _measure(size: Size, arguments: argparse.Namespace, python: Path) -> dict[str, Any]:
    """All contenders at one size: the table, and what goes into the JSON."""
    with ExitStack() as stack:
        contenders = [
            stack.enter_context(_start(name, size, arguments.threads, python)) for name in arguments.contenders
        ]
        timings = alternate(contenders, arguments.rounds, arguments.warmup)
        losses = {contender.name: contender.loss() for contender in contenders}
    for contender in contenders:
        _check_idle(contender, timings, arguments.warmup)

    peers = [name for name in timings if name in (*PEERS, *OTHER_SETTINGS)]
    fastest = min(peers, key=lambda name: timings[name].median, default=None)
    rows, entries = [], []
    for contender in contenders:
        timing = timings[contender.name]
        low, median, high = (seconds * 1e3 for seconds in timing.quartiles)
        over_peer, over_gemm = (
            timing.speed_over(timings[other]) if other in timings else None for other in (fastest, "gemm-bf16")
        )
        rows.append([
            contender.name,
            f"{median:,.1f}",
            f"{low:,.1f}-{high:,.1f}",
            f"{quartiles(over_peer)[1]:.2f}x" if over_peer else "-",
            f"{quartiles(over_gemm)[1]:.1%}" if over_gemm else "-",
        ])  # fmt: skip
        entries.append({
            "name": contender.name,
            **contender.about,
            "median_ms": median,
            "seconds": timing.seconds,
            "speed_over_fastest_peer": over_peer,
            "speed_over_gemm_bf16": over_gemm,
            "idle_cpu": contender.idle_cpu[arguments.warmup :],
            "loss": losses[contender.name],
        })  # fmt: skip
    columns = ["training step", "median ms", "quartiles", "over fastest peer", "of bf16 GEMM"]
    caption = (
        f"fastest peer: {fastest or 'none'}; {arguments.rounds} rounds, {arguments.threads} threads; ratios of speed"
    )
    show_table(str(size), columns, rows, caption)
    return {**size._asdict(), "fastest_peer": fastest, "contenders": entries}


def _start(name: str, size: Size, threads: int, peers: Path) -> Contender:
    ours = name in (*OURS, *FLOORS)
    module = "tests.benchmarks.ours" if ours else "tests.benchmarks.peers"
    return Contender(name, module, size, threads, Path(sys.executable) if ours else peers)


def _check_idle(contender: Contender, timings: dict[str, Timing], warmup: int) -> None:
    idle = sum(contender.idle_cpu[warmup:])
    if idle > IDLE_SHARE * sum(sum(timing.seconds) for timing in timings.values()):
        console.print(f"[yellow]{contender.name} took {idle:.2f} s of CPU time while others worked[/yellow]")


if __name__ == "__main__":
    run(main)
