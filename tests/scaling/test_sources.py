"""Several sources as one table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from saescale.scaling.laws.fit import fit_all
from saescale.scaling.laws.notes import fit_notes
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.sources import load_sources
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory

OLD = Path(__file__).parents[1] / "data" / "run-0.1.0"
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
    assert "2 cells are in several sources; each counts once" in results.notes
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
    assert sorted(results["cell_id"]) == ["1", "2", "3", "4", "5"]
    assert results.notes == ("1 cell is in several sources; it counts once",)


def other_sweep(url: str, rows: Rows, curves: Rows, **fields: object) -> str:
    run = RunDirectory(url)
    run.write_results([row | fields for row in rows])
    run.write_curves(pa.Table.from_pylist(curves))
    return url


def test_equal_ids_do_not_hide_that_sweeps_differ(
    tmp_path: Path, cells: Callable[..., Rows], curves_of: Callable[..., Rows]
) -> None:
    """Two sweeps that differ in the held-out rows alone, whose cells had equal ids in 0.1.0."""
    rows = cells((512, 1024, 2048, 4096), (8, 16))
    curves = curves_of(rows, evaluations=8)
    a = other_sweep(str(tmp_path / "a"), rows, curves, heldout_rows=32_768)
    better = [row | {"nmse": row["nmse"] / 2} for row in rows]
    b = other_sweep(str(tmp_path / "b"), better, curves_of(better, evaluations=8), heldout_rows=4_096)
    for sources in ((a, b), (b, a)):
        results, both = load_sources(sources)
        assert (len(results), len(set(results["cell_id"]))) == (16, 16)
        assert both is not None
        # Each cell has its own curve, and no other's.
        for cell, nmse in zip(results["cell_id"], results["nmse"], strict=True):
            own = both["nmse"][both["cell_id"] == cell]
            assert (len(own), own[-1]) == (8, pytest.approx(nmse, rel=1e-6))
        document = fit_all(results, both, FitSettings(0))
        alone = fit_all(*load_sources(sources[:1]), FitSettings(0))
        first = 32_768 if sources[0] == a else 4_096
        own = [entry for entry in document["fits"] if entry["of"] == {"heldout_rows": first}]
        assert [entry["coefficients"] for entry in own] == [entry["coefficients"] for entry in alone["fits"]]
        assert len(document["fits"]) == 2 * len(own)
        assert document["warnings"][0] == (
            "8 cells have the ids of others and differ in heldout_rows: they are other cells"
        )


@pytest.mark.parametrize(
    ("column", "there", "here", "said"),
    [
        ("precision", "bf16", "fp32", "precision bf16 in 4, fp32 in 4"),
        ("batch_tokens", 1_024, 131_072, "batch_tokens 1024 in 4, 131072 in 4"),
        ("ema", 0.99, 0.999, "ema 0.99 in 4, 0.999 in 4"),
        ("corpus", "a.jsonl", "b.jsonl", "corpus a.jsonl in 4, b.jsonl in 4"),
        ("settings", '{"stream_seed": 0}', '{"stream_seed": 1}', 'settings {"stream_seed": 0} in 4'),
    ],
)
def test_what_moves_nmse_is_named_where_cells_of_one_fit_differ_in_it(
    tmp_path: Path, cells: Callable[..., Rows], column: str, there: object, here: object, said: str
) -> None:
    a = other_sweep(str(tmp_path / "a"), cells((512, 1024), (8, 64)), [], **{column: there})
    b = other_sweep(str(tmp_path / "b"), cells((2048, 4096), (8, 64)), [], **{column: here})
    warnings = fit_all(load_sources([a, b])[0], settings=FitSettings(0))["warnings"]
    assert [text for text in warnings if text.startswith(f"cells that are fitted together differ in {said}")]
    alike = other_sweep(str(tmp_path / "c"), cells((2048, 4096), (8, 64)), [], **{column: there})
    assert fit_all(load_sources([a, alike])[0], settings=FitSettings(0))["warnings"] == []
    silent = other_sweep(str(tmp_path / "d"), cells((2048, 4096), (8, 64)), [])
    warnings = fit_all(load_sources([a, silent])[0], settings=FitSettings(0))["warnings"]
    assert warnings == [f"4 of 8 cells do not say their {column}: they may differ in it"]


def test_another_store_is_fitted_apart(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    a = other_sweep(str(tmp_path / "a"), cells((512, 1024, 2048, 4096), (8,)), [], store="1f")
    b = other_sweep(str(tmp_path / "b"), cells((1024, 2048), (16,)), [], store="2e")
    document = fit_all(load_sources([b, a])[0], settings=FitSettings(0, laws=("n",)))
    assert document["cells"] == 6
    assert [(entry["of"], entry["points"]) for entry in document["fits"]] == [({"store": "1f"}, 4)]
    assert {entry["of"]["store"] for entry in document["skipped"]} == {"1f", "2e"}
    notes = fit_notes(document)
    assert any(note.startswith("not fitted: n at k = 16 (store 2e): 2 points for 2 coefficients") for note in notes)
    assert "store 2e: all cells have k = 16: they say nothing of other k" in notes


def test_one_cell_that_was_measured_otherwise_is_said(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    rows = cells((512, 1024), (8,))
    a = other_sweep(str(tmp_path / "a"), rows, [])
    b = other_sweep(str(tmp_path / "b"), [row | {"nmse": 1.01 * row["nmse"]} for row in rows], [])
    results, _ = load_sources([a, b])
    assert results["nmse"].tolist() == [row["nmse"] for row in rows]
    text = "2 cells are in several sources; each counts once"
    assert results.notes == (f"{text}: of those with another nmse (up to 1.00% off) the first",)


def test_a_run_of_0_1_0_says_what_its_sweep_file_says() -> None:
    results, _ = load_sources([str(OLD)])
    said = {name: set(results[name]) for name in ("store", "heldout_rows", "precision", "batch_tokens", "ema")}
    assert said == {
        "store": {"280c968a2bffdd34fd965d5c0112c839"}, "heldout_rows": {1024}, "precision": {"fp32"},
        "batch_tokens": {256}, "ema": {0.9},
    }  # fmt: skip
    assert fit_all(results, settings=FitSettings(0))["cells"] == 6


def test_a_source_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    url = str(tmp_path / "a.csv")
    Path(url).write_text("n_latents,k,nmse\n512,8,0.5\n1024,8,0.4\n")
    results, _ = load_sources([url, url])
    assert (len(results), results.source) == (2, url)
    assert results.notes == (f"{url} is named several times and read once",)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(SaescaleError, match="no source; name a run directory"):
        load_sources([])
    with pytest.raises(SaescaleError, match="this program reads no W&B"):
        load_sources(["wandb:me/project"])


def test_what_is_text_here_and_numbers_there(tmp_path: Path) -> None:
    """Nothing that no law needs keeps tables apart; a seed may have any number of digits."""
    (tmp_path / "a.csv").write_text("subject,n_latents,k,nmse,tag,seed\nx,512,8,0.5,x,1764076800123456789\n")
    (tmp_path / "b.csv").write_text("subject,n_latents,k,nmse,tag,seed\nx,512,8,0.5,3,0\nx,512,8,0.51,2.5,1\n")
    results, _ = load_sources([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    assert results["tag"].tolist() == ["x", "3", "2.5"]
    assert results["seed"].tolist() == ["1764076800123456789", "0", "1"]
    assert results.notes == ()
