"""`othello`: a transformer that reads random games of Othello on 6x6, whose weights come with saescale; `othello:PATH`:
one of your own, or a published one on 8x8, as a folder of transformers or a file of TransformerLens.

What such a model reads is known to the last disc: every label is recomputed from the moves.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from saescale.storage.manifest import Split
from saescale.trainers.device import default_device
from saescale.trainers.subjects.drawn import first_of
from saescale.trainers.subjects.othello.board import spread
from saescale.trainers.subjects.othello.games import PAD, games_of_split, squares_of_tokens
from saescale.trainers.subjects.othello.labels import LABELS, labels_of_tokens, replay
from saescale.trainers.subjects.othello.weights import board_config, read_checkpoint, size_of_board
from saescale.trainers.subjects.own_model import OwnModel, blank_model, lessons_of, load_own
from saescale.trainers.subjects.subject import NO_TARGET, Lesson, Sequence

NAMES_A_PATH = True
SHIPPED = "othello-6x6"
AT_A_TIME = 256  # games in a forward pass
FIRST_MOVE = 4  # before it the board says nearly nothing (Du et al. 2025)


class Settings(BaseModel):
    """What can be chosen of a model that is to be trained."""

    model_config = ConfigDict(extra="forbid")
    board: Literal[4, 6, 8] = 6
    n_layers: int = Field(4, ge=1)
    d_model: int = Field(128, ge=1)
    n_heads: int = Field(4, ge=1)


class Othello(OwnModel):
    """A model of random games on a board of `size`. Its sequences are games without their last move, of which the
    first four positions are no rows; ids are squares in their order, without the four in the middle, from 1 on."""

    labels = LABELS

    def __init__(self, name: str, model: Any, fingerprint: str) -> None:
        super().__init__(name, model, fingerprint)
        self.size = size_of_board(name, model)

    def sequences(self, split: Split, seed: int) -> Iterator[Sequence]:
        """Random legal games without their last move; what a game is decides its split."""
        for _, games in games_of_split(self.size, split, seed):
            for game in games.tokens[:, :-1].numpy().astype(np.int32):
                ids = game[game != PAD]
                yield Sequence(ids, keep=np.arange(len(ids)) >= FIRST_MOVE)

    def label(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """See labels.py. Raises SaescaleError where `ids` are no games on this board."""
        return labels_of_tokens(self.size, ids)

    def lessons(self, seed: int, batch: int, first: int) -> Iterator[Lesson]:
        """Training games from number `first` on, whole: a move is the target of the one before it."""

        def drawn() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for numbers, games in games_of_split(self.size, "train", seed, first, self.model.device):
                targets = games.tokens[:, 1:]
                yield numbers, games.tokens[:, :-1], targets.masked_fill(targets == PAD, NO_TARGET)

        return lessons_of(drawn(), batch)

    def score(self, sequences: int, seed: int = 0) -> dict[str, float]:
        """On so many held-out games, over all positions behind which the game goes on: the share of most likely moves
        that are legal (`legal`: 1 less the error rate of Li et al. 2023), the probability on legal moves, the
        cross-entropy in nats, and the least that there is, of a uniform choice among legal moves."""
        totals, positions = dict.fromkeys(("legal", "legal_mass", "loss", "least_loss"), 0.0), 0
        of_tokens = torch.from_numpy(squares_of_tokens(self.size)[1:])
        for games in first_of(games_of_split(self.size, "heldout", seed), sequences).tokens.split(AT_A_TIME):
            ids, targets = games[:, :-1], games[:, 1:]
            logits = self.run(ids, [], logits=True).logits
            assert logits is not None, "they were asked for"
            goes_on = targets != PAD
            squares = spread(self.size, replay(self.size, ids).after.legal)[goes_on]
            legal = torch.nn.functional.pad(squares[:, of_tokens], (1, 0))  # by token, of which PAD is none
            log_p = logits.float().cpu().log_softmax(dim=-1)[goes_on]
            totals["legal"] += float(legal.gather(1, log_p.argmax(dim=1, keepdim=True)).sum())
            totals["legal_mass"] += float((log_p.exp() * legal).sum())
            totals["loss"] -= float(log_p.gather(1, targets[goes_on][:, None]).sum())
            totals["least_loss"] += float(legal.sum(dim=1).double().log().sum())
            positions += int(goes_on.sum())
        return {name: total / positions for name, total in totals.items()}


def load(rest: str, cache: Path, dtype: str, notify: Callable[[str], None]) -> Othello:
    """The shipped model, or that at the path `rest`. Raises SaescaleError where there is none that reads games."""
    return load_own(Othello, "othello", rest, SHIPPED, read_checkpoint, dtype)


def blank(settings: Settings, seed: int) -> Othello:
    """A model to be trained, with random weights in float32, on the device of this machine."""
    config = board_config(settings.board, settings.n_layers, settings.d_model, settings.n_heads)
    return Othello("othello", blank_model(config, seed).to(default_device()), "untrained")
