"""The small model that learns induction: its sequences, what it is scored by, and that its MLPs add nothing."""

import csv
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects import train
from saescale.trainers.subjects.attention_only import LENGTH, Settings, blank, lines_of_split, repeats
from saescale.trainers.subjects.drawn import first_of
from saescale.trainers.subjects.own_model import blank_model, gpt2_config
from saescale.trainers.subjects.subject import get_subject
from tests.cluster.command import assert_one_line, saescale_here


def test_sequences_repeat_and_no_beginning_is_in_both_splits() -> None:
    ids, repeated = repeats(64, 3, torch.arange(500))
    for line, length in zip(ids.tolist(), repeated.tolist(), strict=True):
        assert line[0] == 0
        assert len(line) == LENGTH
        assert 8 <= length <= 24
        assert all(token == line[1 + place % length] for place, token in enumerate(line[1:]))
    assert set(repeated.tolist()) == set(range(8, 25))
    assert set(ids[:, 1:].flatten().tolist()) == set(range(1, 64))
    one_by_one = torch.cat([repeats(64, 3, torch.tensor([number]))[0] for number in range(5)])
    assert torch.equal(one_by_one, ids[:5])
    subject = blank(Settings(tokens=16), 0)
    beginnings = {}
    for split in ("train", "heldout"):
        drawn = list(islice(subject.sequences(split, seed=1), 300))
        beginnings[split] = {each.ids[1:9].tobytes() for each in drawn}
        assert all(not each.keep[0] and each.keep[1:].all() for each in drawn)
    assert not beginnings["train"] & beginnings["heldout"]
    lessons = subject.lessons(seed=1, batch=64, first=0)
    first = next(lessons)
    second = next(lessons)
    again = next(subject.lessons(seed=1, batch=64, first=first.next))
    assert torch.equal(again.ids, second.ids)
    assert torch.equal(first.ids[:, 1:], first.targets[:, :-1])


def test_scores_are_those_of_slow_code() -> None:
    subject = blank(Settings(n_layers=2), 0)
    found = subject.score(20, seed=5)
    ids, repeated = first_of(lines_of_split(64, "heldout", 5), 20)
    attention = subject.attention(ids)
    losses: dict[str, list[float]] = {"first": [], "second": []}
    ahead = np.zeros((2, 4))
    for line, length in enumerate(repeated.tolist()):
        logits = subject.run(ids[line : line + 1], [], logits=True).logits[0].double().log_softmax(dim=1)  # type: ignore[index]
        for place in range(1, 2 * length + 1):
            if place != length + 1:
                losses["first" if place <= length else "second"].append(-float(logits[place - 1, ids[line, place]]))
        for place in range(length + 1, 2 * length):
            ahead += attention[:, line, :, place, place - length + 1].numpy()
    assert found["first"] == pytest.approx(np.mean(losses["first"]), rel=1e-4)
    assert found["second"] == pytest.approx(np.mean(losses["second"]), rel=1e-4)
    assert found["induction"] == pytest.approx((ahead / len(losses["second"])).max(), rel=1e-3)


@pytest.mark.slow
def test_two_layers_learn_induction_and_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 steps of the smallest that does within seconds; of three seeds the slowest is past these bounds too."""
    monkeypatch.setattr(train, "FINAL_SEQUENCES", 200)
    monkeypatch.setattr(train, "CHECKS", 1)
    found = {}
    for layers in (1, 2):
        settings = {"tokens": 16, "d_model": 32, "n_heads": 2, "n_layers": layers}
        out = str(tmp_path / f"{layers}")
        spec = train.TrainingSpec(
            subject="attention-only", out=out, settings=settings, sequences=9_600, batch=16, lr=6e-3
        )
        found[layers] = train.train_subject(spec)["score"]
    assert found[1]["induction"] < 0.1 < 0.2 < found[2]["induction"]
    assert found[2]["second"] < found[1]["second"] - 0.4
    assert found[1]["previous_token"] < 0.05 < found[2]["previous_token"]  # what an induction head reads


def test_it_is_trained_and_its_mlps_add_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "FINAL_SEQUENCES", 100)
    out = tmp_path / "mine"
    record = train.train_subject(
        train.TrainingSpec(subject="attention-only", out=str(out), settings={"d_model": 32}, sequences=1_280, batch=32)
    )
    with (out / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["induction"]) for row in rows] == [point["induction"] for point in record["curve"]]
    assert [int(row["step"]) for row in rows] == list(range(2, 41, 2))
    subject = get_subject(f"attention-only:{out}", dtype="float32")
    added: list[torch.Tensor] = []
    for parts in subject.parts():  # type: ignore[attr-defined]
        parts.mlp.register_forward_hook(lambda _, given, output: added.append(output))
    score = subject.score(50)  # type: ignore[attr-defined]
    assert len(added) == 4
    assert not any(output.any() for output in added)
    assert score == subject.score(50)  # type: ignore[attr-defined]
    show = "subject", "show", f"attention-only:{out}", "--task", "induction", "--prompts", "2"
    parts = json.loads(saescale_here(*show, "--json").stdout)["parts"]
    assert {part["part"] for part in parts if part["noising"]} == {f"head {i}.{j}" for i in range(2) for j in range(4)}
    shown = saescale_here(*show).stdout
    assert "parts 10/10" in shown
    assert "the metric is the nats a token of the first time less those of the second" in shown
    assert parts[0]["part"] in shown
    assert_one_line(saescale_here(*show[:4], "inducton"), "did you mean induction?")
    assert_one_line(saescale_here(*show[:4], "ioi"), "reads no text")
    with pytest.raises(SaescaleError, match="comes without weights: saescale subject train attention-only"):
        get_subject("attention-only")
    other = tmp_path / "other"
    blank_model(gpt2_config(64, LENGTH, 2, 32, 4), 0).save_pretrained(other)
    with pytest.raises(SaescaleError, match="other is no model of attention alone; saescale subject train"):
        get_subject(f"attention-only:{other}")
    with pytest.raises(SaescaleError, match="d_model 30 cannot be shared by 4 heads"):
        blank(Settings(d_model=30), 0)
