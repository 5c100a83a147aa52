"""What tokens spell, put together again, is the text."""

from types import SimpleNamespace

import pytest

from saescale.storage.errors import SaescaleError
from saescale.trainers.evals.texts.spelling import token_texts
from saescale.trainers.subjects.subject import get_subject


def test_tokens_spell_the_text_with_its_spaces(tiny_subject: str) -> None:
    subject = get_subject(tiny_subject, dtype="float32")
    text = "The object returns its name, or a default: None."
    ids = subject.tokenize([text])[0].tolist()  # type: ignore[attr-defined]
    spelt = token_texts(subject, ids)
    assert "".join(spelt[token] for token in ids) == text
    assert any(piece.startswith(" ") for piece in spelt.values())


def test_the_space_before_punctuation_stays(tiny_subject: str) -> None:
    """Of a tokenizer that is set to take it away, as that of GPT-2 has long been."""
    subject = get_subject(tiny_subject, dtype="float32")
    tokenizer = subject.tokenizer  # type: ignore[attr-defined]
    before, tokenizer.clean_up_tokenization_spaces = tokenizer.clean_up_tokenization_spaces, True
    try:
        ids = subject.tokenize(["name , or ."])[0].tolist()  # type: ignore[attr-defined]
        spelt = token_texts(subject, ids)
        assert "".join(spelt[token] for token in ids) == "name , or ."
    finally:
        tokenizer.clean_up_tokenization_spaces = before


def test_a_subject_that_does_not_decode_is_one_line() -> None:
    with pytest.raises(SaescaleError, match="mute has no `tokenizer`"):
        token_texts(SimpleNamespace(name="mute"), [1])  # type: ignore[arg-type]
