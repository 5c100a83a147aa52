"""Sentences that begin with a singular or plural subject, up to where its verb is to come.

    The aunts near the car       The aunt that the boys

| task | true where |
|---|---|
| `plural_subject` | the first noun, with which the verb has to agree, is plural |
| `plural_last` | the last noun is plural, at which the sentence ends; as often as not, whatever the first one is |

The words are those of the sets for subject-verb agreement of Marks et al. 2024 (2403.19647; MIT licence, copyright (c)
2024 saprmarks), the sentences their combinations.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saescale.storage.manifest import Site
from saescale.trainers.evals.intervals import SEED
from saescale.trainers.harvest.make_shard import prefix_of
from saescale.trainers.subjects.subject import ReadsText, Subject

_PEOPLE = [
    "athlete", "aunt", "boy", "carpenter", "doctor", "farmer", "father", "friend", "girl", "guy", "kid", "lawyer",
    "man", "mother", "poet", "singer", "teacher", "uncle", "victim", "woman",
]  # fmt: skip
_THINGS = ["bike", "car", "cat", "chair", "desk", "dog", "table", "tree", "truck", "window"]
_PLURALS = {"man": "men", "woman": "women"}
_BETWEEN = {"near the": _THINGS, "behind the": _THINGS, "beside the": _THINGS, "that the": _PEOPLE}
_AT_A_TIME = 128


class Sentences(NamedTuple):
    texts: list[str]
    noun: np.ndarray  # int64 [sentences]: which noun the subject is, in either number
    tasks: dict[str, np.ndarray]  # where each is true, bool [sentences]


def sentences() -> Sentences:
    """320, always the same ones: each subject with every phrase, and behind that a noun of either number."""
    draw = np.random.default_rng(SEED)
    texts, nouns, first, last = [], [], [], []
    for number, noun in enumerate(_PEOPLE):
        for plural in (False, True):
            for between, others in _BETWEEN.items():
                for other_plural in (False, True):
                    other = str(draw.choice([word for word in others if word != noun]))
                    texts.append(f"The {_in(noun, plural)} {between} {_in(other, other_plural)}")
                    nouns.append(number)
                    first.append(plural)
                    last.append(other_plural)
    return Sentences(texts, np.array(nouns), {"plural_subject": np.array(first), "plural_last": np.array(last)})


def _in(noun: str, plural: bool) -> str:
    return _PLURALS.get(noun, f"{noun}s") if plural else noun


def last_activations(subject: Subject, site: Site, texts: list[str]) -> Tensor:
    """Raw activations at each text's last token, float32 [texts, d_model], on the CPU."""
    assert isinstance(subject, ReadsText)
    prefix = np.array(prefix_of(subject)[0], np.int32)
    ids = [np.concatenate([prefix, tokens]) for tokens in subject.tokenize(texts)]
    lengths = np.array([len(tokens) for tokens in ids])
    found = torch.empty(len(texts), subject.d_model)
    for length in np.unique(lengths):
        for some in torch.from_numpy(np.flatnonzero(lengths == length)).split(_AT_A_TIME):
            batch = torch.from_numpy(np.stack([ids[i] for i in some.tolist()]))
            found[some] = subject.run(batch, [site]).resid[0][:, -1].float().cpu()
    return found
