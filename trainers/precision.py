"""The types of number that a cell's encoder product may take, and which of them a device is made for.

Apart, because a sweep is read and begun without torch. By what a device supports, never by timing it: a stopwatch says
who was free that minute, and cells of one law would differ by that.
"""

import platform
from collections.abc import Iterable, Set
from typing import Literal, NamedTuple

Precision = Literal["fp32", "bf16"]  # of the operands of the encoder product

_CPUINFO = "/proc/cpuinfo"
# NVIDIA's before Ampere, as Ray names them: bf16 is emulated there.
_OLD_GPUS = frozenset({"K80", "P4", "P100", "T4", "V100"})


class Processor(NamedTuple):
    """Of a CPU: who made it, and what it can do, as Linux names both; empty where that cannot be read."""

    vendor: str
    flags: Set[str]


def read_processor(cpuinfo: str) -> Processor:
    """The first processor of a text like /proc/cpuinfo. ARM's has other names, and comes out empty."""
    first = cpuinfo.strip().split("\n\n")[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    return Processor(fields.get("vendor_id", ""), frozenset(fields.get("flags", "").split()))


def this_processor() -> Processor:
    """That of this machine; where the system does not tell what it can do, an empty one."""
    if platform.system() != "Linux":
        return Processor("", frozenset())
    try:
        with open(_CPUINFO, encoding="utf-8", errors="replace") as file:
            return read_processor(file.read())
    except OSError:
        return Processor("", frozenset())


def cpu_precision(processor: Processor) -> Precision:
    """bf16 where a product of it is faster than one of fp32 on every processor of that kind.

    With AVX512-BF16 and without AMX, a bf16 product of torch 2.13 is 2.3 times as fast as fp32 on an AMD Zen 4, and
    0.5 to 0.8 times on a Xeon; with AMX it is faster on a Xeon too. Without either it is emulated, and takes minutes.
    """
    has_amx = "amx_bf16" in processor.flags
    return "bf16" if has_amx or (processor.vendor == "AuthenticAMD" and "avx512_bf16" in processor.flags) else "fp32"


def gpu_precision(kinds: Iterable[str]) -> Precision:
    """For GPUs of these kinds, as Ray names them ("A100"): bf16 unless one of them has to emulate it."""
    return "fp32" if _OLD_GPUS & set(kinds) else "bf16"
