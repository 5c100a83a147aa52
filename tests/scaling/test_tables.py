"""What a law may see: finished, comparable, checked cells."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pytest

from saescale.scaling.kinds import kind_label, kinds_in, largest_kind
from saescale.scaling.tables import Table, check_cells, fingerprint, finished, load_curves, load_results
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory

Rows = list[dict[str, Any]]


def test_run_directory_csv_and_parquet_agree(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    run.write_results(cells((512, 1024), (8, 16)))
    pyarrow.csv.write_csv(run.read_results(), tmp_path / "cells.csv")
    from_run = load_results(run)
    for source in (run.url, str(tmp_path / "run" / "results.parquet"), str(tmp_path / "cells.csv")):
        table = load_results(source)
        assert table["nmse"].tolist() == from_run["nmse"].tolist()
        assert table["cell_id"].tolist() == from_run["cell_id"].tolist()
    assert load_curves(run) is None
    assert load_curves(str(tmp_path / "cells.csv")) is None


def test_memory_url(cells: Callable[..., Rows]) -> None:
    run = RunDirectory("memory://tables/run")
    run.write_results(cells((512,), (8,)))
    assert len(load_results("memory://tables/run")) == 1


def test_unfinished_cells_are_excluded_with_the_reason(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    rows = cells((512, 1024), (8,))
    rows[1] |= {"status": "failed", "nmse": None, "error": "NaN in the loss"}
    run = RunDirectory(str(tmp_path))
    run.write_results(rows)
    table = load_results(run)
    assert table["n_latents"].tolist() == [512]
    assert table.excluded == ("cell 1024x8, N = 1024, k = 8 is failed: NaN in the loss",)


@pytest.mark.parametrize(
    ("statuses", "left", "said"),
    [
        (["done", "converged"] * 3, 3, "3 of 6 rows are not done and left out (3 converged); where 'converged' means"),
        (["done", "Finished", "killed", "FAILED", "skipped"], 2, "(1 killed, 1 FAILED, 1 skipped)"),
        (["done", "pending", "", "pending"], 1, "3 of 4 rows are not done and left out (2 pending, 1 without status)"),
        (["done", "ok", "true "], 3, None),
    ],
)
def test_how_many_rows_are_not_done_is_said(statuses: list[str], left: int, said: str | None) -> None:
    rows = [{"n_latents": 2**i, "k": 8, "nmse": 0.5 / i, "status": status} for i, status in enumerate(statuses, 1)]
    table = finished(Table.from_rows(rows))
    assert len(table) == left
    assert len(table.notes) == (said is not None)
    for note in table.notes:
        assert str(said) in note
        assert ("call it done" in note) == ("converged" in note)


def test_a_finished_cell_without_nmse_is_left_out(cells: Callable[..., Rows]) -> None:
    """As JSON writes NaN: training that went astray, like that of an infinite nmse."""
    rows = cells((512, 1024), (8, 16))
    table = finished(Table.from_rows([rows[0] | {"nmse": None}, *rows[1:3], rows[3] | {"nmse": float("nan")}]))
    assert table["cell_id"].tolist() == ["512x16", "1024x8"]
    assert table.excluded[0] == "cell 512x8, N = 512, k = 8 has no nmse"
    assert (
        "2 of 4 finished cells are without nmse and left out (cell 512x8, N = 512, k = 8; cell 1024x16"
        in (table.notes[0])
    )
    with pytest.raises(SaescaleError, match="nmse is 'low' in row 2"):  # what stands there is to be corrected
        check_cells(finished(Table.from_rows([{"nmse": "0.5"}, {"nmse": "low"}, {"nmse": None}])))


def test_no_finished_cell(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    run = RunDirectory(str(tmp_path))
    run.write_results([row | {"status": "pending"} for row in cells((512,), (8, 16))])
    with pytest.raises(SaescaleError, match="no finished cell; 2 are still to be trained: run the sweep first"):
        load_results(run)


def test_all_cells_failed(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    run = RunDirectory(str(tmp_path))
    rows = [row | {"status": "failed", "nmse": None, "error": f"no {row['k']}"} for row in cells((512,), (8, 16))]
    run.write_results(rows)
    with pytest.raises(
        SaescaleError, match=r"2 failed, the first \(cell 512x8, N = 512, k = 8\): no 8; remove the cause"
    ):
        load_results(run)
    run.write_results([*rows, rows[0] | {"status": "pending", "error": None}])
    with pytest.raises(SaescaleError, match=r"2 failed, .*; 1 are still to be trained: run the sweep to its end"):
        load_results(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_latents,k\n512,8\n", "cells.csv: no column nmse; it has n_latents, k"),
        ("n_latents,k,nmse\n512,8,0.3\n1024,8,0\n", "nmse is 0 in row 2 .N = 1024, k = 8.*positive"),
        ("n_latents,k,nmse\n512,8,nan\n", "nmse is missing in row 1 .N = 512, k = 8.; add it"),
        ("n_latents,k,nmse\n0,8,0.3\n", "n_latents is 0 in row 1"),
        ("n_latents,k,nmse\n512,8,low\n", "nmse is 'low' in row 1 .N = 512, k = 8., which is no number; correct"),
        ("n_latents,k,nmse\n512,8,0.3\n16k,8,0.2\n", "n_latents is '16k' in row 2 .k = 8., which is no number"),
        ('n_latents,k,nmse\n"1,024",8,0.3\n', "n_latents is '1,024' in row 1 .*separator of thousands"),
        ("n_latents;k;nmse\n16.384;8;0,31\n", "n_latents is '16.384' in row 1 .*separator of thousands"),
        ("n_latents,k,nmse\n1.024,8,0.3\n", "n_latents is 1.024 in row 1 .*a whole number"),
        ("n_latents,k,nmse\n512,8,0,3\n", "row 1 has 4 fields and the header 3 .512 | 8 | 0 | 3.; quote .* a point"),
        ("n_latents,k,nmse,NMSE\n512,8,0.3,0.4\n", "two columns are called nmse and differ, column 3 .'nmse'. and c"),
        ("n_latents,k,fvu\n512,8,0.3\n", "no column nmse; it has n_latents, k, fvu. If fvu is it, call it nmse"),
        ("d_sae,top_k,fvu\n512,8,0.3\n", "no column nmse, n_latents, k; it .* fvu is it, call it nmse; if d_sae is it"),
        ("nmse\n0.3\n0\n", "nmse is 0 in row 2, and it"),
        ("n_latents,k,nmse\n512,8,0.3\n8,16,0.5\n", "k = 16 is above n_latents = 8 in row 2, .* their right names"),
        ("n_latents,k,nsme\n512,8,0.3\n", "If nsme is it, call it nmse"),
        ("512,8,0.3\n1024,8,0.2\n", "its first row .512, 8, 0.3. holds numbers, not the names of columns"),
        ('n_latents,k,nmse\n512,8,"0.3\n', "not a readable table .* look for a quote that is not closed"),
        ("n_latents,k,nmse,status\n512,8,0.3,odd\n512,16,0.2,odd\n", "status says 'odd' and 1 more and nowhere done"),
        ("", "not a readable table: it is empty"),
        ("\n\n", "not a readable table: it is empty"),
        ('[\n {"n_latents": 512,\n "k": 8}]\n', "not a table but JSON; write it as .csv"),
        ('{"n_latents": 512, "nmse": 0.3}\n{"n_latents": 64, "nmse": 0.4}\n', "not a table but JSON; write it as .csv"),
        ("<!DOCTYPE html><p>404", "not a table but a web page; download the file itself"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS; run: git lfs pull"),
    ],
)  # fmt: skip
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cells.csv").write_text(text)
    with pytest.raises(SaescaleError, match=message):
        load_results(str(tmp_path / "cells.csv"))


def test_a_column_without_any_value_is_absent(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    run = RunDirectory(str(tmp_path))
    run.write_results([row | {"flops": None} for row in cells((512, 1024), (8,))])
    table = load_results(run)
    assert "flops" not in table
    assert "tokens" in table


def test_rows_of_each_value() -> None:
    table = Table.from_rows([{"cell_id": name, "step": i} for i, name in enumerate("baab")])
    rows = {name: own.tolist() for name, own in table.rows_of("cell_id").items()}
    assert rows == {"a": [1, 2], "b": [0, 3]}
    assert table.select(np.zeros(4, dtype=bool)).rows_of("cell_id") == {}
    assert list(Table.from_rows([{"cell_id": 7}]).rows_of("cell_id")) == ["7"]


def test_fingerprint_is_of_what_fits_come_from(cells: Callable[..., Rows], curves_of: Callable[..., Rows]) -> None:
    rows = cells((512, 1024), (8, 16))
    curves = curves_of(rows, evaluations=4)

    def of(rows: Rows, curves: Rows | None = None) -> str:
        return fingerprint(finished(Table.from_rows(rows)), None if curves is None else Table.from_rows(curves))

    same = of(rows, curves)
    assert of(rows[::-1], curves[::-1]) == same
    assert of([row | {"wall_s": 99.0} for row in rows], [row | {"tokens_per_s": 7.0} for row in curves]) == same
    others = [
        of(rows),
        of(rows[:-1], curves),
        of(rows, curves[:-1]),
        of([rows[0] | {"nmse": 0.5}, *rows[1:]], curves),
        of([rows[0] | {"cell_id": "another"}, *rows[1:]], curves),
        of([*rows, rows[0] | {"status": "failed", "error": "NaN"}], curves),
    ]
    assert len({same, *others}) == 7


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "cells.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(SaescaleError, match="not a readable table"):
        load_results(str(tmp_path / "cells.parquet"))
    with pytest.raises(SaescaleError, match="no such file"):
        load_results(str(tmp_path / "other.csv"))
    (tmp_path / "book.csv").write_bytes(b"PK\x03\x04...")
    with pytest.raises(SaescaleError, match=r"not a table but an archive or a spreadsheet .*save it as .csv"):
        load_results(str(tmp_path / "book.csv"))
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"n_latents,k,nmse\n" * 100)[:-9])
    with pytest.raises(SaescaleError, match=r"cut short or damaged .*copy it again"):
        load_results(str(tmp_path / "cut.csv.gz"))
    with pytest.raises(SaescaleError, match="neither a run directory"):
        load_results(str(tmp_path))


def test_kinds_of_cells_have_short_names(cells: Callable[..., Rows]) -> None:
    """In the order of layers; a store or width that goes with the site adds nothing to the name."""
    own = cells((512, 1024), (8,))
    rows = [
        row | {"site": f"resid_post.{layer}", "store": f"{layer}f", "architecture": name, "heldout_rows": 64}
        for layer in (11, 2)
        for name in ("topk", "gated")
        for row in own
    ]
    more = rows[0] | {"n_latents": 2048}
    table = Table.from_rows([*rows, more, more | {"architecture": ""}])  # not known: taken for a topk
    kinds = kinds_in(table)
    labels = ["topk at resid_post.2", "topk at resid_post.11", "gated at resid_post.2", "gated at resid_post.11"]
    assert [kind_label(of) for of, _ in kinds] == labels
    assert [int(mask.sum()) for _, mask in kinds] == [2, 4, 2, 2]
    assert kinds[2][0] == {"architecture": "gated", "site": "resid_post.2"}
    of, largest = largest_kind(table)
    assert (kind_label(of), len(largest)) == ("topk at resid_post.11", 4)
    assert [of for of, _ in kinds_in(Table.from_rows(own))] == [{}]
    twice = Table.from_rows([*(row | {"heldout_rows": 64} for row in own), own[0] | {"heldout_rows": 32}, *own])
    assert [kind_label(of) for of, _ in kinds_in(twice)] == ["heldout_rows 32", "heldout_rows 64"]
