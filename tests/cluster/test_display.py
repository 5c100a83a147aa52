"""What a person sees, on a terminal and without one."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from saescale.cluster.crew.harvest_worker import ActorRow
from saescale.cluster.front.console import ShowsWarnings, console
from saescale.cluster.front.display import Display, actor_table, coefficient_table, duration
from saescale.cluster.front.sweeps import _summary
from saescale.cluster.sweep.driver import SweepOutcome
from saescale.storage.errors import SaescaleWarning
from saescale.storage.lease import Standing
from saescale.storage.rundir import RunDirectory


def progress(done: int, fraction: float) -> Standing:
    return Standing(cells=4, done=done, failed=0, fraction=fraction, tokens_per_s=1234.0, left_s=fraction or None)


@pytest.mark.parametrize("terminal", [True, False])
def test_each_part_of_the_work_leaves_one_line(terminal: bool) -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=terminal, width=120)) as display:
        display.harvest(0, 100, 0.0, "loading the subject")
        for rows in (50, 100, 100):
            display.harvest(rows, 100, 10.0, "harvesting")
        display.stage("starting the workers")
        for state in (progress(0, 0.0), progress(1, 0.4), progress(4, 1.0), progress(4, 1.0)):
            display.sweep(state)
        warnings.warn("a worker died at [/tmp/x]", SaescaleWarning, stacklevel=1)
        warnings.warn("not for users", UserWarning, stacklevel=1)
    shown = out.getvalue()
    assert shown.count("harvest 100/100 in ") == 1
    assert shown.count("cells 4/4 in ") == 1
    assert "loading the subject" in shown
    assert "a worker died at [/tmp/x]" in shown
    assert "not for users" not in shown
    assert ("━" in shown) == terminal  # a bar


def test_lines_appear_now_and_then_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saescale.cluster.front.display.LINE_EVERY_S", 0.0)
    out = io.StringIO()
    with Display(Console(file=out, width=120)) as display:
        display.sweep(progress(0, 0.0))
        display.sweep(progress(1, 0.5))
    lines = out.getvalue().splitlines()
    assert "measuring" in lines[0]
    assert "50% of the FLOPs, 1,234 SAE tokens/s" in lines[1]
    assert lines[1].endswith("left")


@pytest.mark.parametrize(
    ("rates", "shown"),
    [([], "60 tokens/s, "), ([10.0, 50.0], "60 tokens/s (by actor: 10, 50)"), ([12.0] * 5, "(5 actors: 12 to 12)")],
)
def test_rates_of_actors_are_shown(monkeypatch: pytest.MonkeyPatch, rates: list[float], shown: str) -> None:
    monkeypatch.setattr("saescale.cluster.front.display.LINE_EVERY_S", 0.0)
    out = io.StringIO()
    with Display(Console(file=out, width=120)) as display:
        display.harvest(50, 100, sum(rates) or 60.0, "harvesting", rates)
    assert shown in out.getvalue()
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, no_color=True, width=120)) as display:
        display.harvest(50, 100, sum(rates) or 60.0, "harvesting", rates)
        display._bars.refresh()  # which the clock does otherwise
    assert shown.rstrip(", ") in out.getvalue()


def test_the_table_of_actors() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(actor_table([ActorRow(2, "node-1", 3, 98_304, 7427.6)]))
    assert out.getvalue().splitlines()[1].split() == ["2", "node-1", "3", "98,304", "7,428"]


def test_durations() -> None:
    assert [duration(s) for s in (5, 75, 3700)] == ["5 s", "1 min 15 s", "1 h 1 min"]


def test_a_document_without_fits_has_an_empty_table() -> None:
    assert coefficient_table({"fits": []}).row_count == 0


def test_a_sweep_ends_with_the_law_in_n_and_k_and_says_how_to_see_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = Path(__file__).parents[2] / "deploy" / "results" / "quickstart"
    fits = json.loads((published / "fits.json").read_text())
    outcome = SweepOutcome(RunDirectory("runs/quickstart"), fits, cells=20, failed=0, trained=20, wandb=None)
    monkeypatch.setattr(console, "_width", 200)
    _summary(outcome, 60.0)
    table, rest = capsys.readouterr().out.split("fitted too: ")
    rows = [line.split("  ")[0] for line in table.splitlines() if line]
    assert [row for row in rows if row.startswith(("n ", "c "))] == []
    assert "n_k" in rows
    for k in fits_of(fits, "n_k")["exponent_of_n_at_k"]:
        assert f"exponent of n at k = {k} " in table
    assert rest.splitlines()[0] == "n, c; saescale fit runs/quickstart --law n"


def fits_of(document: dict[str, Any], law: str) -> dict[str, Any]:
    return next(entry for entry in document["fits"] if entry["law"] == law)


def test_a_warning_is_shown_once_from_wherever_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    show = ShowsWarnings()
    for text in ("one", "two", "one"):
        show(SaescaleWarning(text), SaescaleWarning, "a.py", 1)
    show("of a library", UserWarning, "a.py", 1)
    assert capsys.readouterr().err == "warning: one\nwarning: two\n"
