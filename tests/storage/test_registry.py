"""What stands behind a door is found by its file's name; what is wrong with a file of the user's is said."""

from pathlib import Path

import pytest

from saescale.storage import registry
from saescale.storage.errors import SaescaleError
from saescale.storage.registry import Room

ROOM = Room("saescale.trainers.evals", "evaluation", marker="measure")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's own evaluations."""
    (tmp_path / "evals").mkdir()
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path))
    return tmp_path / "evals"


def test_a_file_with_the_marker_is_found_by_its_name_and_imported_when_it_is_asked_for(mine: Path) -> None:
    (mine / "my_eval.py").write_text("raise RuntimeError('imported')\ndef measure(): ...\n")
    assert {"my_eval", "nmse"} <= set(ROOM.names())
    ROOM.check("my-eval")
    with pytest.raises(SaescaleError, match=r"my_eval\.py \(evaluation\) fails with RuntimeError: imported"):
        ROOM.load("my-eval")


@pytest.mark.parametrize("name", ["nmse", "board_probe"])  # in the room, and in a room within it
def test_a_users_file_never_takes_the_place_of_one_of_the_products(name: str, mine: Path) -> None:
    (mine / f"{name}.py").write_text("measure = None\n")
    assert ROOM.own(name) is None
    assert ROOM.load(name).measure is not None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("def measure(:\n", r"mine\.py \(evaluation\) is no Python: invalid syntax"),
        ("def measured(): ...\n", r"mine\.py is no evaluation: it defines no `measure` at its top level"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_instead_of_a_near_name(mine: Path, content: str, said: str) -> None:
    (mine / "mine.py").write_text(content)
    with pytest.raises(SaescaleError, match=said):
        ROOM.check("mine")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(SaescaleError, match=r"unknown evaluation 'nmsee': did you mean nmse\? there are .*nmse"):
        ROOM.check("nmsee")


def test_a_file_that_is_given_is_one_of_the_room(tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_GIVEN", {})
    (mine / "my_eval.py").write_text("measure = 'below SAESCALE_PATH'\n")
    given = tmp_path / "my-eval.py"
    given.write_text("measure = 'given'\n")
    assert ROOM.give(str(given)) == "my_eval" == ROOM.give(str(given))
    assert ROOM.load("my_eval").measure == "given"
    assert (ROOM.own("my-eval"), ROOM.own("nmse")) == (given, None)
    (tmp_path / "other").mkdir()
    for name, content, said in (
        ("nothing.py", None, "there is no evaluation file at .*nothing.py"),
        ("other", None, "there is no evaluation file at"),
        ("nmse.py", "measure = None", "nmse is the name of an evaluation of saescale"),
        ("other/my_eval.py", "measure = None", "is the evaluation my_eval already"),
        ("broken.py", "measure = (", "is no Python"),
        ("else.txt", "measure = None", "is not called as a file of Python"),
        ("9.py", "measure = None", "is not called as a file of Python"),
        ("unmarked.py", "measured = None", "defines no `measure` at its top level"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(SaescaleError, match=said) as caught:
            ROOM.give(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    assert {"my_eval", "nmse"} <= set(ROOM.names())
