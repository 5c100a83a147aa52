"""Which precision a device gets, by what it says it supports, whatever else the machine is doing; and its cores."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saescale.trainers import precision
from saescale.trainers.device import fast_precision, usable_cores
from saescale.trainers.precision import cpu_precision, gpu_precision, read_processor

# Parts of /proc/cpuinfo as Linux writes it on such machines.
HASWELL = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model name\t: Intel(R) Xeon(R) CPU E5-2680 v3 @ 2.50GHz
flags\t\t: fpu sse sse2 avx f16c fma avx2 bmi2
bugs\t\t: spectre_v1 amx_bf16_is_no_flag_here

processor\t: 1
vendor_id\t: GenuineIntel
flags\t\t: fpu amx_bf16
"""
ZEN_4 = "vendor_id\t: AuthenticAMD\nflags\t\t: avx2 avx512f avx512_bf16 avx512_vnni\n"
ZEN_3 = "vendor_id\t: AuthenticAMD\nflags\t\t: avx2 fma\n"
COOPER_LAKE = "vendor_id\t: GenuineIntel\nflags\t\t: avx2 avx512f avx512_bf16\n"
SAPPHIRE_RAPIDS = "vendor_id\t: GenuineIntel\nflags\t\t: avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("cpuinfo", "wanted"),
    [
        (HASWELL, "fp32"), (ZEN_3, "fp32"), (ZEN_4, "bf16"), (COOPER_LAKE, "fp32"), (SAPPHIRE_RAPIDS, "bf16"),
        (GRAVITON, "fp32"), ("", "fp32"), ("\x00 no such thing", "fp32"), ("flags\nvendor_id\n", "fp32"),
    ],
    ids=["AVX2 Xeon", "Zen 3", "Zen 4", "Xeon without AMX", "Xeon with AMX", "ARM", "empty", "bytes", "no colons"],
)  # fmt: skip
def test_a_cpu_gets_bf16_where_its_products_are_faster(
    cpuinfo: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu_precision(read_processor(cpuinfo)) == wanted
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(precision, "_CPUINFO", str(tmp_path / "cpuinfo"))
    assert fast_precision(torch.device("cpu")) == wanted


def test_a_machine_that_does_not_tell_gets_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_CPUINFO", str(tmp_path / "none"))
    assert fast_precision(torch.device("cpu")) == "fp32"
    monkeypatch.setattr(precision, "_CPUINFO", str(tmp_path))
    assert fast_precision(torch.device("cpu")) == "fp32"


def test_gpus_get_bf16_unless_one_has_to_emulate_it() -> None:
    assert gpu_precision([]) == gpu_precision(["A100", "H100"]) == "bf16"
    assert gpu_precision(["A100", "V100"]) == gpu_precision(["T4"]) == "fp32"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are not given out on this system")
def test_cores_are_those_that_this_process_may_run_on() -> None:
    before = os.sched_getaffinity(0)
    assert usable_cores() == len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_freed_blocks_between_others_return_to_the_system() -> None:
    """In a process of its own, whose allocator has come to keep blocks of up to 24 MiB."""
    code = """
import resource
from pathlib import Path
import numpy as np
from saescale.trainers.device import keep_no_large_blocks

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20

np.ones(3 * 2**20)
keep_no_large_blocks()
before = resident()
blocks = [np.ones(2**20) for _ in range(20)]
during = resident()
del blocks[:-1]
print(during - before, resident() - before)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    held, left = map(int, said.split())
    assert held >= 150, held
    assert left < 16, left
