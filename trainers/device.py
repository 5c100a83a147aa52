"""Which device, precision and number of threads a process trains with."""

from pathlib import Path

import numba
import torch

from trainers.cell import Precision


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_precision(device: torch.device | str) -> Precision:
    """The faster operand type of a matrix product: bf16 on CUDA and on CPUs with AMX tiles, else fp32.

    AVX512-BF16 alone does not pay: measured on a Xeon without AMX, a bf16 product of torch 2.13 runs at 0.5 to 0.8
    times the speed of fp32.
    """
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if "amx_bf16" in _cpu_flags() else "fp32"


def _cpu_flags() -> set[str]:
    # The kernel's list, not cpuid: the units are unusable where the kernel does not offer their state.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


def set_threads(threads: int) -> None:
    """CPU threads of torch and of the numba kernels, for the calling thread of this process.

    To be called before the first kernel runs: the start of numba's threads sets OpenMP's number, which is torch's
    too, to the number of cores, and torch's sums would have another order from then on.
    """
    # numba's threads start here if they have not yet, so torch has to have the last word.
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)
