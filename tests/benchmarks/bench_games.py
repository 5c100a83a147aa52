"""How many random games, and mazes, a second: CPU seconds of one thread, so that a busy machine counts little, or a
GPU's own.

python -m tests.benchmarks.bench_games [--device cuda]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saescale.trainers.subjects.maze.mazes import random_mazes
from saescale.trainers.subjects.othello.board import SIZES
from saescale.trainers.subjects.othello.games import random_games
from tests.benchmarks.harness import machine, run, show_table, write_result

AT_A_TIME = (512, 2_048, 8_192, 32_768)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_games", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: tests/benchmarks/results/games.json)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if arguments.device == "cpu" else _of_gpu
    kinds: dict[str, tuple[Callable[[int, int, Tensor], object], tuple[int, ...]]] = {
        "boards": (random_games, SIZES[1:]), "mazes": (random_mazes, (5, 7)),
    }  # fmt: skip
    measured: dict[str, list[dict[str, Any]]] = {}
    rows = []
    for kind, (draw, sizes) in kinds.items():
        measured[kind] = []
        for size in sizes:
            rates = {}
            for number in AT_A_TIME:
                numbers = torch.arange(number, device=arguments.device)
                draw(size, 0, numbers[:16])
                began = clock()
                draw(size, 1, numbers)
                rates[number] = number / (clock() - began)
            measured[kind].append({"size": size, "games_per_s": rates})
            rows.append([f"{kind} {size}x{size}", *(f"{rate:,.0f}" for rate in rates.values())])
    show_table("random games and mazes a second, by how many at once", ["", *(f"{n:,}" for n in AT_A_TIME)], rows)
    written = write_result("games", {"machine": machine(), "device": arguments.device, **measured}, arguments.out)
    print(f"wrote {written}")


def _of_gpu() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    run(main)
