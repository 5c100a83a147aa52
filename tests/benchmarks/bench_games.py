"""How many random games a second: CPU seconds of one thread, so that a busy machine counts little, or a GPU's own.

python -m tests.benchmarks.bench_games [--device cuda]
"""

import argparse
import time
from pathlib import Path

import torch

from saescale.trainers.subjects.othello_board import SIZES
from saescale.trainers.subjects.othello_games import random_games
from tests.benchmarks.harness import machine, run, show_table, write_result

AT_A_TIME = (512, 2_048, 8_192, 32_768)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_games", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: tests/benchmarks/results/games.json)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if arguments.device == "cpu" else _of_gpu
    boards = []
    for size in SIZES[1:]:
        rates = {}
        for number in AT_A_TIME:
            numbers = torch.arange(number, device=arguments.device)
            random_games(size, 0, numbers[:16])
            began = clock()
            random_games(size, 1, numbers)
            rates[number] = number / (clock() - began)
        boards.append({"size": size, "games_per_s": rates})
    rows = [[f"{b['size']}x{b['size']}", *(f"{rate:,.0f}" for rate in b["games_per_s"].values())] for b in boards]
    show_table("random games a second, by how many at once", ["board", *(f"{n:,}" for n in AT_A_TIME)], rows)
    written = write_result("games", {"machine": machine(), "device": arguments.device, "boards": boards}, arguments.out)
    print(f"wrote {written}")


def _of_gpu() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    run(main)
