"""Which device, precision and number of threads a process trains with."""

import ctypes
import os
from contextlib import suppress

import numba
import torch

from saescale.storage.errors import SaescaleError
from saescale.storage.files import lacks_memory
from saescale.trainers.precision import Precision, cpu_precision, this_processor


class OutOfMemory(SaescaleError):
    """A pack takes more memory than its worker has: fewer cells may fit."""


# How the errors of a GPU begin that are no class of their own: torch's, Triton's, cuBLAS'.
_OF_A_GPU = ("CUDA error", "Triton Error [CUDA]", "CUBLAS_STATUS")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the host's memory was the reason."""
    if isinstance(error, torch.OutOfMemoryError | OutOfMemory) or lacks_memory(error):
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


def fast_precision(device: torch.device) -> Precision:
    """The operand type of matrix products that the device is made for (precision.py); it is never measured."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return cpu_precision(this_processor()) if device.type == "cpu" else "fp32"


def usable_cores() -> int:
    """CPU cores that this process may run on: in a container, or a job of a cluster, maybe few of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# As malloc.h calls them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 4 * 2**20


def keep_no_large_blocks() -> None:
    """From now on freed blocks of 4 MiB or more go back to the system at once.

    By itself glibc comes to keep all of less than 32 MiB for later, and what is allocated next does not fit between
    what still lies there: of a small pack a quarter of its memory was such gaps, one time more and another time less.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)  # of what is free at the end, as glibc relates the two


def return_freed_memory() -> None:
    """To the system, which another process may want it from: glibc keeps freed smaller blocks, and what is allocated
    next may not fit between what still lies there."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def set_threads(threads: int) -> None:
    """CPU threads of torch and of the numba kernels, for the calling thread of this process.

    To be called before the first kernel runs: the start of numba's threads sets OpenMP's number, which is torch's
    too, to the number of cores, and torch's sums would have another order from then on.
    """
    # numba's threads start here if they have not yet, so torch has to have the last word.
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)
