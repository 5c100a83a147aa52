"""One cell while it trains."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from saescale.trainers.architectures.reference import Objective
from saescale.trainers.architectures.topk import SAE
from saescale.trainers.architectures.topk_sparse import Batch, DeadLatents, step
from saescale.trainers.cell import Cell, CurveRow
from saescale.trainers.preprocess import Centre
from saescale.trainers.training.optimiser import SAEAdam


class TrainingCell:
    """One cell while it trains: the SAE, its optimiser and dead counters, and what has been measured so far."""

    def __init__(self, cell: Cell, centre: Centre, device: torch.device) -> None:
        self.cell = cell
        self.sae = SAE(cell.d_model, cell.n_latents, cell.k)
        self.sae.initialise(centre.b_pre.cpu(), cell.seed)
        self.sae.to(device)
        self.optimiser = SAEAdam(self.sae, cell.lr, cell.ema, cell.precision)
        self.dead = DeadLatents(cell.n_latents, device)
        self.objective = Objective(cell.k, centre.variance, cell.k_aux, cell.auxk_coefficient, cell.multi_topk)
        self.step = 0
        self.wall_s = 0.0  # spent in this cell's own steps; on a GPU, which works on, an estimate
        self.curve: list[CurveRow] = []
        self.error: str | None = None
        self._train_sum, self._train_steps = 0.0, 0

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return self.step * self.cell.batch_tokens

    @property
    def running(self) -> bool:
        """Neither finished nor failed."""
        return self.error is None and self.step < self.cell.steps

    def train_on(self, batch: Batch) -> None:
        """One step. A loss that is not finite fails the cell, before its weights are touched."""
        start = time.perf_counter()
        result = step(
            self.sae, self.optimiser.operand, batch, self.objective, self.dead, self.cell.dead_after_tokens
        )  # fmt: skip
        if not np.isfinite([result.main, result.multi, result.auxk]).all():
            self.diverge(f"training loss {result.main}")
            return
        self.optimiser.step(result.gradient)
        self.step += 1
        self._train_sum += result.main
        self._train_steps += 1
        self.wall_s += time.perf_counter() - start

    def diverge(self, what: str) -> None:
        """Takes the cell out of the pack: `what` is not finite."""
        self.fail(f"{what} with lr {self.cell.lr:.3g}: diverged; try a smaller lr")

    def fail(self, why: str) -> None:
        """Takes the cell out of the pack for a reason of its own."""
        self.error = f"at step {self.step + 1}: {why}"

    def record(self, nmse: float, l0: float, tokens_per_s: float) -> CurveRow:
        """Appends one evaluation to the curve."""
        dead = [self.dead.after(window) for window in (self.cell.dead_after_tokens, self.cell.dead_after_tokens_long)]
        row = CurveRow(
            step=self.step,
            tokens=self.tokens,
            flops=self.cell.flops(self.tokens).sparse,
            nmse=nmse,
            train_nmse=self._train_sum / max(1, self._train_steps),
            l0=l0,
            dead_fraction=float(dead[0].float().mean()),
            dead_fraction_long=float(dead[1].float().mean()),
            lr=self.cell.lr,
            tokens_per_s=tokens_per_s,
        )
        self._train_sum, self._train_steps = 0.0, 0
        self.curve.append(row)
        return row

    def tensors(self) -> dict[str, np.ndarray]:
        """Everything that a resumed cell needs, as a checkpoint holds it."""
        named = self.optimiser.tensors() | {"tokens_since_active": self.dead.tokens_since}
        return {name: tensor.cpu().numpy() for name, tensor in named.items()}

    def state(self) -> dict[str, Any]:
        """The rest of a checkpoint: JSON."""
        return {
            "step": self.step,
            "wall_s": self.wall_s,
            "train": [self._train_sum, self._train_steps],
            "curve": [row._asdict() for row in self.curve],
        }

    def restore(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Goes back to where `tensors()` and `state()` were taken, to the last bit; KeyError where one is missing."""
        self.step, self.wall_s = state["step"], state["wall_s"]
        self._train_sum, self._train_steps = state["train"]
        self.curve = [CurveRow(**row) for row in state["curve"]]
        self.dead.tokens_since.copy_(torch.from_numpy(tensors["tokens_since_active"]))
        self.optimiser.restore(tensors, self.step)
