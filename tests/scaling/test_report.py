"""A run directory becomes fits.json, figures and a report."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from saescale.scaling.laws.notes import fit_notes
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.report import text
from saescale.scaling.report.evaluations import evaluation_tables
from saescale.scaling.report.report import analyse, is_current
from saescale.scaling.report.text import duration, scientific, typeset
from saescale.scaling.tables import Table
from saescale.storage.rundir import RunDirectory
from tests.scaling.test_over_metrics import write_run

Rows = list[dict[str, Any]]


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
    provenance = {"store fingerprint": "abc123", "versions": "numpy 2.4"}
    made = analyse(run, FitSettings(20), provenance=provenance, formats=("html", "md"))
    document = made.document
    assert {fit["law"] for fit in document["fits"]} >= fitted
    assert run.read_fits() == document

    page = (tmp_path / "report.html").read_text()
    drawn = re.findall(r'<img class="still" src="data:image/svg\+xml;base64,', page)
    names = {p.stem for p in (tmp_path / "figures").iterdir()}
    assert len(drawn) == len(names) >= (4 if not fitted else 8)
    own, _ = page.split("<script", 1)
    assert not re.search(r'(src|href)="(?!#|data:)|@import|<link', own)
    for note in fit_notes(document):
        assert html.unescape(page).index(note) < html.unescape(page).index("<figure")
    for said in ("gpt4", "abc123", "numpy 2.4", f"{sizes[-1]}x{ks[-1]}", "training FLOPs (sparse)"):
        assert said in page
    if fitted:
        assert "Exponent of n at each k" in page
    else:
        assert "No law could be fitted" in page
        assert "4 points for 6 coefficients" in page

    markdown = (tmp_path / "report.md").read_text()
    for name in re.findall(r"\]\((figures/[^)]*)\)", markdown):
        assert (tmp_path / name).is_file()
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({line.count("|") - line.count("\\|") for line in table.splitlines()}) == 1
    assert {line for line in markdown.splitlines() if line.startswith("- ")} >= {
        f"- {text.markdown(note)}." for note in fit_notes(document)
    }
    assert f"| {sizes[0]:,} | {ks[0]} |" in markdown


def test_no_report_stays_behind_its_fits(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    """The page is always written, Markdown when it is asked for and from then on."""
    run = RunDirectory(str(tmp_path))

    def shown() -> list[str]:
        return [name for name in ("report.html", "report.md") if "3 cells" in (tmp_path / name).read_text()]

    rows = cells((512, 1024), (8, 16))
    run.write_results(rows)
    analyse(run, FitSettings(0))
    assert not (tmp_path / "report.md").exists()
    run.write_results(rows[:3])
    analyse(run, FitSettings(0), formats=("md",))
    assert is_current(run, FitSettings(0))
    assert shown() == ["report.html", "report.md"]
    run.write_results(rows)
    analyse(run, FitSettings(0))
    assert shown() == []


def test_results_without_curves_or_optional_columns(cells: Callable[..., Rows]) -> None:
    run = RunDirectory("memory://report/run")
    keys = ("cell_id", "n_latents", "k", "nmse", "status")
    run.write_results([{key: row[key] for key in keys} for row in cells((512, 1024, 2048, 4096), (8, 16, 32, 64))])
    document = analyse(run, FitSettings(0), formats=("html", "md")).document
    assert [fit["law"] for fit in document["fits"]][:5] == ["n_k", *["n"] * 4]
    assert document["fits"][0]["coefficients"]["alpha"]["low"] is None


def test_current_until_anything_that_counts_changes(
    tmp_path: Path, cells: Callable[..., Rows], curves_of: Callable[..., Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saescale.scaling.report.report.draw_figures", lambda *_: [])  # they take most of the time
    run = RunDirectory(str(tmp_path))
    rows = cells((512, 1024, 2048), (8, 16))
    assert not is_current(run)
    waiting = {"cell_id": "2048x16", "n_latents": 2048, "k": 16, "status": "pending"}
    run.write_results([*rows[:-1], waiting])
    run.write_curves(pa.Table.from_pylist(curves_of(rows[:-1])))
    assert not is_current(run)
    analyse(run, FitSettings(5, seed=1))
    assert is_current(run, FitSettings(5, seed=1))
    assert not is_current(run, FitSettings(6, seed=1))
    assert not is_current(run, FitSettings(5, seed=2))
    assert not is_current(run, FitSettings(5, seed=1, laws=("n_k",)))

    run.write_results([*(row | {"wall_s": 1.0} for row in rows[:-1]), waiting])
    assert is_current(run, FitSettings(5, seed=1))
    run.write_results(rows)
    assert not is_current(run, FitSettings(5, seed=1))
    analyse(run, FitSettings(5, seed=1))
    assert is_current(run, FitSettings(5, seed=1))
    run.write_curves(pa.Table.from_pylist(curves_of(rows)))
    assert not is_current(run, FitSettings(5, seed=1))

    analyse(run, FitSettings(5, seed=1))
    (tmp_path / "report.html").unlink()
    assert not is_current(run, FitSettings(5, seed=1))
    analyse(run, FitSettings(5, seed=1))
    (tmp_path / "fits.json").write_text("{")
    assert not is_current(run, FitSettings(5, seed=1))


def test_an_analysis_that_is_cut_short_is_not_current(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cells: Callable[..., Rows]
) -> None:
    run = RunDirectory(str(tmp_path))
    rows = cells((512, 1024), (8, 16))
    run.write_results(rows[:-1])
    analyse(run, FitSettings(0))
    run.write_results(rows)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saescale.scaling.report.report.write_report", killed)
    with pytest.raises(KeyboardInterrupt):
        analyse(run, FitSettings(0))
    assert not is_current(run, FitSettings(0))


EVIL = "</script><b>x</b>|y\n# `z` *q* [l](http://x) $a_1$ _u_ ~s~ &lt; \\"


def test_text_from_tables_is_shown_as_it_is(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    """Whatever a user's name holds, it is no markup: in tables, prose, lists of what is excluded, provenance."""
    from markdown_it import MarkdownIt

    run = RunDirectory(str(tmp_path))
    rows = [
        row | {"subject": EVIL, "site": EVIL, "cell_id": EVIL + row["cell_id"]} for row in cells((512, 1024), (8, 16))
    ]
    run.write_results([*rows, rows[0] | {"cell_id": EVIL, "status": "failed", "error": EVIL}])
    run.write_evals(EVIL + "512x8", "loss", [{"metric": EVIL, "value": 0.1}])
    analyse(run, FitSettings(0), formats=("html", "md"), provenance={EVIL: EVIL})
    page = (tmp_path / "report.html").read_text()
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page
    tokens = MarkdownIt("commonmark").enable("table").parse((tmp_path / "report.md").read_text())
    inline = [token for token in tokens if token.type == "inline"]
    shown = ["".join(child.content for child in token.children or ()) for token in inline]
    one_line = EVIL.replace("\n", " ")
    assert shown[0].endswith(f"of {one_line}, {one_line}")
    assert len([text for text in shown if text == one_line + "1024x16"]) == 1
    assert [text for text in shown if text.startswith("cell ") and text.endswith(f"is failed: {one_line}")]
    assert shown.count(one_line) >= 3  # metric and both sides of the provenance
    kinds = {child.type for token in inline for child in token.children or ()}
    assert kinds <= {"text", "text_special", "image", "strong_open", "strong_close", "code_inline"}
    assert [token.tag for token in tokens if token.type == "heading_open"].count("h1") == 1


