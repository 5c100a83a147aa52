"""One training step of every other architecture on the CPU, saescale beside the libraries that have it too.

    python -m tests.benchmarks.bench_architectures       all cores; minutes for each architecture

Of an architecture its sparse path with a bf16 and an fp32 encoder product, its dense reference, and SAELens and
dictionary_learning by their own classes and training loops with their defaults (ours.py and peers.py say what a step
holds) take turns in one run, as in bench_step.py. Where latents are active by a penalty L0 is k, as it is once the
penalty has taken hold; before that saescale's step is the dense one. `--architectures` measures some of them anew and
leaves what the file has of the others.
"""

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from saescale.trainers.cell import traits_of
from tests.benchmarks.environment import peers_python
from tests.benchmarks.harness import (
    RESULTS,
    Contender,
    alternate,
    console,
    machine,
    quartiles,
    run,
    show_table,
    slow_bf16,
    write_result,
)
from tests.benchmarks.ours import ARCHITECTURES
from tests.benchmarks.protocol import Size

SIZE = Size(2048, 576, 8192, 32)
# What each library's peers.py has; the same names of both.
PEERS = dict.fromkeys(("saelens", "dictionary_learning"), ("batchtopk", "matryoshka", "jumprelu", "relu", "gated"))


def main() -> None:
    arguments = _arguments()
    python = peers_python(arguments.peers_venv)
    path = arguments.out or RESULTS / "architectures.json"
    measured = json.loads(path.read_text())["architectures"] if path.exists() else {}
    reason = slow_bf16()
    for name in arguments.architectures:
        where = machine()
        contenders = _measure(name, arguments, python, reason)
        measured[name] = {
            "machine": where, **SIZE._asdict(), "rounds": arguments.rounds, "threads": arguments.threads,
            "contenders": contenders,
        }  # fmt: skip
        ordered = {name: measured[name] for name in ARCHITECTURES if name in measured}
        write_result("architectures", {"architectures": ordered}, path)
    console.print(f"wrote {os.path.relpath(path)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_architectures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each contender that count (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, help="steps of each before those (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for each contender (default: all cores)")
    parser.add_argument("--peers-venv", type=Path, help="an environment that has the peers' libraries")
    parser.add_argument("--out", type=Path, help="JSON file (default: tests/benchmarks/results/architectures.json)")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.warmup < 1 or arguments.threads < 1:
        parser.error("--rounds, --warmup and --threads have to be at least 1")
    return arguments


def _measure(name: str, arguments: argparse.Namespace, python: Path, slow: str | None) -> list[dict[str, Any]]:
    """All contenders of an architecture: the table, and what goes into the JSON."""
    ours = [f"{name}-dense"]
    if traits_of(name).bf16:
        ours = [*([] if slow else [f"{name}-bf16"]), f"{name}-fp32", *ours]
    theirs = [f"{library}-{name}" for library, known in PEERS.items() if name in known]
    with ExitStack() as stack:

        def start(contender: str, module: str, interpreter: Path) -> Contender:
            return stack.enter_context(Contender(contender, module, SIZE, arguments.threads, interpreter))

        contenders = [start(one, "tests.benchmarks.ours", Path(sys.executable)) for one in ours]
        contenders += [start(one, "tests.benchmarks.peers", python) for one in theirs]
        timings = alternate(contenders, arguments.rounds, arguments.warmup)
        losses = {contender.name: contender.loss() for contender in contenders}
    fastest = min(theirs, key=lambda one: timings[one].median, default=None)
    entries, rows = [], []
    for contender in contenders:
        timing = timings[contender.name]
        over = timing.speed_over(timings[fastest]) if fastest else None
        rows.append([
            contender.name, f"{timing.median * 1e3:,.1f}", f"{quartiles(over)[1]:.2f}x" if over else "-"
        ])  # fmt: skip
        entries.append({
            "name": contender.name, **contender.about, "median_ms": timing.median * 1e3, "seconds": timing.seconds,
            "speed_over_fastest_peer": over, "loss": losses[contender.name],
        })  # fmt: skip
    caption = f"fastest peer: {fastest or 'none has it'}; {arguments.rounds} rounds, {arguments.threads} threads"
    show_table(f"{name}, {SIZE}", ["training step", "median ms", "over fastest peer"], rows, caption)
    return entries


if __name__ == "__main__":
    run(main)
