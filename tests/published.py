"""What README.md and the data set's card say of the published run, made from deploy/results/quickstart.

    python -m tests.published              # writes it into the pages anew
    python -m tests.published RUN          # first takes results, curves, laws and figures of that run directory over

On a page each part stands between `<!-- published: NAME -->` and `<!-- end -->`; a test compares it with what is made
here. Whatever stands outside of these parts is written by hand, and has to be read again after a new run.
"""

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
DATA = ROOT / "deploy" / "results" / "quickstart"
PAGES = {ROOT / "README.md": ("nmse", "fit"), DATA / "README.md": ("grid", "compute")}
FIGURES = ("nmse_against_n.png", "nmse_against_compute.png")

Rows = list[dict[str, str]]


def take_over(run: Path) -> None:
    for name in ("results", "curves"):
        shutil.copy(run / f"{name}.parquet", DATA / f"{name}.parquet")
        pyarrow.csv.write_csv(pq.read_table(run / f"{name}.parquet"), DATA / f"{name}.csv")
    shutil.copy(run / "fits.json", DATA / "fits.json")
    for name in FIGURES:
        shutil.copy(run / "figures" / name, DATA / name)


def parts() -> dict[str, str]:
    """Markdown by name."""
    with (DATA / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    fits = json.loads((DATA / "fits.json").read_text())
    return {
        "nmse": _nmse(rows), "fit": _fit(rows, fits), "grid": _grid(rows), "compute": _compute(rows, fits),
    }  # fmt: skip


def _levels(rows: Rows) -> tuple[list[int], list[int]]:
    return sorted({int(row["n_latents"]) for row in rows}), sorted({int(row["k"]) for row in rows})


def _nmse(rows: Rows) -> str:
    sizes, ks = _levels(rows)
    found = {(int(row["n_latents"]), int(row["k"])): float(row["nmse"]) for row in rows}
    return _table(["N", *(f"k = {k}" for k in ks)], [[f"{n:,}", *(f"{found[n, k]:.4f}" for k in ks)] for n in sizes])


def _fit(rows: Rows, fits: dict[str, Any]) -> str:
    law = next(fit for fit in fits["fits"] if fit["law"] == "n_k")
    held = law["holdout"]
    sizes, ks = _levels(rows)
    largest = f"N = {sizes[-1]:,}"
    said = (
        f"The law meets the {law['points']} cells within {_percent(law['rms_log_residual'])} (rms) and, fitted without "
        f"{largest}, predicts those\n{held['points']} within {_percent(held['rms_log_error'])}."
    )
    low, high = (_of_compute(fits, k, floor=False)["coefficients"]["a"]["value"] for k in (ks[0], ks[-1]))
    return said + f" Over compute nmse falls as C^-{low:.2f} at k = {ks[0]} to C^-{high:.2f} at k = {ks[-1]}."


def _grid(rows: Rows) -> str:
    sizes, ks = (", ".join(f"{value:,}" for value in values) for values in _levels(rows))
    (tokens,) = {int(row["tokens"]) for row in rows}
    return (
        f"What one run of `saescale quickstart` measured: {len(rows)} TopK SAEs, N in {{{sizes}}} x k in\n{{{ks}}}, "
        f"trained alike on {tokens:,} tokens each of the residual stream of a language model."
    )


def _compute(rows: Rows, fits: dict[str, Any]) -> str:
    """L(C) at each k."""
    table = []
    for k in _levels(rows)[1]:
        without, floor = (_of_compute(fits, k, has) for has in (False, True))
        table.append([
            str(k), _interval(without["coefficients"]["a"]), _percent(without["rms_log_residual"]),
            _interval(floor["coefficients"]["a"]), _percent(floor["rms_log_residual"]),
        ])  # fmt: skip
    head = ["k", "a of A C^-a", "rms", "a of A C^-a + E", "rms"]
    return _table(head, table)


def _of_compute(fits: dict[str, Any], k: int, floor: bool) -> dict[str, Any]:
    return next(f for f in fits["fits"] if f["law"] == "c" and f["at"]["k"] == k and f["floor"] is floor)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def put(text: str, name: str, content: str) -> str:
    """A page's text with that part replaced. Raises ValueError where it has no such part."""
    pattern = re.compile(rf"(<!-- published: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"no part <!-- published: {name} -->, or several")
    replace: Callable[[re.Match[str]], str] = lambda match: match[1] + content + match[2]  # noqa: E731
    return pattern.sub(replace, text)


def page(path: Path) -> str:
    """The text that it should have."""
    text, made = path.read_text(), parts()
    for name in PAGES[path]:
        text = put(text, name, made[name])
    return text


if __name__ == "__main__":
    if sys.argv[1:]:
        take_over(Path(sys.argv[1]))
    for path in PAGES:
        path.write_text(page(path))
        print(f"wrote {path.relative_to(ROOT)}")
