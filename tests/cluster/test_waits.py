"""What a person is told of what is waited for, and what a sweep's driver says of its workers' waits."""

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from saescale.cluster.front import waits as module
from saescale.cluster.front.display import Display
from saescale.cluster.front.waits import SaysWaits, waits_line
from saescale.cluster.sweep.standing import Attempt, Pack, Work, waits_of
from saescale.storage import waiting as register
from saescale.storage.waiting import Wait, waiting
from tests.cluster.test_packing import cell


def test_a_wait_is_said_again_after_pauses_that_grow_and_at_its_end() -> None:
    said: list[str] = []
    shows = SaysWaits(said.append)
    wait = Wait("an answer of s3://b", 1000.0, 1060.0)
    for now in (1005.0, 1006.0, 1034.0, 1035.0, 1059.0):
        shows.look([wait], now)
    # Another try of the same is the same wait, whatever it says of itself.
    shows.look([Wait("an answer of s3://b", 1060.0)], 1062.0)
    shows.look([], 1063.0)
    shows.look([], 1068.0)
    shows.look([], 1069.0)
    assert said == [
        "waiting for an answer of s3://b: 5 s so far, 55 s more at most",
        "waiting for an answer of s3://b: 35 s so far, 25 s more at most",
        "waited 1 min 02 s for an answer of s3://b",
    ]
    assert waits_line(Wait("it", 0.0), 75.0) == "waiting for it: 1 min 15 s so far"


@pytest.mark.parametrize("terminal", [True, False])
def test_whatever_waits_is_shown_by_the_display(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    monkeypatch.setattr(register.waits, "__defaults__", (0.0,))
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=terminal, width=120)), waiting("the [head]", 60):
        deadline = time.monotonic() + 30
        while "the [head]" not in out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "the [head]: 0 s so far, 1 min 00 s more at most" in out.getvalue()


def attempt(worker: str, heard_s: float, *found: Wait) -> Attempt:
    return Attempt(worker, Pack([], 0.0, 0.0, 0), 1, time.monotonic() - heard_s, waits=found)


def test_what_workers_wait_for_is_put_together() -> None:
    ready: dict[Any, Any] = {name: SimpleNamespace(name=name) for name in ("a/1", "b/2", "c/3", "d/4")}
    now = time.time()
    bucket, later = Wait("an answer of s3://b", now - 30), Wait("an answer of s3://b", now - 20)
    working = [attempt("a/1", 40.0, bucket), attempt("b/2", 40.0, later), attempt("c/3", 60.0), attempt("d/4", 1.0)]
    together, quiet = waits_of(working, ready, 900.0)
    assert together == Wait("an answer of s3://b (2 of 4 workers)", now - 30, None)
    assert quiet.what == "worker c/3 to get a batch done"
    assert quiet.until is not None
    assert (now - quiet.since, quiet.until - quiet.since) == (pytest.approx(60, abs=1), pytest.approx(900))


def test_how_far_a_sweep_is_stays_while_a_pack_waits_to_be_tried_again() -> None:
    first, second = cells = [cell(64, seed=0), cell(64, seed=1)]
    work = Work(cells, {first.cell_id: first.steps // 2})  # a former call's, which do not count
    assert work.fraction(()) == 0.0
    work.heard(cells, first.steps * 3 // 4)
    assert work.fraction(()) == pytest.approx((1 / 4 + 3 / 4) / (1 / 2 + 1))
    assert work.fraction({first.cell_id}) == pytest.approx((1 / 2 + 3 / 4) / (1 / 2 + 1))
    work.heard([second], 0)  # it lost what it had
    assert work.fraction({first.cell_id}) == pytest.approx(1 / 3)
