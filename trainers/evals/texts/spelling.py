"""What tokens spell, for evaluations whose truth is computed from the text."""

from collections.abc import Iterable
from typing import Any

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.subject import Subject


def token_texts(subject: Subject, tokens: Iterable[int]) -> dict[int, str]:
    """What each of `tokens` adds to a text, with the space before it where it begins a word.

    Bytes of a character that no token holds whole are U+FFFD. Raises SaescaleError where the subject has no tokenizer
    that decodes.
    """
    tokenizer: Any = getattr(subject, "tokenizer", None)
    if not hasattr(tokenizer, "decode"):
        raise SaescaleError(f"the subject {subject.name} has no `tokenizer` that says what its tokens spell")
    # Behind another token, since many tokenizers drop the space that a text begins with.
    first = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]

    def spelt(ids: list[int]) -> str:
        # Some tokenizers are set to take the space before punctuation away.
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    before = len(spelt(first))
    return {token: spelt([*first, token])[before:] for token in map(int, set(tokens))}
