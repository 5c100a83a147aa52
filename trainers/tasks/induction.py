"""Induction: random tokens that are said twice are foreseen the second time (Elhage et al. 2021, Olsson et al. 2022).

A prompt is R R behind the first token of the subject, R 20 random tokens of its vocabulary. The metric is the
cross-entropy of the first R less that of the second, in nats a token, over all tokens of R but the first one, before
which nobody can know that R begins again. In the corrupted prompts the first R is another one.
"""

import numpy as np
import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.subject import Subject
from saescale.trainers.tasks.task import METRIC, Prompts, behind_bos, steerable

unit = "nats a token of the first time less those of the second"

TOKENS, LEAST = 20, 4


def prompts(subject: Subject, number: int, seed: int, tokens: int = TOKENS) -> Prompts:
    """`answers` [prompts, reads]: the token that follows each position that is read, of the first R and the second.
    `tokens` of R, or as many as the vocabulary and the contexts let it have.

    Raises SaescaleError where contexts are too short, or the vocabulary too small.
    """
    vocabulary = _vocabulary(subject)
    most = steerable(subject).max_positions
    repeated = min(tokens, len(vocabulary) // 2, tokens if most is None else (most - 1) // 2)
    if repeated < LEAST:
        raise SaescaleError(
            f"induction repeats {LEAST} tokens at least, drawn from twice as many; {subject.name} has "
            f"{len(vocabulary)} that are no special ones, and contexts of {most}"
        )
    draw = np.random.default_rng(seed)
    once, other = (np.stack([draw.permutation(vocabulary)[:repeated] for _ in range(number)]) for _ in range(2))
    ids, lengths = behind_bos(subject, np.concatenate([once, once], axis=1).tolist())
    corrupt, _ = behind_bos(subject, np.concatenate([other, once], axis=1).tolist())
    begin = ids.shape[1] - 2 * repeated
    reads = torch.cat([torch.arange(repeated - 1), torch.arange(repeated, 2 * repeated - 1)]) + begin
    return Prompts(ids, corrupt, lengths, reads.expand(number, -1), ids[:, reads + 1], {}, {})


def score(prompts: Prompts, logits: Tensor) -> dict[str, Tensor]:
    """The gain, and the two cross-entropies."""
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), prompts.answers.to(logits.device).flatten(), reduction="none"
    )
    first, second = losses.view(len(logits), 2, -1).mean(dim=2).unbind(dim=1)
    return {METRIC: first - second, "first": first, "second": second}


def _vocabulary(subject: Subject) -> np.ndarray:
    """The tokens that are drawn from: all that have an embedding, but special ones and, of a tokenizer, tokens of which
    its vocabulary has no name."""
    tokenizer = getattr(subject, "tokenizer", None)
    special = {getattr(subject, "bos_token_id", None), getattr(subject, "eos_token_id", None)}
    known = steerable(subject).embedded
    if tokenizer is not None:
        special |= {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        known = min(known, len(tokenizer))
    elif not hasattr(subject, "bos_token_id"):
        raise SaescaleError(f"induction repeats random tokens, which are no sequence of {subject.name}")
    return np.setdiff1d(np.arange(known), [each for each in special if each is not None])
