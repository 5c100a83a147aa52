"""Trains a subject whose truth is known, from sequences that it makes itself, to a folder that it is loaded from.

    OUT/config.json, model.safetensors   the model as transformers saves it
    OUT/training.json                    what it was trained with, its scores on the way and at the end
    OUT/curve.csv                        the scores on the way: step, sequences, train_loss, and what it is scored by
    OUT/checkpoints/                     until it is done: from there the same command goes on, with the same bits

AdamW with a warm-up of 2 % and a cosine to 0. In a notebook or a script:

    from saescale.trainers.subjects.train import TrainingSpec, train_subject
    train_subject(TrainingSpec(subject="othello", out="subjects/mine", sequences=20_000))
"""

import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from saescale.storage import files
from saescale.storage.documents import read_json
from saescale.storage.errors import SaescaleError
from saescale.storage.mistakes import problems
from saescale.storage.writable import require_writable
from saescale.trainers.subjects.language_model import quiet_transformers
from saescale.trainers.subjects.subject import (
    NO_TARGET,
    SUBJECTS,
    Learns,
    Lesson,
    check_subject_name,
    get_subject,
    subject_names,
)

Progress = Callable[[int, int, float, str], None]  # sequences done, in all, sequences/s (0: not yet), how it does

M = TypeVar("M", bound=BaseModel)

TRAINING, CURVE, CHECKPOINTS = "training.json", "curve.csv", "checkpoints"
WARM_UP = 0.02
CHECKS = 20  # scores on the way, of CHECK_SEQUENCES each
CHECK_SEQUENCES, FINAL_SEQUENCES = 100, 2_000
CHECKPOINT_EVERY = timedelta(seconds=30)


class TrainingSpec(BaseModel):
    """What to train and how. All but `out` and `dtype` (of the weights that are written) decide the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    subject: str
    out: str
    settings: dict[str, Any] = {}
    sequences: int = Field(131_072, ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    seed: int = Field(0, ge=0, lt=2**63)
    start: str | None = None  # the folder of a trained one, with whose weights this begins instead of random ones
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @property
    def steps(self) -> int:
        return math.ceil(self.sequences / self.batch)


def trainable_names() -> tuple[str, ...]:
    """The subjects that can be trained."""
    return tuple(name for name in subject_names() if SUBJECTS.defines(name, "blank"))


def train_subject(spec: TrainingSpec, progress: Progress | None = None) -> dict[str, Any]:
    """Trains the subject, or goes on where a killed training stopped; what training.json says. A finished one is
    returned at once.

    Raises SaescaleError for a subject that cannot be trained, settings that it does not have, a folder that holds
    another training, is no local one or cannot be written to, and where the loss is no number any more.
    """
    out = _folder(spec.out)
    record, subject = _begin(spec)
    if (found := _there(out, record)) is not None and "score" in found:
        return found
    require_writable(str(out))
    files.write_atomic(str(out / TRAINING), _text(record))
    pupil = _Pupil(subject, spec, progress or (lambda done, total, rate, words: None))
    last = out / CHECKPOINTS / "last.ckpt"
    trainer = _trainer(spec, out / CHECKPOINTS, subject.model.device)  # Lightning takes the pupil's for the CPU
    try:
        trainer.fit(pupil, pupil.data(), ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    except SystemExit as end:  # how Lightning ends when it is interrupted
        raise KeyboardInterrupt from end
    pupil.say(f"scoring on {FINAL_SEQUENCES:,} held-out sequences")
    with quiet_transformers():
        pupil.subject.model.to(getattr(torch, spec.dtype)).save_pretrained(out)
    # As whoever loads it will have it.
    trained = get_subject(f"{spec.subject}:{out}", dtype="float32")
    assert isinstance(trained, Learns), "what can be trained is one"
    record |= {
        "score": trained.score(FINAL_SEQUENCES),
        "curve": pupil.curve,
        "fingerprint": trained.fingerprint,
        "made_with": {name: version(name) for name in ("saescale", "torch", "transformers")},
    }
    files.write_atomic(str(out / TRAINING), _text(record))
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return record


def _folder(out: str) -> Path:
    path = files.local_path(out)
    if path is None:
        raise SaescaleError(f"--out is {out}; a subject is trained in a folder of this machine, and copied then")
    return Path(path)


def _begin(spec: TrainingSpec) -> tuple[dict[str, Any], Any]:
    """What training.json says from the beginning, and the subject with its first weights."""
    check_subject_name(spec.subject)
    if spec.subject not in trainable_names():
        raise SaescaleError(f"{spec.subject} cannot be trained; {', '.join(trainable_names())} can")
    file = SUBJECTS.load(spec.subject)
    settings = checked(file.Settings, spec.settings, f"settings of {spec.subject}")
    training = spec.model_dump(mode="json", exclude={"subject", "out", "settings", "start"})
    record = {"subject": spec.subject, "settings": settings.model_dump(mode="json"), **training}
    subject = file.blank(settings, spec.seed)
    if spec.start is not None:
        record["start"] = _take_weights(subject, spec.subject, spec.start)
    return record, subject


def _take_weights(subject: Any, name: str, folder: str) -> str:
    """Gives the subject the weights of the one in the folder; what identifies them."""
    found: Any = get_subject(f"{name}:{folder}", dtype="float32")
    try:
        subject.model.load_state_dict(found.model.state_dict())
    except RuntimeError as error:
        raise SaescaleError(
            f"--start {folder} has another shape than the {name} that is asked for; give the --set of its training"
        ) from error
    return str(found.fingerprint)


def checked(model: type[M], values: dict[str, Any], what: str) -> M:
    """The model of these values. Raises SaescaleError with the nearest name for one that it does not have, and for
    values that it does not take."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SaescaleError(f"{what}: {'; '.join(problems(error, model, what))}") from error


