"""What is waited for: who registers it, what lasts, and that nothing secret is shown with it."""

import time

import pytest

from saescale.storage import files
from saescale.storage.waiting import Wait, hear, server, waiting, waits


def test_what_lasts_is_named_while_it_lasts() -> None:
    with waiting("the bus", limit_s=60), waiting("the train"):
        found = waits(over_s=0.0)
        assert [wait.what for wait in found] == ["the bus", "the train"]
        assert found[0].until == pytest.approx(found[0].since + 60)
        assert found[1].until is None
        assert waits() == []  # not yet
    assert waits(over_s=0.0) == []
    with pytest.raises(OSError, match="late"), waiting("the bus"):
        raise OSError("late")
    assert waits(over_s=0.0) == []


def test_what_others_wait_for_is_said_once_and_since_when_it_began() -> None:
    now = time.time()
    hear("workers", [Wait("the bus", now - 30), Wait("the tram", now - 20)])
    try:
        with waiting("the bus"):
            assert [(wait.what, now - wait.since) for wait in waits()] == [("the bus", 30.0), ("the tram", 20.0)]
    finally:
        hear("workers", [])
    assert waits() == []


def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what stands in its address; and so is each try."""
    seen: list[list[str]] = []

    def fail(fs: object, path: str) -> None:
        seen.append([wait.what for wait in waits(over_s=0.0)])
        raise RuntimeError("no answer")

    monkeypatch.setattr(files, "_PAUSES_S", (0.0,))
    with pytest.raises(files.Unavailable):
        files._read("memory://bucket/run/sweep.yaml", fail)
    assert seen == [["an answer of memory://bucket"]] * 2


@pytest.mark.parametrize(
    ("url", "answers"),
    [
        ("s3://me:hush@bucket/a/b?versionId=hush#hush", "s3://***@bucket"),
        ("https://host:9000/a?token=hush", "https://host:9000"),
        ("/data/a?b#c", "/data/a?b#c"),
        ("gs://bucket", "gs://bucket"),
    ],
)
def test_who_has_to_answer_is_named_without_secrets(url: str, answers: str) -> None:
    assert server(url) == answers
