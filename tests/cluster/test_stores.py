"""Several stores in one sweep: what the file means, what is said of stores of no use, and what is recorded."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saescale.cluster.front.inspection import describe
from saescale.cluster.front.status_view import line, render
from saescale.cluster.sweep.cautions import cautions_of_each
from saescale.cluster.sweep.extend import extend
from saescale.cluster.sweep.identity import provenance_of
from saescale.cluster.sweep.ledger import Ledger, open_ledger
from saescale.cluster.sweep.packing import pack_cells
from saescale.cluster.sweep.spec import load_spec, parse_spec
from saescale.cluster.sweep.status import read_status
from saescale.cluster.sweep.stores import open_stores
from saescale.storage.errors import SaescaleError
from saescale.storage.recorded import recorded_sources
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from tests.cluster.command import assert_one_line, saescale_here
from tests.cluster.test_status import shown
from tests.trainers.synthetic import sparse_rows, write_store


def layer(folder: Path, number: int, d_model: int = 32) -> str:
    train, heldout = sparse_rows(1_024, seed=number)[:, :d_model], sparse_rows(2_048, seed=99)[:, :d_model]
    url = str(folder / f"toy-l{number}")
    return write_store(url, np.ascontiguousarray(train), np.ascontiguousarray(heldout), layer=number)


@pytest.fixture
def layers(tmp_path: Path) -> list[str]:
    """Stores of layers 2, 10 and 11, of which the last is narrower than the others."""
    return [layer(tmp_path, 2), layer(tmp_path, 10), layer(tmp_path, 11, d_model=24)]


@pytest.fixture
def sweep(document: dict[str, Any], layers: list[str]) -> dict[str, Any]:
    return document | {"store": layers, "grid": {"n_latents": [32, 64], "k": [2, 4]}}


def opened(document: dict[str, Any], extending: bool = False) -> Ledger:
    spec, run = parse_spec(document, "test"), RunDirectory(document["out"])
    return open_ledger(run, run.read_spec(), spec, open_stores(spec), "fp32", extending)


# --- the sweep file


def test_the_grid_is_taken_over_each_store(sweep: dict[str, Any], layers: list[str]) -> None:
    sweep["train"]["auxk"]["k"] = "auto"
    spec = parse_spec(sweep, "test")
    ledger = opened(sweep)
    assert (spec.size, len({cell.cell_id for cell in ledger.cells})) == (12, 12)
    widths = {
        url: {c.d_model for c in ledger.cells if c.store == ActivationStore.open(url).fingerprint} for url in layers
    }
    assert widths == {layers[0]: {32}, layers[1]: {32}, layers[2]: {24}}
    assert {(cell.d_model, cell.settings["k_aux"]) for cell in ledger.cells} == {(32, 16), (24, 16)}
    # The cells of a store are those of a sweep over it alone.
    for url in layers:
        alone = opened(sweep | {"store": url, "out": sweep["out"] + "-alone"}).cells
        assert [cell for cell in ledger.cells if cell.store == alone[0].store] == alone
    # A list of one is that one.
    assert parse_spec(sweep | {"store": layers[:1]}, "test") == parse_spec(sweep | {"store": layers[0]}, "test")


def test_a_pack_is_of_one_store(sweep: dict[str, Any]) -> None:
    cells = opened(sweep).cells
    packs = pack_cells(cells, {}, workers=1, memory=1e15, needs=lambda pack: 0.0)
    assert [len({cell.store for cell in pack}) for pack in packs] == [1, 1, 1]
    assert sorted(cell.cell_id for pack in packs for cell in pack) == sorted(cell.cell_id for cell in cells)


def test_a_pattern_stands_for_the_stores_in_the_order_of_their_layers(
    sweep: dict[str, Any], layers: list[str], tmp_path: Path, sweep_file: Callable[[Any], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "toy-l99.txt").write_text("no store")
    pattern = str(tmp_path / "toy-l*")
    assert load_spec(sweep_file(sweep | {"store": pattern})).stores == layers
    mixed = [layers[2], str(tmp_path / "toy-l?0"), str(tmp_path / "*-l2")]
    assert load_spec(sweep_file(sweep | {"store": mixed})).stores == [*mixed[:2], layers[0]]
    monkeypatch.chdir(tmp_path)
    assert load_spec(sweep_file(sweep | {"store": "toy-l1*"})).stores == ["toy-l10", "toy-l11"]
    assert load_spec(sweep_file(sweep | {"store": "toy-l2*"})).store == "toy-l2"
    with pytest.raises(SaescaleError, match=r"store: there is no folder like no/toy-l\*; harvest first"):
        load_spec(sweep_file(sweep | {"store": "no/toy-l*"}))
    # A harvest that was not finished is not passed over.
    (tmp_path / "toy-l5").mkdir()
    assert_one_line(
        saescale_here("sweep", sweep_file(sweep | {"store": pattern})), f"{tmp_path}/toy-l5 is no activation"
    )


# --- stores that cannot be used


def test_stores_that_cannot_be_used_are_named(
    sweep: dict[str, Any], layers: list[str], tmp_path: Path, sweep_file: Callable[[Any], str]
) -> None:
    copied = str(tmp_path / "again")
    shutil.copytree(layers[1], copied)
    broken = str(tmp_path / "broken")
    shutil.copytree(layers[2], broken)
    (tmp_path / "broken" / "train-00000.parquet").write_bytes(b"short")
    few = write_store(str(tmp_path / "few"), sparse_rows(64, seed=0), sparse_rows(64, seed=1))
    for stores, *said in (
        ([*layers, str(tmp_path / "gone")], f"{tmp_path}/gone is no activation store"),
        ([*layers, copied], f"store: {layers[1]} and {copied} are one store", "name it once"),
        ([*layers, layers[0]], f"store: {layers[0]} stands there 2 times"),
        ([], "store: list should have at least 1 item"),
        ([*layers, 7], "store.3: input should be a valid string (given: 7)"),
        (7, "store: input should be a valid string (given: 7)"),
        ([layers[0], "s3://me:hush@bucket/store"], "store: "),
        ([layers[0], broken], "broken/train-00000.parquet"),
        ([layers[0], few], f"the activation store {few} holds 64 heldout rows and eval.tokens asks for 2048"),
    ):
        result = saescale_here("sweep", sweep_file(sweep | {"store": stores}))
        assert_one_line(result, *said)
        assert "hush" not in result.stderr
        assert not Path(sweep["out"]).exists()


def test_what_holds_for_some_stores_names_them(sweep: dict[str, Any], layers: list[str]) -> None:
    widths: dict[str, int | None] = dict(zip(layers, (32, 32, 24), strict=True))
    assert cautions_of_each(parse_spec(sweep, "test"), widths) == []
    near = parse_spec(sweep | {"grid": {"n_latents": [64], "k": [12]}}, "test")
    (said,) = cautions_of_each(near, widths)
    assert said.startswith(f"{layers[2]}: k = 12 is half of d_model = 24 or more")
    (said,) = cautions_of_each(near, dict.fromkeys(layers, 24))
    assert said.startswith("k = 12 is half of d_model = 24 or more")
    with pytest.raises(SaescaleError, match=rf"k = 24 is not below d_model = 24: .* \(the store {layers[2]}\)"):
        cautions_of_each(parse_spec(sweep | {"grid": {"n_latents": [64], "k": [24]}}, "test"), widths)


# --- the run directory


def test_sweep_yaml_says_what_each_store_is(sweep: dict[str, Any], layers: list[str]) -> None:
    opened(sweep).begin()
    run = RunDirectory(sweep["out"])
    recorded = run.read_spec()
    assert recorded is not None
    stores = [ActivationStore.open(url) for url in layers]
    assert recorded_sources(recorded) == [
        (url, store.fingerprint, "synthetic", f"resid_post.{number}", None)
        for url, store, number in zip(layers, stores, (2, 10, 11), strict=True)
    ]
    found = provenance_of(run, recorded)
    assert [found[f"store {i}"] for i in (1, 2, 3)] == [
        f"{url} ({store.fingerprint})" for url, store in zip(layers, stores, strict=True)
    ]
    assert found["sites"] == "resid_post.2, resid_post.10, resid_post.11"
    assert all(url in describe(run.url)["store"] for url in layers)
    # As it is, it is the same sweep; and in whatever order, and wherever, the stores are named.
    (Path(layers[0]).rename(layers[0] + "-moved"))
    moved = [layers[2], layers[0] + "-moved", layers[1]]
    for document in (recorded | {"store": moved}, sweep | {"store": moved}):
        again = opened(document)
        assert again.document == recorded
        assert {cell.cell_id for cell in again.cells} == {row["cell_id"] for row in run.read_results().to_pylist()}


def test_a_run_of_0_1_0_over_one_store_goes_on(sweep: dict[str, Any], layers: list[str]) -> None:
    opened(sweep | {"store": layers[0]}).begin()
    run = RunDirectory(sweep["out"])
    document = run.read_spec()
    assert document is not None
    (source,) = document["resolved"].pop("sources")
    old = document | {"resolved": document["resolved"] | {"store_fingerprint": source["fingerprint"], "subject": "toy"}}
    run.write_spec(old)
    ledger = opened(sweep | {"store": layers[:1]})
    assert ledger.document == old
    assert provenance_of(run, old)["store"] == f"{layers[0]} ({source['fingerprint']})"
    assert provenance_of(run, old)["subject"] == "toy"
    assert len(read_status(run.url).cells) == 4
    with pytest.raises(SaescaleError, match=f"holds another sweep .store_fingerprint is {source['fingerprint']} there"):
        opened(sweep | {"store": layers[1]})


def test_other_stores_are_another_sweep(sweep: dict[str, Any], layers: list[str], tmp_path: Path) -> None:
    opened(sweep | {"store": layers[:2]}).begin()
    out = sweep["out"]
    with pytest.raises(
        SaescaleError, match=rf"store: {layers[2]} \(\w+\) is only here\); .* add the cells: .* --extend"
    ):
        opened(sweep)
    with pytest.raises(SaescaleError, match=rf"store: {layers[1]} \(\w+\) is only there\); .* use {out}/sweep.yaml"):
        opened(sweep | {"store": layers[:1]})
    shutil.rmtree(layers[1])
    write_store(layers[1], sparse_rows(1_024, seed=5), sparse_rows(2_048, seed=6), layer=10)
    with pytest.raises(SaescaleError, match=f"fingerprint is .* here: {layers[1]} was changed or harvested again"):
        opened(sweep | {"store": layers[:2]})


def test_a_sweep_is_extended_by_a_store(
    sweep: dict[str, Any], layers: list[str], sweep_file: Callable[[Any], str]
) -> None:
    opened(sweep | {"store": layers[:2]}).begin()
    run = RunDirectory(sweep["out"])
    first = load_spec(f"{run.url}/sweep.yaml")
    larger = {"n_latents": [32, 64, 128], "k": [2, 4]}
    extension = extend(first, sweep_file(sweep | {"grid": larger}))
    assert (extension.added, extension.spec.size, extension.spec.stores) == (18 - 8, 18, layers)
    before = run.read_spec()
    opened(extension.spec.model_dump(mode="json"), extending=True).begin()
    after = run.read_spec()
    assert before is not None
    assert after is not None
    assert len(recorded_sources(after)) == 3
    assert {**after, "grid": 0, "store": 0, "resolved": 0} == {**before, "grid": 0, "store": 0, "resolved": 0}
    assert after["resolved"]["versions"] == before["resolved"]["versions"]
    assert run.read_results().num_rows == 18
    assert extend(extension.spec, sweep_file(sweep | {"grid": larger})).added == 0
    # A grid alone is added over all stores; stores that lack one of the sweep's are no extension.
    assert extend(extension.spec, sweep_file({"grid": {"n_latents": [64], "k": [8]}})).added == 3
    with pytest.raises(SaescaleError, match=f"store lacks {layers[0]}; all cells of a sweep are trained over all its"):
        extend(extension.spec, sweep_file({"grid": larger, "store": layers[1:]}))


def test_status_tells_of_each_source(sweep: dict[str, Any], layers: list[str]) -> None:
    ledger = opened(sweep)
    ledger.begin()
    ended = [cell for cell in ledger.cells if cell.store == ledger.cells[-1].store]
    for cell in ended[:3]:
        ledger.fail(cell, "a reason")
    ledger.write()
    found = read_status(sweep["out"])
    assert [(s.site, s.counts.cells, s.counts.failed, s.counts.pending) for s in found.sources] == [
        ("resid_post.2", 4, 0, 4), ("resid_post.10", 4, 0, 4), ("resid_post.11", 4, 3, 1),
    ]  # fmt: skip
    assert [cell.site for cell in found.cells if cell.status == "failed"] == ["resid_post.11"] * 3
    picture = shown(render(found, 120), width=120)
    assert "done of each source: resid_post.2 0/4, resid_post.10 0/4, resid_post.11 0/4" in picture
    rows = [text.split()[:2] for text in picture.splitlines() if text.strip().startswith("resid_post")]
    assert rows == [[f"resid_post.{number}", f"n={n}"] for number in (2, 10, 11) for n in (32, 64)]
    assert "\n" not in line(found)
    # Where the ledger is lost, sweep.yaml says what cells there are.
    (Path(sweep["out"]) / "results.parquet").unlink()
    with pytest.warns(UserWarning, match=r"results\.parquet is missing"):
        again = read_status(sweep["out"])
    assert (again.counts.cells, again.counts.failed) == (12, 3)
    assert {s.site: s.counts.cells for s in again.sources} == {f"resid_post.{n}": 4 for n in (2, 10, 11)}
