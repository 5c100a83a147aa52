"""What the driver says of the cells that are still to be trained from a live source."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from saescale.cluster.sweep.awaited import AwaitedCells, kept_for_later
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
