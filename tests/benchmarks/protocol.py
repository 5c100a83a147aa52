"""What a contender's process and the harness say to each other: lines, one at a time.

    harness writes    the process answers with one line of JSON
                      {"ready": {...}} once built: what it is and with which settings; or {"error": ...}
    step              {"seconds": ..., "idle_cpu": ...} after one training step
    loss              {"loss": ...}, that of the last step; null where there is none
    quit              nothing: the process ends, as it does when its input ends

`seconds` is the wall time of the step alone. `idle_cpu` is the CPU time, over all threads, that the process took
between the end of the step before and the beginning of this one: near zero, or waiting contenders disturb the one at
work.

A contender is a training loop over `Server.batches`, which lets a batch go whenever a step is asked for. That way a
library's own loop can be measured as it is. Needs torch and the standard library only: it also runs in the peers'
environment.
"""

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BATCHES = 4  # different ones, cycled


class Size(NamedTuple):
    """One TopK SAE and the batch that it is trained on."""

    batch_tokens: int
    d_model: int
    n_latents: int
    k: int

    def __str__(self) -> str:
        return f"{self.batch_tokens} x {self.d_model}, N = {self.n_latents}, k = {self.k}"


class Unavailable(Exception):
    """A contender that cannot run here, with the reason in one sentence."""


class Server:
    """The process's side of the conversation. `loss` is for the training loop to set after each step."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.loss: float | Tensor = math.nan
        # The answers get the real stdout; whatever else is printed, by Python or by C, goes to stderr.
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def batches(self, inputs: Sequence[Tensor], about: Mapping[str, Any]) -> Iterator[Tensor]:
        """Endless: `inputs` in a cycle, on the device, one for each step that is asked for. `about`: the contender."""
        inputs = [x.to(self.device) for x in inputs]
        self.answer(ready={"torch": torch.__version__, **about})
        finished = time.process_time()
        for batch in itertools.cycle(inputs):
            self._await_step()
            idle_cpu = time.process_time() - finished
            self._finish()
            began = time.perf_counter()
            yield batch
            self._finish()
            seconds = time.perf_counter() - began
            finished = time.process_time()
            self.answer(seconds=seconds, idle_cpu=idle_cpu)

    def _finish(self) -> None:
        """Waits for what a GPU has been told to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def answer(self, **fields: Any) -> None:
        print(json.dumps(fields), file=self._answers)

    def _await_step(self) -> None:
        while True:
            command = sys.stdin.readline().strip()
            if command == "step":
                return
            if command == "loss":
                loss = float(self.loss)
                self.answer(loss=loss if math.isfinite(loss) else None)
            elif command in ("quit", ""):
                # Ends whatever training loop stands above, which catches `Exception` at most.
                raise SystemExit(0)
            else:
                self.answer(error=f"unknown command {command!r}: step, loss or quit")


def unit_rows(size: Size) -> list[Tensor]:
    """The inputs of every contender: BATCHES of float32 [batch_tokens, d_model], random rows of unit norm."""
    # No seed of a cell: its first weights are drawn alike, and these would be the rows of its decoder.
    generator = torch.Generator().manual_seed(2**31)
    drawn = (torch.randn(size.batch_tokens, size.d_model, generator=generator) for _ in range(BATCHES))
    return [x / x.norm(dim=1, keepdim=True) for x in drawn]


def serve(contenders: Mapping[str, Callable[[Size, Server], None]], description: str) -> None:
    """The command line of a contender's process: `NAME B D N K [--threads T] [--device D]`, then the conversation."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=contenders)
    for letter, meaning in (("B", "tokens of a batch"), ("D", "d_model"), ("N", "latents"), ("K", "latents per token")):
        parser.add_argument(letter, type=int, help=meaning)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    server = Server(arguments.device)
    try:
        contenders[arguments.name](Size(arguments.B, arguments.D, arguments.N, arguments.K), server)
    except Unavailable as reason:
        server.answer(error=str(reason))
        raise SystemExit(1) from None