@pytest.mark.parametrize("text_", ["# a", "- a", "+ a", "1. a", "12) a", "a_b_c", "_a_", "n_latents", "0.3", "−1 to 2"])
def test_markdown_of_a_line(text_: str) -> None:
    from markdown_it import MarkdownIt

    assert MarkdownIt().render(text.markdown(text_)) == f"<p>{text_}</p>\n"


def test_numbers_as_a_paper_would_have_them() -> None:
    assert scientific(5.922e13, 3) == "5.92 × 10¹³"
    assert scientific(-0.5, 3) == "−0.5"
    assert typeset("-0.71 [-1.1, -0.4] at n >= 4096, n-k C >= 3.1e+12") == (
        "−0.71 [−1.1, −0.4] at n\u00a0≥\u00a04096, n-k C\u00a0≥\u00a03.1 × 10¹²"
    )
    assert [duration(s) for s in (14.2, 192, 7500)] == ["14 s", "3 min 12 s", "2 h 05 min"]


def test_the_evaluations_of_cells(tmp_path: Path, cells: Callable[..., Rows]) -> None:
    run = RunDirectory(str(tmp_path))
    run.write_results(cells((512, 1024), (8, 16)))
    for n, k in ((1024, 16), (512, 8)):
        whole = {"metric": "ce_recovered", "value": 0.9 + k / 1000, "low": 0.88, "high": 0.94, "n": 4096, "seed": 0}
        run.write_evals(f"{n}x{k}", "downstream_loss", [whole, whole | {"at": "latent 3", "value": 0.5}])
    run.write_evals("gone", "downstream_loss", [{"metric": "ce_recovered", "value": 0.1}])
    made = analyse(run, FitSettings(0), formats=("html", "md"))
    assert made.reports == (str(tmp_path / "report.html"), str(tmp_path / "report.md"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert made.figure_files() == files
    lines = (tmp_path / "report.md").read_text().splitlines()
    start = lines.index("### Evaluation downstream_loss")
    table = [line for line in lines[start:] if line.startswith("|")][:4]
    assert table == [
        "| cell | ce_recovered |",
        "| --- | ---: |",
        "| N = 512, k = 8 | 0.908 \\[0.88 to 0.94\\] |",
        "| N = 1024, k = 16 | 0.916 \\[0.88 to 0.94\\] |",
    ]
    behind = "Samples behind a value: 4,096."
    assert f"{behind} 2 more rows, of single latents, labels or positions, are in evals.parquet." in lines
    page = (tmp_path / "report.html").read_text()
    assert page.index('id="evaluations"') < page.index("Evaluation downstream_loss") < page.index('id="cells"')


def test_cells_of_several_sites_are_told_apart_in_the_evaluations(cells: Callable[..., Rows]) -> None:
    rows = [
        row | {"cell_id": f"{site}-{row['cell_id']}", "site": site}
        for site in ("late", "early")
        for row in cells((512,), (8,))
    ]
    evals = [
        {
            "cell_id": row["cell_id"],
            "evaluation": "core",
            "metric": "l0",
            "at": "",
            "value": 8.0,
            "low": None,
            "high": None,
            "n": 0,
        }
        for row in rows
    ]
    (table,) = evaluation_tables(pa.Table.from_pylist(evals), Table.from_rows(rows))
    assert [line[0] for line in table.rows] == ["early, N = 512, k = 8", "late, N = 512, k = 8"]


def test_no_cell_is_left_out_of_the_evaluations(cells: Callable[..., Rows]) -> None:
    rows = cells(tuple(range(100, 150)), (8, 16))
    names = [f"metric_{i}" for i in range(5)]
    evals = [
        {"cell_id": row["cell_id"], "evaluation": name, "metric": metric, "at": at, "value": row["k"] / 1000,
         "low": None, "high": None, "n": 3 + (metric == names[0])}
        for row in reversed(rows) for metric in names for name, at in (("whole", ""), ("parts", "b7"), ("whole", "b7"))
        if name == "parts" or metric != names[4] or row["k"] == 8
    ]  # fmt: skip
    found = {table.title: table for table in evaluation_tables(pa.Table.from_pylist(evals), Table.from_rows(rows))}
    whole, parts = found["Evaluation whole"], found["Evaluation parts"]
    assert whole.header == ("cell", *names)
    assert len(whole.rows) == 100
    assert whole.rows[:2] == [
        ["N = 100, k = 8", *["0.008"] * 5],
        ["N = 100, k = 16", *["0.016"] * 4, ""],
    ]
    assert "4 (metric_0); 3 (metric_1, metric_2, metric_3, metric_4). 450 more rows" in whole.note
    assert len(parts.rows) == 200
    assert parts.rows[0][:3] == ["N = 100, k = 8", "metric_0", "b7"]
    assert parts.note.startswith("300 more rows, of single latents")


def test_metrics_stand_beside_nmse(tmp_path: Path) -> None:
    run = write_run(tmp_path, noise=0.004)
    few = FitSettings(0, laws=("n_k",))
    made = analyse(run, few, formats=("html", "md"))
    document = run.read_fits()
    assert document is not None
    assert [fit["law"] for fit in document["fits"]] == ["n_k"]
    assert [(entry["metric"], len(entry["fits"])) for entry in document["metrics"]] == [("sim.falling", 1)]
    assert [entry["metric"] for entry in document["disagreements"]] == ["sim.falling"]
    # It falls along both axes: there is no peak to be told.
    assert [(entry["along"], entry["words"]) for entry in document["peaks"]] == [("k", ""), ("n_latents", "")]
    names = [figure.view.name for figure in made.figures]
    # L(N, k) of the metric next to that of nmse.
    assert names[:2] == ["nmse_against_n", "metric_against_n-sim.falling"]
    assert "metric_against_nmse-sim.falling" in names
    shown = made.figures[1].view
    assert (shown.y.label, shown.formula[0][:28]) == ("sim.falling", "sim.falling = exp(α + β_k ln")
    page = html.unescape((tmp_path / "report.html").read_text()).replace("\u00a0", " ")
    words = "nmse and sim.falling agree about the best (N, k): they order"
    assert page.index('<section id="metrics">') < page.index(words) < page.index('<section id="laws">')
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert any(line.startswith(words) for line in lines)
    start = lines.index("### sim.falling over N and k")
    assert next(line for line in lines[start:] if line.startswith("|")) == "| N | k = 8 | k = 16 | k = 32 | k = 64 |"
    assert is_current(run, few)
    # Declared otherwise, it is another report.
    first = run.read_evals().to_pylist()[0]
    run.write_evals(first["cell_id"], first["evaluation"], run_rows(run, first), {"sim.share": {"better": "higher"}})
    assert not is_current(run, few)


@pytest.mark.slow
def test_metrics_of_several_architectures(tmp_path: Path) -> None:
    run = write_run(tmp_path, noise=0.004)
    rows, evals = run.read_results().to_pylist(), run.read_evals().to_pylist()
    # Of equal cells gated has the lower nmse, and topk the better metric.
    again = [
        row | {"cell_id": f"g{row['cell_id']}", "architecture": "gated", "nmse": 0.9 * row["nmse"]} for row in rows
    ]
    run.write_results([*rows, *again])
    for row in rows:
        own = [e for e in evals if (e["cell_id"], e["metric"]) == (row["cell_id"], "falling")]
        worse = [e | {"value": 1.1 * e["value"]} for e in own]
        if row in rows[:3]:
            worse += [worse[0] | {"metric": "few", "value": row["nmse"] ** 2}]
        declared = {"sim.falling": {"better": "lower"}, "sim.few": {"better": "lower"}}
        run.write_evals(f"g{row['cell_id']}", "sim", worse, declared)
    made = analyse(run, FitSettings(0, laws=("n_k",)), formats=("md",))
    of_falling = [entry["of"] for entry in made.document["metrics"] if entry["metric"] == "sim.falling"]
    assert of_falling == [{"architecture": "topk"}, {"architecture": "gated"}]
    names = {figure.view.name for figure in made.figures}
    assert {"metric_against_n-sim.falling-topk", "metric_against_nmse-sim.falling-gated"} <= names
    (found,) = made.document["disagreements"]
    at_l0 = next(equal for equal in found["equal"] if equal["in"] == "L0")
    # Each of the 24 pairs of one N and k, and those of neighbouring N that lie as near.
    assert len(at_l0["contradictions"]) >= 24
    assert {pair["by_nmse"]["architecture"] for pair in at_l0["contradictions"]} == {"gated"}
    page = (tmp_path / "report.md").read_text()
    lowest = min(row["nmse"] for row in again)
    assert f"The lowest held-out nmse is {lowest:.4f} (gated), at N" in page
    assert "## nmse and other metrics" in page
    assert "nmse prefers gated, N" in page
    assert "The best cell is another: up to L0\u00a0=" in page
    # Values of all kinds are one table, and metrics without a law a sentence.
    lines = page.splitlines()
    (start,) = [place for place, line in enumerate(lines) if line.endswith("sim.falling over N and k")]
    table = [line for line in lines[start:] if line.startswith("|")]
    assert table[0] == "| kind | N | k = 8 | k = 16 | k = 32 | k = 64 |"
    assert [line.split("|")[1].strip() for line in table[2:14]] == [
        name for name in ("topk", "gated") for _ in range(6)
    ]
    assert re.search(r"No law of sim.few \(gated\): 3 of 24 cells have a value that a power law could follow\.", page)
    assert "no law: " not in page


def run_rows(run: RunDirectory, of: dict[str, Any]) -> Rows:
    """The rows of evals.parquet of one evaluation of one cell."""
    same = ("cell_id", "evaluation")
    return [row for row in run.read_evals().to_pylist() if all(row[name] == of[name] for name in same)]


def test_an_exponent_on_its_bound_is_no_outcome(cells: Callable[..., Rows]) -> None:
    def frontier(k: float, a: float, reached: list[bool]) -> dict[str, Any]:
        bounds = [{"name": "a", "value": a, "interval_only": alone} for alone in reached]
        coefficients = {"a": {"value": a, "low": None, "high": None}}
        return {"law": "c", "floor": True, "at": {"k": k}, "coefficients": coefficients, "bounds_reached": bounds}

    results = Table.from_rows(cells((512, 1024), (8, 16)))
    document = {"fits": [frontier(8, 3.0, [False]), frontier(16, 0.5, [True]), frontier(32, 0.7, [])], "skipped": []}
    assert text.summarise(document, results)[-1].endswith("falls as C to the power of −0.50 to −0.70, by k.")
    del document["fits"][1]
    assert text.summarise(document, results)[-1].endswith("falls as C to the power of −0.70 at k\u00a0=\u00a032.")
    del document["fits"][1]
    assert "frontier" not in " ".join(text.summarise(document, results))
