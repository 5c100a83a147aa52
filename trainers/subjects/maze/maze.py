"""`maze`: a transformer that solves random mazes of 5x5 cells, whose weights come with saescale; `maze:PATH`: one of
your own, of any size, as a folder of transformers.

Which cells are connected is told to the model one connection at a time, so every label is recomputed from the tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import DynamicCache

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site, Split
from saescale.trainers.device import default_device
from saescale.trainers.subjects.drawn import first_of, parts_of
from saescale.trainers.subjects.maze.labels import LABELS, labels_of_tokens
from saescale.trainers.subjects.maze.mazes import Mazes, mazes_of_split, other_ends
from saescale.trainers.subjects.maze.tokens import (
    ADJLIST_END,
    FIRST_CELL,
    PAD,
    PATH_END,
    SEMICOLON,
    answers,
    longest,
    prompt_length,
    prompts,
    vocabulary,
)
from saescale.trainers.subjects.own_model import (
    OwnModel,
    blank_model,
    gpt2_config,
    lessons_of,
    llama_config,
    load_own,
    read_folder,
)
from saescale.trainers.subjects.subject import NO_BRANCH, NO_TARGET, Lesson, Patch, Sequence

NAMES_A_PATH = True
SHIPPED = "maze-5x5"
LARGEST = 12  # of a lattice whose mazes are worth a model
AT_A_TIME = 128  # mazes in a forward pass


class Settings(BaseModel):
    """What can be chosen of a model that is to be trained."""

    model_config = ConfigDict(extra="forbid")
    grid: int = Field(5, ge=2, le=LARGEST)
    positions: Literal["rotary", "learned"] = "rotary"
    n_layers: int = Field(4, ge=1)
    d_model: int = Field(128, ge=1)
    n_heads: int = Field(4, ge=1)
    paths: int = Field(1, ge=1, le=64)  # that are learned of each maze, which is read once for all of them


class Maze(OwnModel):
    """A model of random mazes of `size` x `size` cells. Its sequences are a list of connections, origin, target and the
    path without <PATH_END>; their rows are where a connection is known: its second cell, and the `;` behind it."""

    labels: tuple[str, ...] = LABELS

    def __init__(self, name: str, model: Any, fingerprint: str, paths: int = 1) -> None:
        super().__init__(name, model, fingerprint)
        self.paths = paths  # of a maze in a lesson
        self.size = size_of_mazes(name, self.embedded, self.max_positions)

    def sequences(self, split: Split, seed: int) -> Iterator[Sequence]:
        """Random mazes and their paths; what a maze is decides its split."""
        for _, mazes in mazes_of_split(self.size, split, seed):
            tokens = torch.cat([prompts(mazes), answers(mazes)], dim=1).numpy().astype(np.int32)
            for maze, length in zip(tokens, (tokens != PAD).sum(axis=1) - 1, strict=True):
                end = maze[:length] == SEMICOLON
                yield Sequence(maze[:length], keep=end | np.roll(end, -1))

    def label(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """See labels.py. Raises SaescaleError where `ids` are no mazes of this size."""
        return labels_of_tokens(self.size, ids)

    def lessons(self, seed: int, batch: int, first: int) -> Iterator[Lesson]:
        """Training mazes from number `first` on; only paths and their ends are to be predicted. Several of a maze
        (`paths` of Settings) branch behind its list of connections, which takes most of the tokens."""

        def drawn() -> Iterator[tuple[Tensor, ...]]:
            for numbers, mazes in mazes_of_split(self.size, "train", seed, first, self.model.device):
                if self.paths == 1:
                    yield numbers, *_to_learn(mazes)
                    continue
                more = (other_ends(self.size, seed, numbers, mazes, which) for which in range(1, self.paths))
                yield numbers, *_branches([_to_learn(each) for each in (mazes, *more)])

        return lessons_of(drawn(), batch)

    def score(self, sequences: int, seed: int = 0) -> dict[str, float]:
        """On so many held-out mazes: the share that it solves (`solved`: going on with the most likely token gives the
        path from origin to target and its end), the share of the tokens of paths that are most likely given those
        before (`moves`), and their cross-entropy in nats."""
        solved = right = loss = 0.0
        tokens = 0
        for mazes in parts_of(self.heldout_mazes(sequences, seed), AT_A_TIME):
            ids, targets = _to_learn(mazes)
            logits = self.run(ids, [], logits=True).logits
            assert logits is not None, "they were asked for"
            asked = targets != NO_TARGET
            # Where every token is the most likely one behind those before it, a greedy rollout is the path.
            hit = (logits.argmax(dim=2).cpu() == targets) | ~asked
            solved += float(hit.all(dim=1).sum())
            right += float(hit[asked].sum())
            log_p = logits.float().cpu().log_softmax(dim=-1)[asked]
            loss -= float(log_p.gather(1, targets[asked][:, None]).sum())
            tokens += int(asked.sum())
        return {"solved": solved / sequences, "moves": right / tokens, "loss": loss / tokens}

    def rollout(self, prompt: Tensor, patch: Mapping[Site, Patch] | None = None) -> Tensor:
        """What the model goes on with behind `prompt` [mazes, length], always by the most likely token: int64 [mazes,
        cells + 1], PAD behind <PATH_END>. `patch` is of the prompt's streams, as in `run`."""
        cache = DynamicCache()
        tokens = torch.full((len(prompt), self.size**2 + 1), PAD)
        asked = prompt
        ended = torch.zeros(len(prompt), dtype=torch.bool)
        room = self.max_positions or prompt.shape[1] + tokens.shape[1]
        for place in range(min(tokens.shape[1], room - prompt.shape[1] + 1)):
            logits = self.run(asked, [], patch if asked is prompt else None, logits=True, cache=cache).logits
            assert logits is not None, "they were asked for"
            likely = logits[:, -1].argmax(dim=1).cpu()
            tokens[:, place] = likely.masked_fill(ended, PAD)
            ended |= likely == PATH_END
            if ended.all():
                break
            asked = likely[:, None]
        return tokens

    def heldout_mazes(self, number: int, seed: int) -> Mazes:
        """The first held-out mazes of a seed."""
        return first_of(mazes_of_split(self.size, "heldout", seed), number)


