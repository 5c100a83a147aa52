"""One cell while it trains."""

import time
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch

from saescale.scaling.compute import Flops, forward_flops
from saescale.storage.columns import CurveRow
from saescale.storage.tensors import Tensors
from saescale.trainers.architectures.architecture import (
    Batch,
    Conditions,
    Parameter,
    Shape,
    Worked,
    find_architecture,
    require_shareable,
)
from saescale.trainers.architectures.dead import DeadLatents
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.device import device_kind
from saescale.trainers.mesh.mesh import ALONE, Mesh
from saescale.trainers.preprocess import Centre
from saescale.trainers.training.controller import Controller
from saescale.trainers.training.optimiser import Adam


class TrainingCell:
    """One cell while it trains: the SAE, its optimiser and dead counters, and what has been measured so far."""

    def __init__(self, cell: Cell, centre: Centre, device: torch.device, mesh: Mesh = ALONE) -> None:
        self.cell, self.variance = cell, centre.variance
        shape, settings = Shape(cell.d_model, cell.n_latents), cell.whole_settings
        # A copy, since an architecture may start a parameter from it, and that is changed in place.
        own = Centre(centre.b_pre.detach().cpu().clone(), centre.variance)
        parameters = _start(cell, shape, settings, own, mesh)
        params = {name: parameter.data.to(device).contiguous() for name, parameter in parameters.items()}
        self.sae = SAE(cell.architecture, shape, settings, params, cell.precision, mesh)
        self.optimiser = Adam(self.sae.params, parameters, cell.lr, cell.ema)
        common = tuple(name for name, parameter in parameters.items() if parameter.common)
        self.common = frozenset(name for name in self.optimiser.tensors() if name.partition(".")[0] in common)
        self.dead = DeadLatents(mesh.here(cell.n_latents), device)
        self.controller = Controller(settings, cell.steps, cell.ema)
        self.device_kind = device_kind(device)
        self.step = 0
        self.wall_s = 0.0  # spent in this cell's own steps; on a GPU, which works on, an estimate
        self.worked = Worked()  # by steps that took the sparse path
        self.worked_dense = Worked()  # by those that were dense
        self.looks = Flops(0, 0)  # of the controller's forward passes with averaged weights
        self.loss = float("nan")  # of its last step
        self.curve: list[CurveRow] = []
        self.levels: list[dict[str, float]] | None = None  # nmse and l0 at each of Settings.levels, when it has ended
        self.error: str | None = None
        self._train_sum, self._train_steps = 0.0, 0
        self._batch: Batch | None = None  # the last one, of an architecture that is calibrated on it

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return self.step * self.cell.batch_tokens

    @property
    def running(self) -> bool:
        """Neither finished nor failed."""
        return self.error is None and self.step < self.cell.steps

    @property
    def flops(self) -> Flops:
        """Of what its steps did so far, each in the way that it took, and of what the controller looked at."""
        shape, settings, count = self.sae.shape, self.sae.settings, self.sae.architecture.flops
        by_pairs, dense = (count(shape, settings, did.read()) for did in (self.worked, self.worked_dense))
        return by_pairs.plus(Flops(dense.dense, dense.dense)).plus(self.looks)

    def train_on(self, batch: Batch) -> None:
        """One step. A loss that is not finite fails the cell, before its weights are touched; of a part that the host
        has not been told yet, which it would have to wait for, the next loss shows it."""
        start = time.perf_counter()
        sae = self.sae
        self._batch = batch if hasattr(sae.architecture, "calibrated") else None
        # Before the step, as what is active in it: of rows that it was just trained on an SAE makes a few percent less.
        averaged = self._averaged_l0(batch)
        progress = self.step / self.cell.steps
        conditions = Conditions(self.variance, self.cell.dead_after_tokens, progress, self.controller.coefficient)
        result = sae.step.measure(
            sae.params, sae.operands, batch, sae.settings, conditions, self.dead, sae.mesh
        )  # fmt: skip
        told = [part for part in result.parts.values() if isinstance(part, float)]
        if not np.isfinite([result.main, *told]).all():
            self.diverge(f"training loss {result.main}")
            return
        updates = self.optimiser.next(sae.settings.rate(progress), sae.settings.gate_rate(progress))
        sae.step.update(sae.params, sae.operands, result.gradient, updates, sae.mesh)
        self.step += 1
        self.controller.after(self.step, result.active, averaged)
        self.loss = result.main
        if result.dense:
            self.worked_dense = self.worked_dense.plus(result.worked)
        else:
            self.worked = self.worked.plus(result.worked)
        self._train_sum += result.main
        self._train_steps += 1
        self.wall_s += time.perf_counter() - start

    def _averaged_l0(self, batch: Batch) -> float | None:
        """Active latents of a token of `batch` with averaged weights, where the controller wants to know."""
        if not self.controller.measures(self.step + 1):
            return None
        found = self.averaged().reconstruct(batch)
        active, tokens = int(found.active), len(batch.x)
        did = forward_flops(*self.sae.shape, tokens=tokens, selected=active)
        self.looks = self.looks.plus(Flops(did.dense, did.dense) if found.dense else did)
        return active / tokens

    def averaged(self) -> SAE:
        """A copy of the SAE with the average of its weights, which is what is evaluated and kept."""
        averaged = self.sae.like(self.optimiser.averaged())
        if self._batch is not None:
            averaged.calibrate(self._batch)
        return averaged

    def diverge(self, what: str) -> None:
        """Takes the cell out of the pack: `what` is not finite."""
        self.fail(f"{what} with lr {self.cell.lr:.3g}: diverged; try a smaller lr")

    def fail(self, why: str) -> None:
        """Takes the cell out of the pack for a reason of its own."""
        self.error = f"at step {self.step + 1}: {why}"

    def record(self, nmse: float, l0: float, tokens_per_s: float) -> CurveRow:
        """Appends one evaluation to the curve."""
        windows = (self.cell.dead_after_tokens, self.cell.dead_after_tokens_long)
        dead, long = self._dead_fractions(windows)
        row = CurveRow(
            step=self.step,
            tokens=self.tokens,
            flops=self.flops.sparse,
            nmse=nmse,
            train_nmse=self._train_sum / max(1, self._train_steps),
            l0=l0,
            dead_fraction=dead,
            dead_fraction_long=long,
            lr=self.cell.lr,
            tokens_per_s=tokens_per_s,
            coefficient=self.controller.coefficient or None,
        )
        self._train_sum, self._train_steps = 0.0, 0
        self.curve.append(row)
        return row

    def _dead_fractions(self, windows: Sequence[int]) -> list[float]:
        mesh, dead = self.sae.mesh, [self.dead.after(window) for window in windows]
        if mesh.alone:
            return [float(fraction) for fraction in torch.stack([each.float().mean() for each in dead]).tolist()]
        counts = mesh.sum_shards(torch.stack([each.sum().double() for each in dead]))
        return [count / self.cell.n_latents for count in counts.tolist()]

    def tensors(self) -> dict[str, np.ndarray]:
        """Everything that a resumed cell needs, as a checkpoint holds it; of a mesh what this shard has."""
        # What all have the first one keeps.
        left_out = self.common if self.sae.mesh.shard else frozenset()
        return {name: tensor.cpu().numpy() for name, tensor in self._named().items() if name not in left_out}

    def _named(self) -> dict[str, torch.Tensor]:
        # With a dot, which the name of a parameter does not have.
        return self.optimiser.tensors() | {"dead.tokens_since": self.dead.tokens_since}

    def state(self) -> dict[str, Any]:
        """The rest of a checkpoint: JSON."""
        return {
            "step": self.step,
            "wall_s": self.wall_s,
            "worked": self.worked.read()._asdict(),
            "worked_dense": self.worked_dense.read()._asdict(),
            "looks": self.looks,
            "train": [self._train_sum, self._train_steps],
            "curve": [row._asdict() for row in self.curve],
            "controller": self.controller.state._asdict(),
        }

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Goes back to where `tensors()` and `state()` were taken, to the last bit; KeyError where one is missing."""
        self.step, self.wall_s = state["step"], state["wall_s"]
        self.worked, self.worked_dense = Worked(**state["worked"]), Worked(**state.get("worked_dense", {}))
        self.looks = Flops(*state.get("looks", (0, 0)))
        self._train_sum, self._train_steps = state["train"]
        self.curve = [CurveRow(**row) for row in state["curve"]]
        self.controller.restore(state.get("controller", {}))
        mine = _Share(tensors, self.sae.mesh, self.cell.n_latents, self.common)
        self.dead.tokens_since.copy_(torch.from_numpy(mine["dead.tokens_since"]))
        self.optimiser.restore(mine, self.step)
        self.sae.round()


def _start(cell: Cell, shape: Shape, settings: Any, centre: Centre, mesh: Mesh) -> dict[str, Parameter]:
    """Where training starts: all of it, or this shard's share."""
    architecture = find_architecture(cell.architecture)
    if mesh.alone:
        return architecture.parameters(shape, settings, centre, cell.seed)
    require_shareable(cell.architecture)
    return architecture.share(shape, settings, centre, cell.seed, mesh)


class _Share(Mapping[str, np.ndarray]):
    """The tensors of a whole cell as a process of its mesh has them: rows of its latents, and all of what is common."""

    def __init__(self, whole: Mapping[str, np.ndarray], mesh: Mesh, n_latents: int, common: Set[str]) -> None:
        self._whole, self._common, self._cut = whole, common, mesh.shards > 1
        self._own = slice(mesh.first, mesh.first + mesh.here(n_latents))

    def __getitem__(self, name: str) -> np.ndarray:
        if not self._cut or name in self._common:
            return self._whole[name]
        return self._whole.rows(name, self._own) if isinstance(self._whole, Tensors) else self._whole[name][self._own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)
