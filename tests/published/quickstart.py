"""What README.md and the card say of the run of `saescale quickstart`."""

from tests.published.page import ROOT, DataSet, Fits, Rows, interval, percent, table

FOLDER = ROOT / "deploy" / "results" / "quickstart"


def parts(rows: Rows, fits: Fits) -> dict[str, str]:
    """Markdown by name."""
    return {
        "nmse": _nmse(rows), "fit": _fit(rows, fits), "grid": _grid(rows), "compute": _compute(rows, fits),
    }  # fmt: skip


def _levels(rows: Rows) -> tuple[list[int], list[int]]:
    return sorted({int(row["n_latents"]) for row in rows}), sorted({int(row["k"]) for row in rows})


def _nmse(rows: Rows) -> str:
    sizes, ks = _levels(rows)
    found = {(int(row["n_latents"]), int(row["k"])): float(row["nmse"]) for row in rows}
    return table(["N", *(f"k = {k}" for k in ks)], [[f"{n:,}", *(f"{found[n, k]:.4f}" for k in ks)] for n in sizes])


def _fit(rows: Rows, fits: Fits) -> str:
    law = next(fit for fit in fits["fits"] if fit["law"] == "n_k")
    held = law["holdout"]
    sizes, ks = _levels(rows)
    largest = f"N = {sizes[-1]:,}"
    said = (
        f"The law meets the {law['points']} cells within {percent(law['rms_log_residual'])} (rms) and, fitted without "
        f"{largest}, predicts those\n{held['points']} within {percent(held['rms_log_error'])}."
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


def _compute(rows: Rows, fits: Fits) -> str:
    """L(C) at each k."""
    lines = []
    for k in _levels(rows)[1]:
        without, floor = (_of_compute(fits, k, has) for has in (False, True))
        lines.append([
            str(k), interval(without["coefficients"]["a"]), percent(without["rms_log_residual"]),
            interval(floor["coefficients"]["a"]), percent(floor["rms_log_residual"]),
        ])  # fmt: skip
    head = ["k", "a of A C^-a", "rms", "a of A C^-a + E", "rms"]
    return table(head, lines)


def _of_compute(fits: Fits, k: int, floor: bool) -> Fits:
    return next(f for f in fits["fits"] if f["law"] == "c" and f["at"]["k"] == k and f["floor"] is floor)


DATA = DataSet(
    FOLDER,
    {ROOT / "README.md": ("nmse", "fit"), FOLDER / "README.md": ("grid", "compute")},
    ("nmse_against_n.png", "nmse_against_compute.png"),
    parts,
)
