"""Tasks of text by hand, token by token."""

import re

import numpy as np
import pytest

from saescale.trainers.evals.texts import tasks as module
from saescale.trainers.evals.texts.tasks import text_tasks

# A context and what is true of it: the numbers of tokens.
FIRST = [
    "The", " cats", " played", " (", "in", " A", "BC", ".", "\n", "   ", " it", " is", " 12", ' "', "walk", "ing", '"',
]  # fmt: skip
SECOND = [" The", " cats", " go", "."]
TRUE = {
    "space": {1, 2, 3, 5, 9, 10, 11, 12, 13},
    "newline": {8},
    "capital": {0, 5, 6},
    "capitals": {6},
    "digit": {12},
    "punctuation": {3, 7, 13, 16},
    "bracket": {3},
    "underscore": set(),
    "short": {3, 5, 7, 13, 16},
    "long": {2},
    "vowel": {4, 5, 10, 11, 15},
    "function_word": {0, 4, 5, 10, 11},
    "ends_s": {1},
    "ends_ed": {2},
    "ends_ing": set(),  # `ing` alone is no word
    "inside_word": {6, 15},
    "word_ends": {0, 1, 2, 4, 6, 10, 11, 15},
    "after_newline": {9},
    "after_digit": {13},
    "after_punctuation": {4, 8, 14},
    "after_capital": {1, 6, 7},
    "after_function_word": {1, 5, 6, 11, 12},
    "before_newline": {7},
    "before_digit": {11},
    "before_punctuation": {2, 6, 12, 15},
    "before_capital": {4, 5},
    "before_function_word": {3, 4, 9, 10},
    "sentence_start": {10},
    "indented": {9, 10, 11, 12, 13, 14, 15, 16},
    "in_parentheses": set(range(4, 17)),
    "in_quotes": {14, 15, 16},
    "repeated": set(),
    "repeated_pair": set(),
    "early": {0, 1, 2, 3, 4},
    "late": {13, 14, 15, 16},
    "frequent": set(range(0, 8)) - {0},
    "once": set(range(17)) - {1, 7},
}


def encoded(*contexts: list[str]) -> tuple[list[np.ndarray], dict[int, str]]:
    ids = {text: 10 + 3 * i for i, text in enumerate(dict.fromkeys(t for context in contexts for t in context))}
    return [np.array([ids[t] for t in context], np.int32) for context in contexts], {i: t for t, i in ids.items()}


def test_each_task_is_what_the_table_says() -> None:
    contexts, texts = encoded(FIRST, SECOND)
    found = text_tasks(contexts, texts)
    assert found.keys() == TRUE.keys()
    for name, (first, second) in found.items():
        assert (len(first), len(second)) == (len(FIRST), len(SECOND)), name
        if name != "frequent":  # which of equally frequent ones count is arbitrary
            assert set(np.flatnonzero(first).tolist()) == TRUE[name], name
    # Of 21 tokens 11 are half: the two that come twice, and seven of those that come once.
    frequent = np.concatenate(found["frequent"])
    assert frequent[[1, 7, 18, 20]].all()
    assert frequent.sum() == 4 + 7


def test_what_was_before_counts_within_a_context() -> None:
    contexts, texts = encoded(["a", "b", "a", "b", "b"], ["b", "a"])
    found = text_tasks(contexts, texts)
    assert [values.tolist() for values in found["repeated"]] == [[False, False, True, True, True], [False, False]]
    assert [values.tolist() for values in found["repeated_pair"]] == [[False, False, False, True, False], [False] * 2]


def test_every_task_stands_in_the_table_of_the_file() -> None:
    assert module.__doc__ is not None
    rows = [line for line in module.__doc__.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert named == list(text_tasks(*encoded(FIRST))) or sorted(named) == sorted(text_tasks(*encoded(FIRST)))
    assert len(named) >= 20


@pytest.mark.parametrize("text", ["", "\ufffd", "é", "日本"])
def test_any_text_will_do(text: str) -> None:
    assert all(values[0].dtype == bool for values in text_tasks(*encoded([text, "a"])).values())
