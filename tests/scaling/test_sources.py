"""Several sources as one table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from saescale.scaling.laws.fit import fit_all
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.sources import load_sources
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory

Rows = list[dict[str, Any]]


def test_a_run_a_table_and_wandb_together(
    tmp_path: Path, cells: Callable[..., Rows], curves_of: Callable[..., Rows]
) -> None:
    run = RunDirectory(str(tmp_path / "run"))
    run.write_results(cells((512, 1024), (8, 16)))
    run.write_curves(pa.Table.from_pylist(curves_of(cells((512, 1024), (8, 16)))))
    pyarrow.parquet.write_table(pa.Table.from_pylist(cells((1024, 2048), (8, 16))), tmp_path / "more.parquet")

    def reader(path: str) -> Any:
        assert path == "me/project"
        other = str(tmp_path / "wandb.csv")
        pyarrow.csv.write_csv(pa.Table.from_pylist(cells((4096,), (8, 16))), other)
        return load_sources([other])

    results, curves = load_sources([run.url, str(tmp_path / "more.parquet"), "wandb:me/project"], reader)
    assert sorted(results["n_latents"]) == [512, 512, 1024, 1024, 2048, 2048, 4096, 4096]
    assert "2 cells are in several sources; each counts once" in results.excluded
    assert curves is not None
    assert set(curves["cell_id"]) == {"512x8", "512x16", "1024x8", "1024x16"}
    assert results.source == f"{run.url}, {tmp_path / 'more.parquet'}, wandb:me/project"


def test_tables_without_a_subject_are_of_subjects_of_their_own(tmp_path: Path) -> None:
    urls = []
    for d_model in (256, 512, 1024):
        lines = [f"{d_model},{n},8,{d_model**0.2 * n**-0.3:.6f}" for n in (512, 1024, 2048, 4096)]
        url = tmp_path / f"{d_model}.csv"
        url.write_text("\n".join(["d_model,n_latents,k,nmse", *lines]))
        urls.append(str(url))
    results, curves = load_sources(urls)
    assert curves is None
    assert set(results["subject"]) == set(urls)
    document = fit_all(results, settings=FitSettings(0, laws=("n", "n_s")))
    over_subjects = next(entry for entry in document["fits"] if entry["law"] == "n_s")
    assert over_subjects["points"] == 12
    assert {entry["points"] for entry in document["fits"] if entry["law"] == "n"} == {4}


def test_cells_that_are_numbered(tmp_path: Path) -> None:
    """A table of one's own may number its cells: a number in two tables of one subject is one cell."""
    for name, first in (("a", 1), ("b", 3)):
        rows = [f"{i},toy,{512 * 2**i},8,{0.5 / i:.4f}" for i in range(first, first + 3)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["cell_id,subject,n_latents,k,nmse", *rows]))
    results, _ = load_sources([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    assert sorted(results["cell_id"]) == [1, 2, 3, 4, 5]
    assert results.excluded == ("1 cells are in several sources; each counts once",)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(SaescaleError, match="no source; name a run directory"):
        load_sources([])
    with pytest.raises(SaescaleError, match="this program reads no W&B"):
        load_sources(["wandb:me/project"])
    for name, text in (
        ("a.csv", "n_latents,k,nmse,tag\n512,8,0.5,x\n"),
        ("b.csv", "n_latents,k,nmse,tag\n512,8,0.5,3\n"),
    ):
        (tmp_path / name).write_text(text)
    with pytest.raises(
        SaescaleError, match=r"column tag differs in kind between .*a.csv \(text\) and .*b.csv \(numbers\)"
    ):
        load_sources([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
