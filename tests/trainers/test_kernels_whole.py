"""What the interface of the sparse algebra promises of all operations together, for every implementation."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saescale.trainers.architectures import auxk as auxk_path
from saescale.trainers.architectures.dead import DeadLatents
from saescale.trainers.kernels import choose
from saescale.trainers.kernels import cpu as sparse_cpu
from saescale.trainers.kernels.interface import Moments
from tests.trainers.implementations import NAMES, TRITON, implementation
from tests.trainers.kernel_cases import ADAM, Generator, Inputs, close, every_implementation, everything, pieces_of
from tests.trainers.topk_case import adam_of, in_float64, new_sae, reference_step, take_step, update


@pytest.mark.parametrize("name", [name for name in NAMES if name != "eager on cuda"])
def test_the_same_bits_at_every_call(name: str) -> None:
    kernels, device = implementation(name)
    with pieces_of(kernels, 5):
        once, again = everything(kernels, Inputs.on(device)), everything(kernels, Inputs.on(device))
    for key, tensor in once.items():
        assert torch.equal(tensor, again[key]), key


@pytest.mark.parametrize("name", NAMES[1:])
def test_implementations_agree(name: str) -> None:
    kernels, device = implementation(name)
    expected = everything(sparse_cpu, Inputs.on(torch.device("cpu")))
    with pieces_of(kernels, 5):
        for key, tensor in everything(kernels, Inputs.on(device)).items():
            # A number may round to either of two neighbours in bfloat16 if the last bit of float32 is another.
            assert close(tensor, expected[key].double(), 0.01 if "operand" in key else 1e-5), key


@every_implementation
@pytest.mark.filterwarnings("ignore:.*deterministic", "ignore:invalid value:RuntimeWarning")
def test_nothing_is_read_before_it_is_written(name: str) -> None:
    kernels, device = implementation(name)
    inputs = Inputs.on(device, n_latents=33)  # the last of the groups that selection makes is not full
    with pieces_of(kernels, 5):
        expected = everything(kernels, inputs, k=2)
        try:
            # Then empty memory is filled with NaN, or with the largest whole number.
            torch.use_deterministic_algorithms(True, warn_only=True)
            got = everything(kernels, inputs, k=2)
        finally:
            torch.use_deterministic_algorithms(False)
    for key, tensor in expected.items():
        assert close(got[key], tensor.cpu().double(), 0.01 if "operand" in key else 1e-5), key


@pytest.mark.skipif(TRITON != "cuda", reason="whether the host waits for a GPU shows on a GPU")
def test_the_host_never_waits() -> None:
    kernels, device = implementation(TRITON)
    inputs = Inputs.on(device)
    everything(kernels, inputs)  # compiling waits
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        everything(kernels, inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any torch operation returned, apart from `known` ones and views of them."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


# What kernels/cpu.py makes is numpy's, which this cannot see: test_memory.py holds it to a peak without either.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "cpu"])
def test_nothing_of_size_batch_k_d_is_made(name: str) -> None:
    kernels, device = implementation(name)
    batch, d_model, n_latents, k = 8, 64, 40, 20
    inputs = Inputs.on(device, batch, d_model, n_latents)
    with LargestTensor() as seen:
        everything(kernels, inputs, k)
    # The weights themselves are the largest.
    assert seen.bytes == n_latents * d_model * 4 < batch * k * d_model * 4 / 3


def test_no_gradient_of_the_weights_is_made() -> None:
    kernels, device = implementation(TRITON)
    random, n_latents, d_model = Generator(0, device), 30, 16
    summands = random.summands([2] * n_latents, 6, d_model, [3], shift=True)
    parameter = random.normal(n_latents, d_model)
    moments = Moments(*(torch.ones_like(parameter) for _ in Moments._fields))
    operand = parameter.bfloat16()
    with LargestTensor(parameter, *moments, operand, *(t for t in summands if t is not None)) as seen:
        kernels.update_rows(parameter, moments, summands, ADAM, True, operand)
    assert seen.bytes < n_latents * d_model * 4 / 2


# --- training


@every_implementation
@pytest.mark.parametrize("auxk", ["rows", "term"])
@pytest.mark.parametrize("multi", [False, True])
def test_training_equals_autograd_and_the_plain_optimiser(
    name: str, auxk: str, multi: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, device = implementation(name)
    # AuxK goes one way while few latents are dead, and the other while many are.
    monkeypatch.setattr(auxk_path, "FEW_DEAD", 8 if auxk == "rows" else 1)
    monkeypatch.setattr(choose, "kernels", lambda device: kernels)
    monkeypatch.setattr(kernels, "PIECE", 8, raising=False)
    n_latents, d_model, k = 20, 10, 3
    generator = torch.Generator().manual_seed(5)
    b_pre = 0.1 * torch.randn(d_model, generator=generator)
    sae = new_sae(d_model, n_latents, k, b_pre, seed=1, k_aux=3, auxk_coefficient=0.5, multi_topk=multi)
    sae.params["b_enc"][:8] -= 5  # dead
    sae.params["b_enc"][8] += 5  # active on every token
    exact = in_float64(sae)
    sae = sae.like({key: tensor.to(device) for key, tensor in sae.params.items()})
    fast, plain = adam_of(sae, 1e-3, 0.9), adam_of(exact, 1e-3, 0.9)
    origin = sae.params["b_pre"].clone()
    dead = DeadLatents(n_latents, device)
    dead.tokens_since[:8] = 100

    for _ in range(3):
        x = torch.randn(12, d_model, generator=generator)
        result = take_step(sae, x.to(device), origin, dead, 100, variance=0.8)
        losses, gradients = reference_step(exact, x, dead.after(100).cpu(), variance=0.8)
        update(sae, fast, result)
        plain.apply(gradients)
        assert float(losses.parts["auxk"].detach()) > 0
        assert bool(len(result.gradient.aux.latents)) == (auxk == "rows" or name == "cpu")
        assert result.main == pytest.approx(float(losses.main.detach()), rel=1e-4)
        for part in ("multi", "auxk"):
            assert float(result.parts[part]) == pytest.approx(float(losses.parts[part].detach()), rel=1e-4)
        assert result.worked.selected_aux == losses.beside.selected_aux
        assert result.worked.dead == losses.beside.dead == 8 * 12
        for key, tensor in fast.tensors().items():
            assert close(tensor, plain.tensors()[key], 1e-5), key
