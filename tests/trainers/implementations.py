"""Every implementation of the sparse algebra, as the tests get hold of it.

    @pytest.mark.parametrize("name", NAMES)
    def test(name): kernels, device = implementation(name)

Without a GPU the Triton kernels run under Triton's interpreter; with one they run on it, and so does the eager form.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from saescale.trainers.kernels import cpu as sparse_cpu
from saescale.trainers.kernels import eager as sparse_eager

HAS_CUDA = torch.cuda.is_available()
NAMES = ["cpu", "eager", *(["cuda", "eager on cuda"] if HAS_CUDA else ["cuda, interpreted"])]
TRITON = NAMES[2]


class Implementation(NamedTuple):
    kernels: ModuleType
    device: torch.device


@cache
def implementation(name: str) -> Implementation:
    if name == "cuda":
        from saescale.trainers.kernels import cuda as sparse_cuda

        return Implementation(sparse_cuda, torch.device("cuda"))
    if name == "cuda, interpreted":
        return Implementation(interpreted(), torch.device("cpu"))
    module = sparse_cpu if name == "cpu" else sparse_eager
    return Implementation(module, torch.device("cuda" if name == "eager on cuda" else "cpu"))


def interpreted() -> ModuleType:
    """saescale.trainers.kernels.cuda on a Triton of its own, whose functions are interpreted.

    Triton decides that when it is imported, and lightning has imported it long before. Nothing of this copy is left
    where others would find it, nor is the variable that makes it.
    """
    pytest.importorskip("triton", reason="Triton, which the `dev` extra installs, is not there")
    path = importlib.util.find_spec("saescale.trainers.kernels.cuda")
    assert path is not None
    assert path.origin is not None
    spec = importlib.util.spec_from_file_location("trainers_sparse_cuda_interpreted", path.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _without_triton(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@contextmanager
def _without_triton() -> Iterator[None]:
    """As if Triton had not been imported yet, and afterwards as before."""

    def loaded() -> dict[str, ModuleType]:
        # A compiled module cannot be loaded twice.
        return {
            name: module
            for name, module in sys.modules.items()
            if name.partition(".")[0] == "triton" and not name.startswith("triton._C")
        }

    before = loaded()
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(before)


def compile_for(capability: int, sizes: dict[str, Any]) -> list[str]:
    """Compiles every kernel to machine code for that compute capability, without a GPU; their names.

    To be called in a process of its own: nothing is launched in it from then on.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from saescale.trainers.kernels import cuda as sparse_cuda
    from saescale.trainers.kernels import cuda_check

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    compiled, run = set(), JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        if run(self, *args, grid=grid, warmup=True, **options).asm["cubin"]:
            compiled.add(self.fn.__name__)

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    functions = [getattr(sparse_cuda, name) for name in cuda_check.FUNCTIONS]
    for _ in cuda_check.small_step(torch.device("cpu"), *functions, piece=sparse_cuda.PIECE, **sizes):
        pass
    return sorted(compiled)
