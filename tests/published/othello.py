"""What the card says of the run of deploy/sweeps/othello.yaml, and of the one over all layers."""

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from saescale.scaling.metrics import metrics_table
from saescale.storage.rundir import RunDirectory
from tests.published.page import ROOT, DataSet, Fits, Rows, interval, table

FOLDER = ROOT / "deploy" / "results" / "othello"
TRAINED, UNTRAINED = "othello", "othello-random"
RECONSTRUCTION, COVERAGE, TOLD = (f"board_recovery.{name}" for name in ("reconstruction", "coverage", "tiles_told"))
BESIDE = {
    "channels": "coordinates of x, both signs", "neurons": "neurons of the layer's MLP",
    "untrained": "coordinates, random weights", "random": "random directions with TopK, the best of any N and k",
}  # fmt: skip
# What latents of a layer tell, and beside it what neurons, and coordinates with random weights, do.
TELL = ("tile_pairs", "stable_pairs", "tiles_told", "coverage", "reconstruction")
WHOSE = ("", "_neurons", "_untrained")
OF_LAYERS = ("accuracy", "accuracy_untrained", *(f"{name}{whose}" for name in TELL for whose in WHOSE))


class Boards(DataSet):
    """With the metrics of each cell in its row, and a table of layers."""

    def take_over(self, run: Path, *others: Path) -> None:
        super().take_over(run)
        self._write(
            "results", metrics_table(pq.read_table(run / "results.parquet"), RunDirectory(str(run)).read_evals())
        )
        for layers in others:
            self._write("layers", _layers_of(RunDirectory(str(layers))))

    def _write(self, name: str, content: pa.Table) -> None:
        content = content.select(
            [column for column in content.column_names if content[column].null_count < len(content)]
        )
        pq.write_table(content, self.folder / f"{name}.parquet")
        pyarrow.csv.write_csv(content, self.folder / f"{name}.csv")


def _layers_of(run: RunDirectory) -> pa.Table:
    """What probes and latents tell of the board at each layer: rows of evals.parquet, with the cell's site, N and k."""
    cells = {row["cell_id"]: row for row in run.read_results().to_pylist()}
    rows = [
        {**{name: cells[row["cell_id"]][name] for name in ("site", "n_latents", "k")},
         **{name: row[name] for name in ("metric", "at", "value", "low", "high", "n")}}
        for row in run.read_evals().to_pylist() if row["metric"] in OF_LAYERS
    ]  # fmt: skip
    return pa.Table.from_pylist(
        sorted(rows, key=lambda row: [str(row[name]) for name in ("site", "k", "metric", "at")])
    )


def parts(rows: Rows, fits: Fits) -> dict[str, str]:
    """Markdown by name."""
    return {
        "grid": _grid(rows), "recovery": _recovery(rows), "beside": _beside(rows), "peaks": _peaks(fits),
        "laws": _laws(fits), **_layers(),
    }  # fmt: skip


def _levels(rows: Rows, name: str) -> list[int]:
    return sorted({int(row[name]) for row in rows})


def _grid(rows: Rows) -> str:
    sizes, ks = (", ".join(f"{value:,}" for value in _levels(rows, name)) for name in ("n_latents", "k"))
    (tokens,) = {int(row["tokens"]) for row in rows}
    return (
        f"What one `saescale sweep deploy/sweeps/othello.yaml` measured: {len(rows)} TopK SAEs, N in {{{sizes}}} "
        f"x\nk in {{{ks}}} on a model that knows the board and on the same one with random weights, trained on\n"
        f"{tokens:,} tokens each, none of them twice."
    )


def _cells(rows: Rows, subject: str) -> dict[tuple[int, int], dict[str, str]]:
    return {(int(row["n_latents"]), int(row["k"])): row for row in rows if row["subject"] == subject}


def _recovery(rows: Rows) -> str:
    trained, untrained = _cells(rows, TRAINED), _cells(rows, UNTRAINED)
    lines = []
    for (n, k), row in sorted(trained.items()):
        value, low, high = (f"{float(row[RECONSTRUCTION + end]):.3f}" for end in ("", ".low", ".high"))
        random = untrained[n, k]
        lines.append([
            f"{n:,}", str(k), f"{float(row['nmse']):.4f}", f"{value} ({low} to {high})",
            *(f"{float(row[name]):.3f}" for name in (COVERAGE, TOLD, "board_probe.accuracy_x_hat")),
            f"{100 * float(row['dead_fraction']):.0f} %",
            f"{float(random['nmse']):.4f}", f"{float(random[RECONSTRUCTION]):.3f}",
        ])  # fmt: skip
    head = ["N", "k", "nmse", "reconstruction", "coverage", "tiles told", "probes of x_hat", "dead",
            "random weights: nmse", "reconstruction"]  # fmt: skip
    return table(head, lines)