def _there(out: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """What training.json of the folder says, None without one. Raises SaescaleError where it is another training."""
    where = str(out / TRAINING)
    try:
        found = read_json(where, f"remove {out} or train elsewhere")
    except FileNotFoundError:
        if others := [name for name in files.list_names(str(out)) if not name.startswith(".")]:
            raise SaescaleError(
                f"{out} holds other files ({others[0]}) and no {TRAINING}; train into an empty folder"
            ) from None
        return None
    differing = [
        f"{key} is {found.get(key)!r} there, {record.get(key)!r} here"
        for key in dict.fromkeys([*record, "start"])
        if found.get(key) != record.get(key)
    ]
    if differing:
        raise SaescaleError(
            f"{out} holds another training: {'; '.join(differing)}. Train into another folder, or remove this one"
        )
    return found


def _text(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


def write_curve(spec: TrainingSpec, curve: list[dict[str, float]]) -> None:
    """The scores on the way as a table, beside what they are of."""
    lines = [",".join(("step", *curve[0]))]
    lines += [",".join(map(repr, (int(point["sequences"]) // spec.batch, *point.values()))) for point in curve]
    files.write_atomic(str(_folder(spec.out) / CURVE), ("\n".join(lines) + "\n").encode())


def _trainer(spec: TrainingSpec, checkpoints: Path, device: torch.device) -> L.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for text in ("does not have many workers", "Checkpoint directory", "LeafSpec", "callbacks used to create"):
        warnings.filterwarnings("ignore", message=f".*{text}.*")
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_steps=spec.steps,
        callbacks=[
            ModelCheckpoint(
                checkpoints, filename="last", train_time_interval=CHECKPOINT_EVERY, save_top_k=1,
                enable_version_counter=False, save_on_train_epoch_end=True,
            )
        ],
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


class _Lessons(IterableDataset[Lesson]):
    """The lessons from the one on that comes next."""

    def __init__(self, pupil: "_Pupil") -> None:
        self._pupil = pupil

    def __iter__(self) -> Iterator[Lesson]:
        spec = self._pupil.spec
        return self._pupil.subject.lessons(spec.seed, spec.batch, self._pupil.next)


class _Pupil(L.LightningModule):
    """The subject as Lightning trains it; `next` is the number of the sequence that comes next."""

    def __init__(self, subject: Any, spec: TrainingSpec, progress: Progress) -> None:
        super().__init__()
        self.subject, self.spec, self._progress = subject, spec, progress
        self.model = subject.model.train()
        self.next = 0
        self.curve: list[dict[str, float]] = []
        self._loss = torch.tensor(math.nan)  # of the last step
        self._began: tuple[float, int] | None = None  # when, and after how many steps
        self._how = ""

    def data(self) -> DataLoader[Lesson]:
        return DataLoader(_Lessons(self), batch_size=None)

    def training_step(self, lesson: Lesson, number: int) -> Tensor:
        logits = self.model(**lesson.inputs()).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), lesson.targets.flatten(), ignore_index=NO_TARGET)
        self.next, self._loss = int(lesson.next), loss.detach()
        return loss

    def on_train_batch_end(self, outputs: Any, lesson: Lesson, number: int) -> None:
        self._look()
        done = self.global_step
        if self._began is None:  # the first step warms up and is not timed
            self._began = time.monotonic(), done
            return
        rate = (done - self._began[1]) * self.spec.batch / (time.monotonic() - self._began[0])
        words = self._how or f"loss {float(self._loss):.3f}"
        self._progress(min(done * self.spec.batch, self.spec.sequences), self.spec.sequences, rate, words)

    def _look(self) -> None:
        """The point of the curve that is due after this step, once. Raises SaescaleError where training diverged."""
        done, steps = self.global_step, self.spec.steps
        sequences = done * self.spec.batch
        due = done * CHECKS // steps > (done - 1) * CHECKS // steps
        if not due or (self.curve and self.curve[-1]["sequences"] == sequences):
            return
        loss = float(self._loss)
        if not math.isfinite(loss):
            raise SaescaleError(
                f"training diverged: after {sequences:,} sequences the loss is {loss}; train with a lower --lr than "
                f"{self.spec.lr:g} into another folder"
            )
        self.model.eval()
        score = self.subject.score(CHECK_SEQUENCES)
        self.model.train()
        self.curve.append({"sequences": sequences, "train_loss": loss, **score})
        write_curve(self.spec, self.curve)
        self._how = ", ".join(f"{name} {value:.3f}" for name, value in score.items())

    def say(self, stage: str) -> None:
        """What is being done now."""
        self._progress(self.spec.sequences, self.spec.sequences, 0.0, stage)

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=self.spec.lr, betas=(0.9, 0.95), weight_decay=self.spec.weight_decay
        )
        warm = max(1, round(WARM_UP * self.spec.steps))

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.spec.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._look()  # Lightning saves before `on_train_batch_end` has its turn
        checkpoint["saescale"] = {"next": self.next, "curve": self.curve}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.next, self.curve = checkpoint["saescale"]["next"], checkpoint["saescale"]["curve"]
