"""What training a cell takes, as a device's speed is told (scaling/planning/devices.py)."""

from saescale.scaling.planning.devices import Work, step_work
from saescale.trainers.cell import Cell, traits_of
from saescale.trainers.training.memory import weights_bytes


def work_of_step(cell: Cell) -> Work:
    """Of one step, as `Cell.flops` expects it: as if no latent died."""
    batch = cell.batch_tokens
    flops = float(cell.flops(batch).sparse)
    # An architecture without a fast path multiplies everything by everything.
    sparse = traits_of(cell.architecture).bf16
    pairs = 8.0 * cell.d_model * batch * cell.whole_settings.pairs_per_token(cell.n_latents) if sparse else 0.0
    return step_work(cell.d_model, cell.n_latents, flops, min(pairs, flops), batch, weights_bytes(cell))


def work_of(cell: Cell) -> Work:
    """Of all its steps."""
    return Work(*(cell.steps * each for each in work_of_step(cell)))