def _beside(rows: Rows) -> str:
    cells = _cells(rows, TRAINED).values()
    lines = []
    for name, words in BESIDE.items():
        found = [max(float(row[f"{metric}_{name}"]) for row in cells) for metric in (RECONSTRUCTION, COVERAGE, TOLD)]
        lines.append([words, *(f"{value:.3f}" for value in found)])
    always = max(float(row["board_recovery.coverage_always"]) for row in cells)
    lines.append(["a latent that is always active", "", f"{always:.3f}", ""])
    best = [f"{max(float(row[metric]) for row in cells):.3f}" for metric in (RECONSTRUCTION, COVERAGE, TOLD)]
    lines.append(["the best SAE", *best])
    return table(["", "reconstruction", "coverage", "tiles told"], lines)


def _peaks(fits: Fits) -> str:
    """Where each metric is best along k, of either subject: over all N, and what peaks at each."""
    wanted = (RECONSTRUCTION, COVERAGE, TOLD, "board_probe.accuracy_x_hat")
    lines = []
    for entry in fits["peaks"]:
        if entry["metric"] in wanted and entry["along"] == "k":
            for best in entry["best"] if entry["metric"] == RECONSTRUCTION else entry["best"][-1:]:
                n = "all" if best["n_latents"] is None else f"{best['n_latents']:,.0f}"
                cell, lowest = best["best_cells"], best["lowest_nmse"]
                lines.append([
                    entry["of"].get("subject", TRAINED), entry["metric"], n, _place(best),
                    f"{cell['value']:.3f} at {cell['k']:g}", f"{lowest['value']:.3f} at {lowest['k']:g}",
                    "yes" if best["nmse_falls"] else "no",
                ])  # fmt: skip
    head = ["subject", "metric", "N", "peak in k (95 %)", "best cell", "lowest nmse", "nmse falls at every step"]
    return table(head, lines)


def _place(best: dict[str, Any]) -> str:
    peak = best["peak"]
    if peak is None:
        return f"none; best at {best['best_cells']['k']:g}"
    ends = [f"{end:.1f}" if end is not None else f"{word} {tried:g}" for end, word, tried in
            zip((peak["low"], peak["high"]), ("below", "above"), best["tried"], strict=True)]  # fmt: skip
    return f"{peak['value']:.1f} ({' to '.join(ends)})"


def _laws(fits: Fits) -> str:
    """L(N, k) of nmse and of what is recovered: exponents of n at the smallest and the largest k."""
    lines = []
    kinds = [(fit, "nmse") for fit in fits["fits"] if fit["law"] == "n_k"]
    kinds += [(fit, entry["fitted"]) for entry in fits["metrics"] if entry["metric"].startswith("board_recovery")
              for fit in entry["fits"]]  # fmt: skip
    for fit, what in kinds:
        at = fit["exponent_of_n_at_k"]
        ends = [f"{interval(at[k], 2)} at k = {k}" for k in (min(at, key=float), max(at, key=float))]
        lines.append([fit["of"].get("subject", TRAINED), f"`{what}`", *ends, f"{100 * fit['rms_log_residual']:.1f} %"])
    return table(["subject", "law of", "exponent of n", "", "rms"], lines)


def _layers() -> dict[str, str]:
    with (FOLDER / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = min(int(row["k"]) for row in rows)
    found = {(row["site"], row["metric"], row["at"]): float(row["value"]) for row in rows if int(row["k"]) == first}
    probes, latents = [], []
    for site in sorted({site for site, _, _ in found}):
        layer = site.rpartition(".")[2]
        parts = [f"{found[site, 'accuracy', at]:.3f}" for at in ("", "corner", "edge", "inside", "changed")]
        probes.append([layer, *parts, f"{found[site, 'accuracy_untrained', '']:.3f}"])
        told = [
            ", ".join(f"{found[site, f'{name}{whose}', at]:{form}}" for whose in WHOSE)
            for name, at, form in (("tile_pairs", "", ".0f"), ("stable_pairs", "du2025", ".0f"),
                                   ("stable_pairs", "strict", ".0f"), *((name, "", ".3f") for name in TELL[2:]))
        ]  # fmt: skip
        latents.append([layer, *told])
    of_probes = ["layer", "all", "corners", "edges", "inside", "changed discs", "all, random weights"]
    of_latents = ["layer", "pairs with a tile", "with a stable disc (du2025)", "(strict)", "tiles told", "coverage",
                  "reconstruction"]  # fmt: skip
    return {"layers": table(of_probes, probes), "layers_latents": table(of_latents, latents)}


DATA = Boards(
    FOLDER,
    {FOLDER / "README.md": ("grid", "recovery", "beside", "peaks", "laws", "layers", "layers_latents")},
    (f"metric_against_k-{RECONSTRUCTION}.png", "boards.png"),
    parts,
)
