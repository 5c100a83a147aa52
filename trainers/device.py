"""Which device, precision and number of threads a process trains with."""

import time
from functools import cache

import numba
import torch
from saescale.storage.errors import SaescaleError
from saescale.trainers.precision import Precision


class OutOfMemory(SaescaleError):
    """A pack takes more memory than its worker has: fewer cells may fit."""


# How the errors of a GPU begin that are no class of their own: torch's, Triton's, cuBLAS'.
_OF_A_GPU = ("CUDA error", "Triton Error [CUDA]", "CUBLAS_STATUS")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the host's memory was the reason."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    text = str(error)
    if "can't allocate memory" in text:  # torch's allocator of host memory
        return isinstance(error, RuntimeError)
    return _is_of_a_gpu(error) and ("out of memory" in text or "ALLOC_FAILED" in text)


def spoils_the_process(error: BaseException) -> bool:
    """Whether an error in one cell's step is the whole process': its memory ran out, or its GPU is lost to it."""
    return is_out_of_memory(error) or _is_of_a_gpu(error)


def _is_of_a_gpu(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(kind in str(error) for kind in _OF_A_GPU)


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_kind(device: torch.device) -> str:
    """What results.parquet calls a device of its kind: a GPU as its maker does, else the type, such as cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


_GAIN = 1.25  # a bf16 product has to be this much faster to be worth its rounding


@cache
def fast_precision(device: torch.device) -> Precision:
    """The faster operand type of a matrix product, measured once in a process on the CPU (about 0.1 s).

    No list of processor flags says it: with AVX512-BF16 and without AMX, a bf16 product of torch 2.13 is 2.3 times as
    fast as fp32 on an AMD Zen 4, and 0.5 to 0.8 times on a Xeon.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type != "cpu":
        return "fp32"
    operands = torch.randn(256, 512), torch.randn(512, 512)
    rounded = [operand.bfloat16() for operand in operands]
    threads = torch.get_num_threads()
    # One thread, in turn, and the best of many short products: while other processes want the cores too, as the
    # workers of a pool do that start together, some of each run undisturbed.
    torch.set_num_threads(1)
    try:
        times = [[_seconds(*pair) for pair in (operands, rounded)] for _ in range(30)]
    finally:
        torch.set_num_threads(threads)
    fp32, bf16 = (min(column) for column in zip(*times, strict=True))
    return "bf16" if fp32 > _GAIN * bf16 else "fp32"


def _seconds(x: torch.Tensor, W: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.mm(x, W.T)
    return time.perf_counter() - began


def set_threads(threads: int) -> None:
    """CPU threads of torch and of the numba kernels, for the calling thread of this process.

    To be called before the first kernel runs: the start of numba's threads sets OpenMP's number, which is torch's
    too, to the number of cores, and torch's sums would have another order from then on.
    """
    # numba's threads start here if they have not yet, so torch has to have the last word.
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)
