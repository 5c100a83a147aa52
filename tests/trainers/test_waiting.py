"""How often the host waits for the device: each wait is an operation, which can be counted on any device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from saescale.storage.store import ActivationStore
from saescale.trainers.architectures import auxk as auxk_path
from saescale.trainers.architectures.architecture import Batch
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.evals import nmse
from saescale.trainers.evals.nmse import HeldOut
from saescale.trainers.kernels import choose
from saescale.trainers.preprocess import Centre
from saescale.trainers.training.pack import Pack, RawBatch
from tests.trainers.implementations import NAMES, TRITON, implementation
from tests.trainers.synthetic import D_MODEL, sparse_rows, write_store
from tests.trainers.topk_case import random_sae

MakeCell = Callable[..., Cell]

# Their result, or its shape, is known on the device only. On a CPU the first do not reach the dispatcher.
ASKED = (Tensor.tolist, Tensor.numpy, Tensor.cpu)
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount",
    "repeat_interleave",
}  # fmt: skip
KERNELS = ("_maxima", "_largest_groups", "_largest_entries", "_decode", "_latent_sums", "_piece_sums", "_update")


class Waits:
    """Counts while it is entered, less what happens within `not_counted`."""

    def __init__(self) -> None:
        self.count, self.paused = 0, False

    def add(self) -> None:
        self.count += not self.paused

    def __enter__(self) -> "Waits":
        outer = self

        class Asked(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if function in ASKED:
                    outer.add()
                return function(*args, **(kwargs or {}))

        class Dispatched(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = function.overloadpacket.__name__
                masked = name.startswith("index") and any(
                    isinstance(t, Tensor) and t.dtype == torch.bool
                    for given in args[1:2] if isinstance(given, list | tuple) for t in given
                )  # fmt: skip
                if name in WAITING or masked:
                    outer.add()
                return function(*args, **(kwargs or {}))

        self._modes = Asked(), Dispatched()
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        yield
        self.paused = before


class Launched:
    """An interpreted kernel, which reads its arguments where a compiled one would be queued."""

    def __init__(self, kernel: Any, waits: Waits) -> None:
        self.kernel, self.waits = kernel, waits

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            with self.waits.not_counted():
                self.kernel[grid](*args, **options)

        return launch


def test_every_kind_of_wait_is_counted() -> None:
    values = torch.rand(4)
    for wait in (
        lambda: float(values[0]), lambda: int(values[0]), lambda: bool(values[0]), lambda: values[0].item(),
        lambda: values.tolist(), lambda: values.nonzero(), lambda: values[values > 0], values.cpu, values.numpy,
    ):  # fmt: skip
        with Waits() as waits:
            wait()
        assert waits.count > 0
    with Waits() as waits:
        values[torch.tensor([1, 2])] * values.sum()
    assert waits.count == 0


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("auxk", ["off", "no latent dead", "few dead", "many dead"])
def test_a_step_waits_for_the_device_once(
    name: str, auxk: str, make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, device = implementation(name)
    monkeypatch.setattr(choose, "kernels", lambda device: kernels)
    monkeypatch.setattr(auxk_path, "FEW_DEAD", 1 if auxk == "many dead" else 8)
    waits = Waits()
    if name == TRITON:
        for own in KERNELS:
            monkeypatch.setattr(kernels, own, Launched(getattr(kernels, own), waits))
    cell = make_cell(
        n_latents=40, k=3, multi_topk=True, k_aux=0 if auxk == "off" else 4, batch_tokens=16, tokens=64,
        dead_after_tokens=100,
    )  # fmt: skip
    pack = Pack([cell], Centre(torch.zeros(D_MODEL), 1.0), device)
    training = pack.training_cells[0]
    if auxk in ("few dead", "many dead"):
        training.dead.tokens_since[:16] = 1_000
        training.sae.params["b_enc"][:16] -= 5
    raw = torch.from_numpy(sparse_rows(16, 0)).to(device)
    with waits:
        pack.training_step(RawBatch(raw), 0)
    assert training.error is None
    assert training.step == 1
    assert bool(training.worked.dead) == ("dead" in auxk and auxk != "no latent dead")
    assert waits.count <= 1


@pytest.mark.parametrize("kept", [True, False])
def test_an_evaluation_makes_each_sae_once_and_waits_once(
    kept: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, _ = implementation("eager")
    monkeypatch.setattr(choose, "kernels", lambda device: kernels)
    monkeypatch.setattr(nmse, "CHUNK_ROWS", 512)
    monkeypatch.setattr(nmse, "KEPT_BYTES", 10**9 if kept else 0)
    store = ActivationStore.open(write_store(str(tmp_path / "store"), sparse_rows(256, 0), sparse_rows(1_300, 1)))
    held_out, origin, made = HeldOut(store, 1_200), torch.full((D_MODEL,), 0.01), []
    saes = [random_sae(D_MODEL, n, 3, seed=n) for n in (20, 40, 60)]

    def once(sae: SAE) -> Callable[[], SAE]:
        return lambda: (made.append(sae.shape.n_latents), sae)[1]

    with Waits() as waits:
        found = held_out.evaluate([once(sae) for sae in saes], origin)
    assert made == [20, 40, 60]
    assert waits.count == 1

    # The same bits as chunk by chunk, each waited for.
    raw = torch.from_numpy(store.heldout(1_200).act)
    for sae, quality in zip(saes, found, strict=True):
        results = [sae.reconstruct(Batch.of(nmse.normalise(chunk), origin, False)) for chunk in raw.split(512)]
        assert quality.nmse == sum(float(result.squared) for result in results) / held_out._variation()
        assert quality.l0 == sum(int(result.active) for result in results) / 1_200
