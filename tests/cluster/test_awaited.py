"""What the driver says of the cells that are still to be trained from a live source."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from saescale.cluster.sweep.awaited import AwaitedCells, kept_for_later
from saescale.cluster.sweep.standing import Attempt, Pack
from saescale.cluster.sweep.turns import Turns
from saescale.storage.rundir import RunDirectory
from saescale.storage.waiting import Wait
from saescale.trainers.harvest.live_needs import GoesOn
from tests.trainers.live_case import cell_of
from tests.trainers.test_served import spec_of


def ledger_of(tmp_path: Path) -> Any:
    one, two = (SimpleNamespace(url=str(tmp_path / name), identity=name, d_model=16) for name in ("one", "two"))
    cells = [cell_of(one), cell_of(one, k=8), cell_of(one, k=2), cell_of(two)]
    return SimpleNamespace(stores={"one": one, "two": two}, cells=cells, pending=list(cells))


def test_cells_without_a_result_are_awaited_from_their_checkpoints_on(tmp_path: Path) -> None:
    ledger, awaited = ledger_of(tmp_path), AwaitedCells()
    first, second, third, other = (cell.cell_id for cell in ledger.cells)
    assert awaited.of(ledger.stores["one"].url) is None
    awaited.begin(ledger, {first: [30, 20], third: [7]})
    found = awaited.of(ledger.stores["one"].url)
    assert found == {first: GoesOn(30 * 512, 20 * 512), second: GoesOn(0, 0), third: GoesOn(7 * 512, 7 * 512)}
    del ledger.pending[0]
    assert awaited.of(ledger.stores["one"].url) == {second: found[second], third: found[third]}
    assert awaited.of(ledger.stores["two"].url) == {other: GoesOn(0, 0)}


def test_packs_that_cannot_be_trained_at_one_time_are_told_where_files_are_removed(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path)
    lives = {ledger.stores[name].url: spec_of(tmp_path, remove_hidden_states=True) for name in ("one", "two")}
    packs = [[cell] for cell in ledger.cells]
    assert kept_for_later(lives, ledger, packs, 3) == []
    (said,) = kept_for_later(lives, ledger, packs, 2)
    assert said.startswith(f"{ledger.stores['one'].url}: 3 packs, and 2 workers train at a time")
    assert kept_for_later({url: spec_of(tmp_path) for url in lives}, ledger, packs, 1) == []


def test_who_is_furthest_ahead_makes_way_for_who_is_furthest_back(tmp_path: Path) -> None:
    ledger, awaited = ledger_of(tmp_path), AwaitedCells()
    ahead, back, middle, other = (Pack([cell], 0.0, 0.0, 0) for cell in ledger.cells)
    awaited.begin(ledger, {ahead.cells[0].cell_id: [30], middle.cells[0].cell_id: [7]})
    turns = Turns(awaited, {"one"})
    assert turns.first([ahead, back, middle, other]) == [back, other]
    assert turns.first([ahead, middle]) == [middle]
    assert Turns(awaited).first([ahead, back]) == [ahead, back]

    def attempt(pack: Pack, step: int, waited_s: float = 60.0) -> Attempt:
        progress: Any = SimpleNamespace(step=step)
        wait = Wait("activations of x", time.time() - waited_s)
        return Attempt(None, pack, 1, 0.0, progress, waits=(wait,))

    first, second = attempt(ahead, 40), attempt(middle, 20)
    assert turns.gives_way([first, second], [back]) is first
    assert turns.gives_way([first, second], []) is None
    assert turns.gives_way([attempt(ahead, 40, waited_s=1.0)], [back]) is None
    assert turns.gives_way([attempt(back, 7)], [middle]) is None  # it is as far as that one
    assert Turns(awaited).gives_way([first], [back]) is None
    second.parting = True
    assert turns.gives_way([first, second], [back]) is None  # one at a time


def test_where_a_pack_goes_on_is_seen_anew_when_its_worker_is_taken(tmp_path: Path) -> None:
    ledger, awaited = ledger_of(tmp_path), AwaitedCells()
    ledger.run = RunDirectory(str(tmp_path / "run"))
    awaited.begin(ledger, {})
    cell, url = ledger.cells[0], ledger.stores["one"].url
    for step in (5, 9):
        ledger.run.save_checkpoint(cell.cell_id, step, {"x": np.zeros(1)}, {})
    Turns(awaited, {"two"}).waits([cell])
    assert awaited.of(url)[cell.cell_id] == GoesOn(0, 0)
    Turns(awaited, {"one"}).waits([cell])
    assert awaited.of(url)[cell.cell_id] == GoesOn(9 * 512, 5 * 512)
    assert awaited.rows([cell]) == 9 * 512
