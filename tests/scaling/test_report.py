"""A run directory becomes fits.json, figures and one page that fetches nothing."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from scaling.report import analyse
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


def test_text_from_tables_is_escaped(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    run = RunDirectory(str(tmp_path))
    run.write_results([row | {"subject": "<b>x</b>"} for row in cells((512, 1024), (8, 16))])
    analyse(run, bootstraps=0)
    page = (tmp_path / "report.html").read_text()
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page
