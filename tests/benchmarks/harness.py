"""What the benchmark scripts share: contenders that take turns, the numbers of a run, tables and JSON results.

Contenders run in processes of their own (protocol.py), and one works at a time: A B C A B C ..., so that whatever else
the machine does meets all of them alike, and ratios are taken within a round. Absolute times of a shared machine vary;
ratios of one run are what can be compared.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.benchmarks.protocol import Size

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
# Each contender's threads sleep as soon as they have nothing to do, instead of spinning beside the one at work.
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
# A library that looks for a GPU finds none where the CPU is compared.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
# None of them calls home.
ALIKE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}

# Where no terminal says how wide it is, tables get the width that they need.
console = Console(width=None if sys.stdout.isatty() else 120)


class BenchmarkError(Exception):
    """What keeps a benchmark from running, in words for the person who started it."""


class Turn(Protocol):
    """What takes its turn in `alternate`."""

    @property
    def name(self) -> str: ...

    def step(self) -> float:
        """One step; returns its seconds."""


class Contender:
    """A process that speaks protocol.py: `python -m MODULE NAME B D N K --threads T`, waiting whenever it isn't asked.

    `about` is what it says of itself, `idle_cpu` the CPU seconds that it took before each step while it should have
    been waiting. Raises BenchmarkError with the end of its stderr when it does not start or dies.
    """

    def __init__(self, name: str, module: str, size: Size, threads: int, python: Path, device: str = "cpu") -> None:
        self.name = name
        self.idle_cpu: list[float] = []
        # A file, not a pipe: nobody reads it while the process works, and a full pipe would stop it.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-m", module, name, *map(str, (*size, "--threads", threads, "--device", device))],
            cwd=ROOT,
            env=os.environ
            | QUIET
            | ALIKE
            | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
            | (NO_GPU if device == "cpu" else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )
        try:
            self.about: dict[str, Any] = self._answer()["ready"]
        except BaseException:
            self.close()
            raise

    def step(self) -> float:
        answer = self._ask("step")
        self.idle_cpu.append(answer["idle_cpu"])
        return float(answer["seconds"])

    def loss(self) -> float | None:
        """Of the last step; None where there is none."""
        loss: float | None = self._ask("loss")["loss"]
        return loss

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> "Contender":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
        except BrokenPipeError:
            raise self._died() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(f"{self.name}: {answer['error']}")
        return answer

    def _died(self) -> BenchmarkError:
        status = self._process.wait()
        self._log.seek(0)
        said = "\n".join(self._log.read().splitlines()[-20:])
        reason = "killed, perhaps for want of memory" if status == -9 else f"ended with status {status}"
        return BenchmarkError(f"{self.name}: its process was {reason}. The end of what it printed:\n{said}")


def size_argument(text: str) -> Size:
    """Of a command line: B,D,N,K."""
    try:
        size = Size(*map(int, text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not B,D,N,K, four whole numbers") from None
    if min(size) < 1 or size.k > size.n_latents:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers have to be at least 1, and K at most N")
    return size


class Timing(NamedTuple):
    """The seconds of one contender, round by round, without the warm-up."""

    seconds: list[float]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile."""
        return quartiles(self.seconds)

    @property
    def median(self) -> float:
        return self.quartiles[1]

    def speed_over(self, other: "Timing") -> list[float]:
        """How many times as fast as `other`, round by round."""
        return [theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(low), float(middle), float(high)


def alternate(contenders: Sequence[Turn], rounds: int, warmup: int) -> dict[str, Timing]:
    """One step of each in turn, `warmup` + `rounds` times; the first `warmup` rounds are not counted."""
    timings = {contender.name: Timing([]) for contender in contenders}
    for number in track(range(warmup + rounds), "rounds", console=console, transient=True):
        for contender in contenders:
            seconds = contender.step()
            if number >= warmup:
                timings[contender.name].seconds.append(seconds)
    return timings


def machine() -> dict[str, Any]:
    """Where and when numbers were taken."""
    flags, model = "", platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = value
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": os.cpu_count(),
        "flags": sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16"} & set(flags.split())),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


SLOW = 3.0  # times as long as in float32: a step in bfloat16 is then of no use to anybody, and may take minutes


def slow_bf16() -> str | None:
    """Why bfloat16 is left out on this machine's CPU, in words; None where it is not.

    Without instructions for it (AVX512-BF16, AMX) torch's product is that many times slower. Timed on a small one.
    """
    operands = torch.randn(256, 256), torch.randn(256, 256)
    rounded = [operand.bfloat16() for operand in operands]
    seconds = [min(_product_seconds(*pair) for _ in range(5)) for pair in (operands, rounded)]
    times = seconds[1] / seconds[0]
    if times <= SLOW:
        return None
    return f"no hardware for bfloat16: its product takes {times:.0f} times as long as the float32 one on this CPU"


def _product_seconds(x: torch.Tensor, W: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.mm(x, W.T)
    return time.perf_counter() - began


def write_result(name: str, result: dict[str, Any], out: Path | None = None) -> Path:
    """Writes results/NAME.json, or `out`."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, **result}, indent=1) + "\n")
    return path


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> None:
    """Prints a table; the first column holds names, the others numbers."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def run(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what keeps it from running is one line on stderr."""
    began = time.perf_counter()
    try:
        main()
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    console.print(f"took {time.perf_counter() - began:.0f} s")
