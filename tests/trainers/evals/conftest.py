"""A store of the tiny subject's text, for evaluations that run it."""

import pytest

from saescale.storage.store import ActivationStore
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.subject import Subject, get_subject


@pytest.fixture(scope="session")
def text_store(tiny_subject: str, tiny_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """After layer 1 of 4: 1,536 held-out rows in contexts of 24 tokens behind BOS."""
    out = str(tmp_path_factory.mktemp("text") / "store")
    harvest(
        HarvestSpec(
            subject=tiny_subject, layer=1, corpus=tiny_corpus, out=out, tokens=768, heldout_tokens=1_536,
            context_length=24, shard_rows=768, row_group_rows=96, compute_dtype="float32",
        )
    )  # fmt: skip
    return ActivationStore.open(out)


@pytest.fixture(scope="session")
def text_subject(text_store: ActivationStore) -> Subject:
    return get_subject(text_store.subject, dtype="float32")
