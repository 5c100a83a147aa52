"""Which implementation of the sparse algebra a device gets."""

import warnings
from functools import cache
from typing import Literal

import torch

from saescale.storage.errors import SaescaleWarning, one_line
from saescale.trainers.kernels.interface import DeadKernels, Kernels

KernelKind = Literal["cpu", "cuda", "eager"]  # the files of that name


def kernels(device: torch.device) -> Kernels:
    """The implementation for a device. Imported when asked for: numba and Triton take seconds to load."""
    kind = kernel_kind(device)
    if kind == "cpu":
        from saescale.trainers.kernels import cpu

        return cpu
    if kind == "cuda":
        from saescale.trainers.kernels import cuda

        return cuda
    from saescale.trainers.kernels import eager

    return eager


def dead_kernels(sparse: Kernels, device: torch.device) -> DeadKernels | None:
    """What there is beside `sparse`, which computes on `device`, for AuxK."""
    if device.type != "cpu":
        return None
    from saescale.trainers.kernels import cpu, cpu_dead

    return cpu_dead if sparse is cpu else None


def kernel_kind(device: torch.device) -> KernelKind:
    """Which implementation that is: Triton's where its kernels work, which they show once in a process."""
    if device.type == "cpu":
        return "cpu"
    return _on_cuda(device.index or 0) if device.type == "cuda" else "eager"


@cache
def _on_cuda(index: int) -> KernelKind:
    device = torch.device("cuda", index)
    try:
        from saescale.trainers.kernels import cuda
        from saescale.trainers.kernels.cuda_check import check

        fault = check(cuda, device)
    except ImportError as error:
        fault = one_line(error)
    if fault is None:
        return "cuda"
    warnings.warn(
        f"the Triton kernels do not work on {torch.cuda.get_device_name(device)} ({fault}): training by plain torch, "
        "which gives the same and takes longer",
        SaescaleWarning,
        stacklevel=2,
    )
    return "eager"
