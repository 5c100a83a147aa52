"""The check that stands between a user and a kernel that does not work, and kernels for devices that are not here."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from saescale.trainers.kernels.cuda_check import check
from tests.trainers.implementations import TRITON, compile_for, implementation, interpreted


def test_the_check_finds_nothing() -> None:
    kernels, device = implementation(TRITON)
    assert check(kernels, device) is None


class Launched:
    """A kernel with something changed."""

    def __init__(self, kernel: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.kernel, self.change = kernel, change

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args, **options: self.kernel[grid](*args, **self.change(options))


def broken(options: dict[str, Any]) -> dict[str, Any]:
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("kernel", "change", "message"),
    [
        ("_update", lambda options: options | {"UNIT_ROWS": False}, "the updated rows: off by"),
        ("_decode", lambda options: options | {"BLOCK": options["BLOCK"] // 2}, "the error: off by"),
        ("_maxima", broken, "RuntimeError: no kernel image"),
    ],
)
def test_the_check_reports_a_broken_kernel(
    kernel: str, change: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, device = implementation(TRITON)
    monkeypatch.setattr(kernels, kernel, Launched(getattr(kernels, kernel), change))
    fault = check(kernels, device)
    assert fault is not None
    assert message in fault
    assert "\n" not in fault


def test_kernels_compile_for_several_generations_of_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # Sizes that are multiples of 16 make other kernels than those that are not.
    sizes = [{}, {"batch": 16, "d_model": 768, "n_latents": 4096, "ks": (32, 128)}]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        for names in processes.map(compile_for, [80, 90], sizes):
            assert names == [
                "_decode", "_largest_entries", "_largest_groups", "_latent_sums", "_maxima", "_piece_sums", "_update"
            ]  # fmt: skip


def test_the_interpreter_stays_with_these_tests() -> None:
    triton = pytest.importorskip("triton")
    variables = dict(os.environ)
    interpreted()
    assert dict(os.environ) == variables
    assert sys.modules["triton"] is triton
    assert isinstance(triton.language.sum, triton.runtime.JITFunction)
