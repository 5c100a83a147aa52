"""Benchmark: what AuxK costs a TopK step on the CPU while latents are dead.

    python -m tests.benchmarks.bench_auxk            one thread; three minutes on an idle machine

Steps with each share of dead latents take turns, from the same weights and on the same random inputs of unit norm; a
ratio is that of one round. Dead latents are scaled down, so that none is among a token's k largest while half of their
pre-activations are positive: AuxK finds its k_aux wherever so many are. Seconds are CPU time of the process, which
a busy machine lengthens less than it does wall time; with --device cuda they are the wall time of a whole step.

"gathered" is the same step with AuxK by products with the dead rows gathered into a matrix, or as one more term of the
loss where many are dead, as on devices other than CPUs.
"""

import argparse
import os
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

from saescale.trainers.architectures.architecture import Batch
from saescale.trainers.device import set_threads
from saescale.trainers.kernels import choose
from saescale.trainers.precision import Precision
from saescale.trainers.preprocess import measure_centre
from tests.benchmarks.harness import alternate, console, machine, quartiles, run, show_table, slow_bf16, write_result
from tests.benchmarks.ours import DEAD_AFTER_TOKENS, training_cell
from tests.benchmarks.protocol import Size, unit_rows

SIZE = Size(2048, 768, 8192, 32)
SHARES = [0.0, 0.01, 0.05, 0.1, 0.2, 0.25, 0.5, 0.75, 0.9]
SCALE = 0.25  # of a dead latent's encoder row: 4.5 standard deviations stay below the k largest of live ones


class Trained:
    """One cell that all turns share, and the weights that each starts from."""

    def __init__(self, precision: Precision, k_aux: int, device: torch.device) -> None:
        rows = unit_rows(SIZE)
        self.precision, self.centre = precision, measure_centre(torch.cat(rows))
        self.inputs, self.origin = [x.to(device) for x in rows], self.centre.b_pre.to(device)
        self.cell = training_cell(SIZE, self.centre, precision, k_aux, str(device))
        self.start = {name: tensor.clone() for name, tensor in self.cell.sae.params.items()}


class Dying:
    """A Turn: steps of the cell, before each of which so many of its latents are dead."""

    def __init__(self, share: float, trained: Trained, gathered: bool) -> None:
        self.name = f"{'gathered ' if gathered else ''}{share:.0%}"
        self.trained, self.gathered = trained, gathered
        order = torch.randperm(SIZE.n_latents, generator=torch.Generator().manual_seed(0))
        self.dead = order[: round(share * SIZE.n_latents)]
        self.steps, self.pairs = 0, 0.0

    def step(self) -> float:
        cell, inputs = self.trained.cell, self.trained.inputs
        for name, tensor in self.trained.start.items():
            cell.sae.params[name].copy_(tensor)
        cell.sae.params["W_enc"][self.dead] *= SCALE
        cell.sae.round()
        cell.dead.tokens_since.zero_()
        cell.dead.tokens_since[self.dead] = 10 * DEAD_AFTER_TOKENS
        batch = Batch.of(inputs[self.steps % len(inputs)], self.trained.origin, self.trained.precision == "bf16")
        before, self.steps = cell.worked, self.steps + 1
        with mock.patch.object(choose, "dead_kernels", _none) if self.gathered else nullcontext():
            began = _clock(batch.x.device)
            cell.train_on(batch)
            seconds = _clock(batch.x.device) - began
        assert cell.worked.dead - before.dead == len(self.dead) * SIZE.batch_tokens
        self.pairs = float(cell.worked.selected_aux - before.selected_aux) / SIZE.batch_tokens
        return seconds


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _none(*_: object) -> None:
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_auxk",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=9, help="steps of each that count (default: 9)")
    parser.add_argument("--k-aux", type=int, default=256, help="latents that AuxK takes for a token (default: 256)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--device", default="cpu", type=torch.device, help="default: cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: tests/benchmarks/results/auxk.json)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    set_threads(arguments.threads)
    where, reason = machine(), slow_bf16() if arguments.device.type == "cpu" else None
    if arguments.device.type == "cuda":
        where["gpu"] = torch.cuda.get_device_name(arguments.device)
    results = []
    precisions: list[Precision] = ["fp32"] if reason else ["bf16", "fp32"]
    for precision in precisions:
        trained = Trained(precision, arguments.k_aux, arguments.device)
        turns = [Dying(share, trained, False) for share in SHARES]
        if arguments.device.type == "cpu":
            turns += [Dying(share, trained, True) for share in SHARES[1:]]
        timings = alternate(turns, arguments.rounds, warmup=2)
        without, rows = timings[turns[0].name], []
        for turn in turns:
            timing = timings[turn.name]
            ratios = [mine / base for mine, base in zip(timing.seconds, without.seconds, strict=True)]
            low, ratio, high = quartiles(ratios)
            rows.append([
                turn.name, f"{turn.pairs:.0f}", f"{timing.median * 1e3:.0f}", f"{ratio:.2f}", f"{low:.2f}-{high:.2f}"
            ])  # fmt: skip
            results.append({
                "precision": precision, "dead": len(turn.dead) / SIZE.n_latents, "gathered": turn.gathered,
                "pairs_per_token": turn.pairs, "seconds": timing.seconds, "ratio": ratio, "quartiles": [low, high],
            })  # fmt: skip
        columns = ["dead latents", "AuxK pairs a token", "median ms", "over 0 %", "quartiles"]
        show_table(f"{SIZE}, {precision}, {arguments.threads} threads", columns, rows)
        settings = {**SIZE._asdict(), "k_aux": arguments.k_aux, "threads": arguments.threads}
        left_out = {"bf16": reason} if reason else {}
        result = {"machine": where, **settings, "left_out": left_out, "steps": results}
        # Each precision as it comes: on a busy machine a run takes long.
        path = write_result("auxk", result, arguments.out)
        console.print(f"wrote {os.path.relpath(path)}")


if __name__ == "__main__":
    run(main)
