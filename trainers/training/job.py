"""What a pack is asked for, apart from what trains it: whoever hands packs out to other processes has no use for
Lightning, whose import takes as long as that of all else together."""

from pydantic import BaseModel, Field

from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.loggers.wandb_settings import WandbSettings


class PackJob(BaseModel):
    """All that a worker needs to train a pack. Cells must share store, batch_tokens and stream_seed."""

    cells: list[Cell] = Field(min_length=1)
    store: str  # URL
    run: str  # URL of the run directory
    sweep: str  # name; W&B group
    eval: EvalSpec = EvalSpec()
    wandb: WandbSettings = WandbSettings(mode="off")
    checkpoint_every_s: float = Field(default=60.0, gt=0)
    threads: int | None = None  # CPU threads; None leaves torch's own setting
    architectures: dict[str, str] = {}  # of the user's own: the text of their files, by name
    axes: tuple[str, ...] = ()  # in what cells of the sweep differ beside architecture, n, k and seed
    driver: str | None = None  # who holds the run (storage/lease.py); None: nobody has to
