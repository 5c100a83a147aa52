"""Sentences of a singular or plural subject, and activations at their ends."""

import re

import torch

from saescale.storage.store import ActivationStore
from saescale.trainers.evals.texts.agreement import last_activations, sentences
from saescale.trainers.subjects.subject import Subject

PLURAL = re.compile(r"(men|[^aeious]s|[aeiou]s)$")


def test_tasks_are_true_of_plural_nouns() -> None:
    texts, noun, tasks = sentences()
    assert len(texts) == len(noun) == 320
    assert sentences().texts == texts
    for text, subject, last in zip(texts, tasks["plural_subject"], tasks["plural_last"], strict=True):
        _, first, *_, end = text.split()
        assert (bool(PLURAL.search(first)), bool(PLURAL.search(end))) == (subject, last), text
    assert texts[0].startswith("The athlete near the ")
    assert [text for text in texts if text.startswith("The women that the")]
    # The last noun says nothing of the first one.
    assert (tasks["plural_subject"] & tasks["plural_last"]).sum() == 80
    assert len({text.split()[1] for text in texts}) == 40


def test_activations_are_those_of_each_sentence_alone(text_store: ActivationStore, text_subject: Subject) -> None:
    texts = sentences().texts[:70]
    found = last_activations(text_subject, text_store.site, texts)
    for text, activation in zip(texts, found, strict=True):
        (tokens,) = text_subject.tokenize([text])  # type: ignore[attr-defined]
        ids = torch.tensor([[text_subject.bos_token_id, *tokens.tolist()]])  # type: ignore[attr-defined]
        alone = text_subject.run(ids, [text_store.site]).resid[0][0, -1]
        assert torch.allclose(alone, activation, atol=1e-5)
