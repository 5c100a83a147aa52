"""`attention-only:PATH`: a small model of nothing but attention, which reads random tokens that repeat; it learns
induction while it is watched (Elhage et al. 2021, Olsson et al. 2022).

A sequence is a first token and R R R ... up to its end, where R is 8 to 24 random tokens: how far back the last copy of
a token stands has to be found, and only a head that reads what an earlier one wrote finds it. One layer cannot do
that (Elhage et al. 2021). The model is GPT-2 of transformers with one hidden unit in each MLP, which does not learn
and whose bias keeps it shut: what the MLPs add is exactly nothing.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import GPT2LMHeadModel

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Split
from saescale.trainers.device import default_device
from saescale.trainers.subjects.drawn import Drawn, draw_split, first_of, parts_of
from saescale.trainers.subjects.hashed import hashed, positive
from saescale.trainers.subjects.language_model import compute_dtype
from saescale.trainers.subjects.own_model import blank_model, frozen, gpt2_config, lessons_of, read_folder
from saescale.trainers.subjects.subject import Lesson, Sequence
from saescale.trainers.subjects.transformer import Transformer

NAMES_A_PATH = True
FIRST = 0  # the token before all others
LENGTH = 64
SHORTEST, LONGEST = 8, 24  # R
SHUT = -30.0  # of which GELU makes 0, whatever a normed stream adds to it
AT_A_TIME = {"cpu": 1_024}


class Settings(BaseModel):
    """What can be chosen of a model that is to be trained."""

    model_config = ConfigDict(extra="forbid")
    tokens: int = Field(64, ge=16)
    n_layers: int = Field(2, ge=1)
    d_model: int = Field(64, ge=1)
    n_heads: int = Field(4, ge=1)


class AttentionOnly(Transformer):
    """Its ids are random tokens from 1 on, behind 0."""

    bos_token_id = FIRST

    def sequences(self, split: Split, seed: int) -> Iterator[Sequence]:
        """All positions but the first are rows."""
        for _, lines in lines_of_split(self.embedded, split, seed):
            for line in lines.ids.numpy().astype(np.int32):
                yield Sequence(line, keep=np.arange(len(line)) > 0)

    def lessons(self, seed: int, batch: int, first: int) -> Iterator[Lesson]:
        """Each token is the target of the one before it."""
        device = self.model.device
        drawn = (
            (numbers, lines.ids[:, :-1].to(device), lines.ids[:, 1:].to(device))
            for numbers, lines in lines_of_split(self.embedded, "train", seed, first)
        )
        return lessons_of(drawn, batch)

    def score(self, sequences: int, seed: int = 0) -> dict[str, float]:
        """On held-out sequences: the cross-entropy of the first R and of the second, in nats a token, and the highest
        attention of a head from tokens of the second R to the one behind the same token in the first (`induction`), and
        from any token to the one before it (`previous_token`)."""
        lines = first_of(lines_of_split(self.embedded, "heldout", seed), sequences)
        totals = dict.fromkeys(("first", "second"), 0.0)
        tokens = dict.fromkeys(totals, 0)
        ahead = before = torch.zeros(())
        for ids, repeated in parts_of(lines, 64):
            logits = self.run(ids, [], logits=True).logits
            assert logits is not None, "they were asked for"
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().cpu().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            ).view(len(ids), -1)
            at = torch.arange(LENGTH - 1)  # the token before the one that is foreseen
            # The first token of the second R tells that R begins again; nobody can foresee it.
            second = (at > repeated[:, None]) & (at < 2 * repeated[:, None])
            for name, within in (("first", at < repeated[:, None]), ("second", second)):
                totals[name] += float(losses[within].sum())
                tokens[name] += int(within.sum())
            attention = self.attention(ids).cpu()
            row, here = second.nonzero(as_tuple=True)
            ahead = ahead + attention[:, row, :, here, here - repeated[row] + 1].sum(dim=0)
            before = before + attention[..., at[1:], at[:-1]].mean(dim=-1).sum(dim=1)
        return {name: totals[name] / tokens[name] for name in totals} | {
            "induction": float(ahead.max()) / tokens["second"],
            "previous_token": float(before.max()) / sequences,
        }


def load(rest: str, cache: Path, dtype: str, notify: Callable[[str], None]) -> AttentionOnly:
    """The model at the path `rest`. Raises SaescaleError where there is none."""
    if not rest:
        raise SaescaleError(
            "attention-only comes without weights: saescale subject train attention-only --out subjects/mine, and then "
            "attention-only:subjects/mine"
        )
    device, name = default_device(), f"attention-only:{rest}"
    model, fingerprint = read_folder(name, Path(rest).expanduser(), compute_dtype(dtype, device))
    if not isinstance(model, GPT2LMHeadModel) or model.config.n_inner != 1:
        raise SaescaleError(f"{name} is no model of attention alone; saescale subject train attention-only makes one")
    if model.config.n_positions < LENGTH:
        raise SaescaleError(
            f"{name} reads contexts of {model.config.n_positions}, and sequences of attention-only have {LENGTH}"
        )
    moved: Any = model
    return AttentionOnly(name, frozen(moved.to(device)), fingerprint)


def blank(settings: Settings, seed: int) -> AttentionOnly:
    """A model to be trained, with random weights in float32. Raises SaescaleError where the heads do not share d_model
    evenly."""
    shape = settings.n_layers, settings.d_model, settings.n_heads
    # With the 0.02 of GPT-2, which is wider, attention stays flat: tokens are then told by how long ago they were said.
    model = blank_model(gpt2_config(settings.tokens, LENGTH, *shape, d_mlp=1, spread=settings.d_model**-0.5), seed)
    for block in model.transformer.h:
        block.mlp.requires_grad_(False)
        block.mlp.c_fc.bias.data.fill_(SHUT)
    return AttentionOnly("attention-only", model.to(default_device()), "untrained")


class Lines(NamedTuple):
    """Sequences, int64 [sequences, LENGTH], and how many tokens R has in each, [sequences]."""

    ids: Tensor
    repeated: Tensor


def repeats(vocabulary: int, seed: int, numbers: Tensor) -> Lines:
    """The sequences of these numbers."""
    key = hashed(torch.full_like(numbers, seed), numbers)
    repeated = SHORTEST + positive(hashed(key, torch.tensor(LONGEST))) % (LONGEST + 1 - SHORTEST)
    drawn = 1 + positive(hashed(key[:, None], torch.arange(LONGEST))) % (vocabulary - 1)
    tokens = drawn.gather(1, torch.arange(LENGTH - 1) % repeated[:, None])
    return Lines(torch.cat([torch.full((len(numbers), 1), FIRST), tokens], dim=1), repeated)


def lines_of_split(vocabulary: int, split: Split, seed: int, first: int = 0) -> Iterator[Drawn[Lines]]:
    """Without end. The first 8 tokens, which R has whatever its length, decide."""
    draw = partial(repeats, vocabulary, seed)
    return draw_split(draw, lambda lines: lines.ids[:, 1 : 1 + SHORTEST], split, first, "cpu", AT_A_TIME)
