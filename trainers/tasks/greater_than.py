"""Greater-than: "The war lasted from the year 1732 to the year 17" is followed by more than 32 (Hanna et al. 2023).

The metric is the probability of all years above the first one's less that of all others. Two digits are one token, or
two: p(y) = p(d1) p(d2 | d1). In that case the tens of the year that is to be exceeded stand behind the prompt, where
the second digit is read: years of other tens are above it or not whatever comes. So one pass gives the exact metric
where only digits follow a digit: d2 is taken among the ten. In the corrupted prompts the first year ends with 01, which
all but 00 and 01 exceed.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.subject import Subject
from saescale.trainers.tasks.task import METRIC, Prompts, behind_bos, spelled

unit = "probability of later years less that of others"

NOUNS = ("war", "siege", "reign", "voyage", "dispute", "famine", "marriage", "strike", "drought", "expedition")
CENTURIES = range(11, 18)
YEARS = range(2, 99)
CORRUPT = 1


class _Years(NamedTuple):
    """How a tokenizer spells years: in `digits` tokens behind the century, all of which are `tokens`; and the centuries
    and years that it spells so."""

    digits: int
    tokens: list[int]  # of 00 to 99, or of 0 to 9
    spelled: list[tuple[int, int]]

    def of(self, year: int) -> list[int]:
        return [self.tokens[year]] if self.digits == 1 else [self.tokens[year // 10], self.tokens[year % 10]]


def prompts(subject: Subject, number: int, seed: int) -> Prompts:
    """`answers` [prompts, 101] or [prompts, 11]: the year that is to be exceeded, and the tokens of years or digits.

    Raises SaescaleError where the tokenizer makes neither of them of years.
    """
    years = _years(subject)
    draw = np.random.default_rng(seed)
    chosen = [years.spelled[each] for each in draw.integers(len(years.spelled), size=number)]
    nouns = [NOUNS[each] for each in draw.integers(len(NOUNS), size=number)]
    before = [f"The {noun} lasted from the year {century}" for noun, (century, _) in zip(nouns, chosen, strict=True)]
    whole = [f"{text}{year:02} to the year {century}" for text, (century, year) in zip(before, chosen, strict=True)]
    lines, corrupt, at = [], [], []
    for head, ids, (_, year) in zip(spelled(subject, before), spelled(subject, whole), chosen, strict=True):
        tail = ids[len(head) + years.digits :] + years.of(year)[:-1]
        lines.append(head + years.of(year) + tail)
        corrupt.append(head + years.of(CORRUPT) + tail)
        at.append(len(head))
    padded, lengths = behind_bos(subject, lines)
    reads = lengths[:, None] - torch.arange(years.digits, 0, -1)
    year = torch.tensor([year for _, year in chosen])
    answers = torch.cat([year[:, None], torch.tensor(years.tokens).expand(number, -1)], dim=1)
    bos = lengths - torch.tensor([len(line) for line in lines])
    places = {"year": torch.tensor(at) + bos + years.digits - 1, "end": reads[:, 0]}
    return Prompts(padded, behind_bos(subject, corrupt)[0], lengths, reads, answers, places, {"year": year})


def score(prompts: Prompts, logits: Tensor) -> dict[str, Tensor]:
    """The difference, and both probabilities."""
    answers = prompts.answers.to(logits.device)
    year, tokens = answers[:, :1], answers[:, 1:]
    first = logits[:, 0].softmax(dim=-1).gather(1, tokens)
    these = torch.arange(tokens.shape[1], device=logits.device)
    if logits.shape[1] == 1:
        above, others = (first * (these > year)).sum(dim=1), (first * (these <= year)).sum(dim=1)
    else:
        second = logits[:, 1].gather(1, tokens).softmax(dim=1)
        same = (first * (these == year // 10)).sum(dim=1)
        above = (first * (these > year // 10)).sum(dim=1) + same * (second * (these > year % 10)).sum(dim=1)
        others = (first * (these < year // 10)).sum(dim=1) + same * (second * (these <= year % 10)).sum(dim=1)
    return {METRIC: above - others, "above": above, "others": others}


def _years(subject: Subject) -> _Years:
    pairs = [(century, year) for century in CENTURIES for year in range(100)]
    alone = dict(zip(CENTURIES, spelled(subject, [f"the year {century}" for century in CENTURIES]), strict=True))
    whole = spelled(subject, [f"the year {century}{year:02}" for century, year in pairs])
    for digits in (1, 2):
        behind = {
            pair: ids[-digits:] for pair, ids in zip(pairs, whole, strict=True) if ids[:-digits] == alone[pair[0]]
        }
        of_year = {year: ids for (_, year), ids in behind.items()}
        if len(of_year) < 100:
            continue
        found = _Years(digits, [of_year[year][-1] for year in range(100 if digits == 1 else 10)], [])
        spelled_so = [pair for pair, ids in behind.items() if ids == found.of(pair[1])]
        if len(set(found.tokens)) == len(found.tokens) and len({year for _, year in spelled_so}) == 100:
            return found._replace(spelled=[pair for pair in spelled_so if pair[1] in YEARS])
    raise SaescaleError(
        f"greater_than needs years whose last two digits, or each of them, are one token, and the tokenizer of "
        f"{subject.name} has neither"
    )