def load(rest: str, cache: Path, dtype: str, notify: Callable[[str], None]) -> Maze:
    """The shipped model, or that in the folder `rest`. Raises SaescaleError where there is none that reads mazes."""
    return load_own(Maze, "maze", rest, SHIPPED, read_folder, dtype)


def blank(settings: Settings, seed: int) -> Maze:
    """A model to be trained, with random weights in float32, on the device of this machine."""
    config = llama_config if settings.positions == "rotary" else gpt2_config
    size = settings.grid
    shape = vocabulary(size), longest(size), settings.n_layers, settings.d_model, settings.n_heads
    return Maze("maze", blank_model(config(*shape), seed).to(default_device()), "untrained", settings.paths)


def size_of_mazes(name: str, tokens: int, positions: int | None) -> int:
    """The size of the mazes that a model with that vocabulary reads.

    Raises SaescaleError where there is none, or it cannot read a whole maze.
    """
    sizes = {vocabulary(size): size for size in range(2, LARGEST + 1)}
    if tokens not in sizes:
        known = ", ".join(f"{those} ({size}x{size})" for those, size in sizes.items() if 3 <= size <= 8)
        raise SaescaleError(
            f"{name} has a vocabulary of {tokens} tokens; mazes have {known} and so on: a token for each cell and "
            f"{FIRST_CELL} more"
        )
    size = sizes[tokens]
    if positions is not None and positions < longest(size) - 1:
        raise SaescaleError(
            f"{name} reads at most {positions} tokens, and mazes of {size}x{size} have up to {longest(size) - 1}; it "
            "is of other mazes, or was cut"
        )
    return size


def _to_learn(mazes: Mazes) -> tuple[Tensor, Tensor]:
    """Ids and targets, int64 [mazes, length]; the path and its end are targets."""
    tokens = torch.cat([prompts(mazes), answers(mazes)], dim=1)
    targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == PAD, NO_TARGET)
    targets[:, : prompt_length(mazes.listed.shape[1]) - 1] = NO_TARGET
    return tokens[:, :-1], targets


def _branches(learned: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, targets and branches, int64 [mazes, length], of the same mazes with several ends, from ids and targets of
    each: their lists of connections once, then what follows them, one behind the other without gaps."""
    listed = int((learned[0][0][0] == ADJLIST_END).nonzero()[0]) + 1
    parts = [(ids[:, :listed], targets[:, :listed], torch.zeros_like(ids[:, :listed])) for ids, targets in learned[:1]]
    for number, (ids, targets) in enumerate(learned, 1):
        parts.append((ids[:, listed:], targets[:, listed:], torch.full_like(ids[:, listed:], number)))
    ids, targets, branch = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    idle = (ids == PAD) | (ids == PATH_END)
    order = idle.byte().argsort(dim=1, stable=True)
    ids, targets, branch = (
        each.gather(1, order) for each in (ids.masked_fill(idle, PAD), targets, branch.masked_fill(idle, NO_BRANCH))
    )
    return ids, targets, branch
