"""Training of a subject: it learns, goes on after a kill with the same bits, and is loaded from what it wrote."""

import filecmp
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.subject import get_subject
from saescale.trainers.subjects.train import TrainingSpec, train_subject
from tests.cluster.command import assert_one_line, saescale_here

SMALL = {"board": 4, "n_layers": 2, "d_model": 32, "n_heads": 2}


def spec_of(out: Path, **changes: object) -> TrainingSpec:
    given = {"subject": "othello", "out": str(out), "settings": SMALL, "sequences": 6_400, "batch": 32, "lr": 3e-3}
    return TrainingSpec.model_validate(given | changes)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Another number of threads gives other last bits, and tests before these may have left any."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("subjects") / "small"
    train_subject(spec_of(out))
    return out


def test_it_learns_which_moves_are_legal(trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    subject = get_subject(f"othello:{trained}", dtype="float32")
    untrained = get_subject(f"othello-random:{trained}", dtype="float32")
    assert record["score"] == subject.score(2_000)  # type: ignore[attr-defined]
    assert record["fingerprint"] == subject.fingerprint != untrained.fingerprint
    assert record["score"]["legal"] > untrained.score(500)["legal"] + 0.2  # type: ignore[attr-defined]
    assert record["score"]["loss"] > record["score"]["least_loss"]
    assert [point["sequences"] for point in record["curve"]] == [320 * (i + 1) for i in range(20)]
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"]
    assert not (trained / "checkpoints").exists()


def test_a_finished_one_is_not_trained_again_and_another_one_is_refused(trained: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    assert train_subject(spec_of(trained)) == json.loads(before["training.json"])
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    with pytest.raises(SaescaleError, match=r"another training: lr is 0\.003 there, 0\.01 here"):
        train_subject(spec_of(trained, lr=0.01))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SaescaleError, match=r"holds other files \(notes.txt\)"):
        train_subject(spec_of(tmp_path))


# Both in the middle of what Lightning does at step 100, of which a point of the curve is due: when its checkpoint is
# saved already, and between the gradient of the next step and what follows from it.
KILLED = """
own = train._Pupil.on_train_batch_end
def kill(pupil, *given):
    if pupil.global_step == 100:
        os.kill(os.getpid(), 9)
    own(pupil, *given)
train._Pupil.on_train_batch_end = kill
"""
INTERRUPTED = """
def interrupt(pupil, optimiser):
    if pupil.global_step == 100:
        raise KeyboardInterrupt
train._Pupil.on_before_optimizer_step = interrupt
"""


@pytest.mark.parametrize("how", [KILLED, INTERRUPTED], ids=["killed", "interrupted"])
def test_what_was_cut_short_goes_on_to_the_same_weights(trained: Path, tmp_path: Path, how: str) -> None:
    code = (
        "import os, sys, datetime, torch; torch.set_num_threads(1); from saescale.trainers.subjects import train\n"
        "train.CHECKPOINT_EVERY = datetime.timedelta(microseconds=1)\n"
        f"{how}\n"
        f"train.train_subject(train.TrainingSpec.model_validate_json({spec_of(tmp_path / 'a').model_dump_json()!r}))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert ended.returncode == -9 if how == KILLED else ended.stderr.endswith("KeyboardInterrupt\n"), ended.stderr
    assert (tmp_path / "a" / "checkpoints" / "last.ckpt").exists()
    assert not (tmp_path / "a" / "model.safetensors").exists()
    train_subject(spec_of(tmp_path / "a"))
    for name in ("model.safetensors", "training.json", "curve.csv"):
        assert filecmp.cmp(tmp_path / "a" / name, trained / name, shallow=False), name


def test_a_training_that_diverges_says_so_and_writes_no_weights(tmp_path: Path) -> None:
    with pytest.raises(SaescaleError, match=r"training diverged: after \d+ sequences the loss is nan"):
        train_subject(spec_of(tmp_path / "a", lr=1e30, sequences=640))
    assert not (tmp_path / "a" / "model.safetensors").exists()


def test_it_may_begin_with_the_weights_of_a_trained_one(trained: Path, tmp_path: Path) -> None:
    record = train_subject(spec_of(tmp_path / "a", start=str(trained), sequences=640, seed=1, lr=1e-4))
    first = json.loads((trained / "training.json").read_text())
    assert record["start"] == first["fingerprint"] != record["fingerprint"]
    assert record["curve"][0]["loss"] < first["curve"][9]["loss"]
    with pytest.raises(SaescaleError, match=r"another training: start is 'xxh3.*' there, None here"):
        train_subject(spec_of(tmp_path / "a", sequences=640, seed=1, lr=1e-4))
    with pytest.raises(SaescaleError, match=f"--start {trained} has another shape than the othello that is asked for"):
        train_subject(spec_of(tmp_path / "b", start=str(trained), settings={"board": 4}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["smollm2-135m"], "smollm2-135m cannot be trained; attention-only, maze, othello can"),
        (["othelo"], "did you mean 'othello'?"),
        (["othello", "--set", "layers=2"], "settings of othello: layers is not a key, did you mean n_layers?"),
        (["othello", "--set", "board=5"], "settings of othello: board: input should be 4, 6 or 8 (given: 5)"),
        (["othello", "--set", "board"], "--set takes name=value"),
        (["othello", "--set", "board=["], "'[' is no value of YAML"),
        (["othello", "--set", "board=4", "--set", "board=6"], "--set board is given twice"),
        (["othello", "--set", "d_model=30", "--set", "n_heads=4"], "d_model 30 cannot be shared by 4 heads"),
        (["othello", "--dtype", "float64"], "subject train: dtype: input should be 'float32'"),
    ],
)
def test_what_cannot_be_trained_is_one_line(tmp_path: Path, given: list[str], said: str) -> None:
    assert_one_line(saescale_here("subject", "train", *given, "--out", str(tmp_path / "x")), said)
    assert not (tmp_path / "x").exists()


def test_what_is_no_folder_of_this_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaescaleError, match="--out is memory://x; a subject is trained in a folder of this machine"):
        train_subject(spec_of(tmp_path).model_copy(update={"out": "memory://x"}))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaescaleError, match="cannot write"):
        train_subject(spec_of(tmp_path / "file" / "below"))


def test_the_commands_say_what_there_is_and_what_was_made(tmp_path: Path) -> None:
    listed = saescale_here("subject", "list").stdout
    assert {line.split()[0] for line in listed.splitlines()} >= {"hf", "othello", "othello-random", "smollm2-135m"}
    settings = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    command = ["subject", "train", "othello", "--out", str(tmp_path / "x"), "--sequences", "64", "--batch", "32"]
    done = saescale_here(*command, "--dtype", "float16", *settings)
    assert done.returncode == 0, done.stderr
    assert "legal 0." in done.stdout
    assert f"saescale harvest othello:{tmp_path}/x --layer 0" in done.stdout
    shown = saescale_here("subject", "show", f"othello:{tmp_path}/x", "--sequences", "50", "--json")
    found = json.loads(shown.stdout)
    assert (found["layers"], found["d_model"]) == (2, 32)
    assert "tile_before" in found["labels"]
    assert 0 < found["score"]["legal"] < 1
    assert "tile_after" in saescale_here("subject", "show", f"othello:{tmp_path}/x", "--sequences", "50").stdout
