"""Indirect objects: "When Mary and John went to the store, John gave a drink to" goes on to Mary (Wang et al. 2022).

The metric is the logit of the indirect object's name (IO) less that of the subject's (S), which stands there twice.
Half of the prompts name IO first (ABBA), half S (BABA). In the corrupted ones three other names, all different, take
the three places (ABC), so that no name is said twice. Names are those that are one token of the tokenizer at hand.
"""

import numpy as np
import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.subject import Subject
from saescale.trainers.tasks.task import METRIC, Prompts, behind_bos, spelled

unit = "logit of the indirect object less that of the subject"

TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {thing} to",
    "Then {A} and {B} went to the {place}, and {S} gave a {thing} to",
    "While {A} and {B} were at the {place}, {S} handed a {thing} to",
    "After {A} and {B} had met at the {place}, {S} brought a {thing} to",
    "Yesterday {A} and {B} walked to the {place}, where {S} passed a {thing} to",
    "Once {A} and {B} had left the {place}, {S} offered a {thing} to",
)
PLACES = ("store", "park", "school", "station", "office", "garden", "library", "market")
THINGS = ("drink", "book", "letter", "ring", "ticket", "basket", "key", "sandwich")
NAMES = (
    "Mary", "John", "Tom", "James", "Dan", "Martin", "Amy", "Scott", "David", "Peter", "Paul", "Mark", "Anna", "Alice",
    "Sarah", "Kate", "Laura", "Emma", "Jack", "Henry", "George", "Michael", "Robert", "William", "Thomas", "Charles",
    "Daniel", "Andrew", "Kevin", "Brian", "Steven", "Richard", "Jane", "Helen", "Susan", "Lisa", "Karen", "Rachel",
)  # fmt: skip
LEAST_NAMES = 6


def prompts(subject: Subject, number: int, seed: int) -> Prompts:
    """`attributes`: io and s (places in the list of usable names) and order (0: IO first).

    Raises SaescaleError where fewer than 6 names are one token.
    """
    token = _single_tokens(subject)
    draw = np.random.default_rng(seed)
    texts, chosen = [], []
    for _ in range(number):
        io, s, *others = draw.permutation(len(token))[:5].tolist()
        order = int(draw.integers(2))
        names = [list(token)[each] for each in ((io, s) if order == 0 else (s, io))]
        template = TEMPLATES[draw.integers(len(TEMPLATES))]
        place, thing = PLACES[draw.integers(len(PLACES))], THINGS[draw.integers(len(THINGS))]
        texts.append(template.format(A=names[0], B=names[1], S=list(token)[s], place=place, thing=thing))
        chosen.append((io, s, order, *others))
    ids, lengths = behind_bos(subject, spelled(subject, texts))
    of_name = torch.tensor(list(token.values()))
    io, s, order, *others = torch.tensor(chosen).T
    here, twice = ids == of_name[io][:, None], ids == of_name[s][:, None]
    if not (bool((here.sum(dim=1) == 1).all()) and bool((twice.sum(dim=1) == 2).all())):
        raise SaescaleError(f"the tokenizer of {subject.name} does not keep names apart from the words around them")
    at = {
        "io": here.int().argmax(dim=1),
        "s1": twice.int().argmax(dim=1),
        "s2": ids.shape[1] - 1 - twice.flip(1).int().argmax(dim=1),
    }
    corrupt, rows = ids.clone(), torch.arange(number)
    for where, other in zip(at.values(), others, strict=True):
        corrupt[rows, where] = of_name[other]
    answers = torch.stack([of_name[io], of_name[s]], dim=1)
    end = lengths - 1
    return Prompts(ids, corrupt, lengths, end[:, None], answers, at | {"end": end}, {"io": io, "s": s, "order": order})


def score(prompts: Prompts, logits: Tensor) -> dict[str, Tensor]:
    """The difference, the two logits, and whether IO is ahead of S."""
    io, s = logits[:, 0].gather(1, prompts.answers.to(logits.device)).unbind(dim=1)
    return {METRIC: io - s, "io": io, "s": s, "ahead": (io > s).float()}


def _single_tokens(subject: Subject) -> dict[str, int]:
    """The token of each name that is one in the middle of a sentence."""
    without, *whole = spelled(subject, ["Then went", *(f"Then {name} went" for name in NAMES)])
    found: dict[str, int] = {}
    for name, ids in zip(NAMES, whole, strict=True):
        before = next((at for at, pair in enumerate(zip(ids, without, strict=False)) if pair[0] != pair[1]), 0)
        if ids[:before] + ids[before + 1 :] == without and ids[before] not in found.values():
            found[name] = ids[before]
    if len(found) < LEAST_NAMES:
        raise SaescaleError(
            f"ioi needs {LEAST_NAMES} names that are one token each, and the tokenizer of {subject.name} has "
            f"{len(found)} of {len(NAMES)}"
        )
    return found
