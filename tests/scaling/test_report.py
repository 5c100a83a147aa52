"""A run directory becomes fits.json, figures and one page that fetches nothing."""

import base64
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from scaling.fit import fit_notes
from scaling.report import analyse, is_current
from storage.rundir import RunDirectory

Rows = list[dict[str, Any]]
NAMES = ["dead_fraction.png", "nmse_against_compute.png", "nmse_against_n.png"]


@pytest.mark.parametrize(
    ("sizes", "ks", "fitted"),
    [
        ((512, 1024), (8, 16), set()),
        ((512, 1024, 2048, 4096), (8, 16, 32, 64), {"n_k", "n", "c"}),
        (tuple(2**i for i in range(11, 22, 2)), (8, 16, 32, 64, 128, 256, 512), {"n_k", "n", "c"}),
    ],
    ids=["2x2", "4x4", "6x7"],
)
def test_analyse(
    tmp_path: Path, cells: Callable[..., Rows], curves_of: Callable[..., Rows], sizes: Any, ks: Any, fitted: set[str]
) -> None:
    run = RunDirectory(str(tmp_path))
    rows = cells(sizes, ks, noise=0.005)
    run.write_results(rows)
    run.write_curves(pa.Table.from_pylist(curves_of(rows)))
    document = analyse(run, bootstraps=20, provenance={"store fingerprint": "abc123", "versions": {"numpy": "2.4"}})
    assert {fit["law"] for fit in document["fits"]} == fitted
    assert json.loads((tmp_path / "fits.json").read_text()) == document
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == NAMES

    page = (tmp_path / "report.html").read_text()
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 3
    for image, name in zip(images, sorted(NAMES, reverse=True), strict=True):
        assert base64.b64decode(image) == (tmp_path / "figures" / name).read_bytes()
    assert not re.search(r"https?://|<script|<link|@import", page)
    assert "prefers-color-scheme: dark" in page
    for note in fit_notes(document):
        assert html.unescape(page).index(note) < html.unescape(page).index("<img")
    for text in ("gpt4", "abc123", "numpy 2.4", f"{sizes[-1]}x{ks[-1]}", "training FLOPs (sparse)"):
        assert text in page
    if fitted:
        assert "Exponent of n at each k" in page
    else:
        assert "No law could be fitted" in page
        assert "4 points for 6 coefficients" in page


def test_results_without_curves_or_optional_columns(cells: Callable[..., Rows]) -> None:
    run = RunDirectory("memory://report/run")
    keys = ("cell_id", "n_latents", "k", "nmse", "status")
    run.write_results([{key: row[key] for key in keys} for row in cells((512, 1024, 2048, 4096), (8, 16, 32, 64))])
    document = analyse(run, bootstraps=0)
    assert [fit["law"] for fit in document["fits"]] == ["n_k", *["n"] * 4]
    assert document["fits"][0]["coefficients"]["alpha"]["low"] is None


def test_current_until_anything_that_counts_changes(
    tmp_path: Path, cells: Callable[..., Rows], curves_of: Callable[..., Rows]
) -> None:
    run = RunDirectory(str(tmp_path))
    rows = cells((512, 1024, 2048), (8, 16))
    assert not is_current(run)
    waiting = {"cell_id": "2048x16", "n_latents": 2048, "k": 16, "status": "pending"}
    run.write_results([*rows[:-1], waiting])
    run.write_curves(pa.Table.from_pylist(curves_of(rows[:-1])))
    assert not is_current(run)
    analyse(run, bootstraps=5, seed=1)
    assert is_current(run, bootstraps=5, seed=1)
    assert not is_current(run, bootstraps=6, seed=1)
    assert not is_current(run, bootstraps=5, seed=2)
    assert not is_current(run, bootstraps=5, seed=1, laws=("n_k",))

    run.write_results([*(row | {"wall_s": 1.0} for row in rows[:-1]), waiting])
    assert is_current(run, bootstraps=5, seed=1)
    run.write_results(rows)
    assert not is_current(run, bootstraps=5, seed=1)
    analyse(run, bootstraps=5, seed=1)
    assert is_current(run, bootstraps=5, seed=1)
    run.write_curves(pa.Table.from_pylist(curves_of(rows)))
    assert not is_current(run, bootstraps=5, seed=1)

    analyse(run, bootstraps=5, seed=1)
    (tmp_path / "report.html").unlink()
    assert not is_current(run, bootstraps=5, seed=1)
    analyse(run, bootstraps=5, seed=1)
    (tmp_path / "fits.json").write_text("{")
    assert not is_current(run, bootstraps=5, seed=1)


def test_an_analysis_that_is_cut_short_is_not_current(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cells: Callable[..., Rows]
) -> None:
    run = RunDirectory(str(tmp_path))
    rows = cells((512, 1024), (8, 16))
    run.write_results(rows[:-1])
    analyse(run, bootstraps=0)
    run.write_results(rows)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scaling.report.write_report", killed)
    with pytest.raises(KeyboardInterrupt):
        analyse(run, bootstraps=0)
    assert not is_current(run, bootstraps=0)


def test_text_from_tables_is_escaped(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    run = RunDirectory(str(tmp_path))
    run.write_results([row | {"subject": "<b>x</b>"} for row in cells((512, 1024), (8, 16))])
    analyse(run, bootstraps=0)
    page = (tmp_path / "report.html").read_text()
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page
