"""What the card says of the run of deploy/sweeps/architectures.yaml."""

from typing import Any

from tests.published.page import ROOT, DataSet, Fits, Rows, interval, percent, table

FOLDER = ROOT / "deploy" / "results" / "architectures"
CLAIMED = (("topk", "prolu"), ("gated", "prolu"), ("prolu", "relu"))  # the first is ahead, as published


def parts(rows: Rows, fits: Fits) -> dict[str, str]:
    """Markdown by name."""
    (compared,) = fits["comparison"]
    return {
        "grid": _grid(rows), "nmse": _nmse(rows, compared), "order": _order(compared), "claims": _claims(compared),
        "compute": _compute(compared), "baselines": _baselines(compared), "hierarchy": _hierarchy(compared),
    }  # fmt: skip


def _grid(rows: Rows) -> str:
    sizes, ks = (", ".join(f"{value:,}" for value in _levels(rows, name)) for name in ("n_latents", "k"))
    (tokens,) = {int(row["tokens"]) for row in rows}
    architectures = len({row["architecture"] for row in rows})
    return (
        f"What one `saescale sweep deploy/sweeps/architectures.yaml` measured: {len(rows)} SAEs, {architectures} "
        f"architectures x N in {{{sizes}}} x\nk in {{{ks}}}, trained on the same {tokens:,} tokens in the same order."
    )


def _levels(rows: Rows, name: str) -> list[int]:
    return sorted({int(row[name]) for row in rows})


def _nmse(rows: Rows, compared: Fits) -> str:
    """At the smallest and the largest N; L0 and dead latents over all cells of an architecture."""
    sizes, ks = _levels(rows, "n_latents"), _levels(rows, "k")
    shown = [(n, k) for n in (sizes[0], sizes[-1]) for k in ks]
    lines = []
    for architecture in compared["order"]["architectures"]:
        own = [row for row in rows if row["architecture"] == architecture]
        nmse = {(int(row["n_latents"]), int(row["k"])): float(row["nmse"]) for row in own}
        off = max((float(row["l0"]) / int(row["k"]) - 1 for row in own), key=abs)
        dead = max(float(row["dead_fraction"]) for row in own)
        lines.append([architecture, *(f"{nmse[cell]:.3f}" for cell in shown), f"{100 * off:+.1f} %", percent(dead)])
    return table(["", *(f"N = {n:,}, k = {k}" for n, k in shown), "L0 off k", "dead"], lines)


def _order(compared: Fits) -> str:
    """nmse over that of TopK at equal N and L0, from the best to the worst."""
    lines = []
    for architecture in compared["order"]["architectures"]:
        found = _ratio(compared, architecture, compared["reference"])
        lines.append([architecture, "1" if found is None else interval(found)])
    words = compared["order"]["words"]
    return f"In order (`~`: not told apart): {words}.\n\n" + table(["", "nmse over TopK's"], lines)


def _claims(compared: Fits) -> str:
    lines = []
    for first, second in CLAIMED:
        found = _ratio(compared, first, second)
        assert found is not None
        holds = "holds" if found["high"] < 1 else "contradicted" if found["low"] > 1 else "not told apart"
        lines.append([f"{first} ahead of {second}", interval(found), holds])
    return table(["published", "ratio of nmse", ""], lines)


def _ratio(compared: Fits, first: str, second: str) -> dict[str, float] | None:
    """nmse of the first over that of the second, with its interval; None of one and the same."""
    for pair in compared["order"]["pairs"]:
        found: dict[str, Any] = pair["ratio_of_nmse"]
        if (pair["first"], pair["second"]) == (first, second):
            return found
        if (pair["first"], pair["second"]) == (second, first):
            return {"value": 1 / found["value"], "low": 1 / found["high"], "high": 1 / found["low"]}
    return None


def _compute(compared: Fits) -> str:
    """Sparse training FLOPs over those of TopK for equal nmse, at each k."""
    found = {(entry["architecture"], entry["k"]): entry for entry in compared["equal_nmse"]}
    ks = sorted({k for _, k in found})
    lines = []
    for architecture in compared["order"]["architectures"]:
        own = [found.get((architecture, k)) for k in ks]
        if architecture != compared["reference"] and any(entry and entry["median"] for entry in own):
            lines.append([architecture, *(_median(entry) for entry in own)])
    return table(["", *(f"k = {k:g}" for k in ks)], lines)


def _median(entry: Fits | None) -> str:
    return interval(entry["median"], 2) if entry and entry["median"] else "nmse not reached"


def _baselines(compared: Fits) -> str:
    missed: dict[tuple[str, str], list[str]] = {}
    for entry in compared["unbeaten"]:
        where = f"N = {entry['n_latents']:,.0f}, k = {entry['k']:g}"
        missed.setdefault((entry["architecture"], entry["baseline"]), []).append(where)
    if not missed:
        return "Every trained architecture beats all three baselines at each N and L0."
    said = [
        f"{architecture} does not beat {baseline} at {'; '.join(at)}" for (architecture, baseline), at in missed.items()
    ]
    return "\n".join(
        ["Trained architectures beat the three baselines everywhere, but:", "", *(f"- {line}" for line in said)]
    )


def _hierarchy(compared: Fits) -> str:
    """nmse of hierarchical_topk's levels over TopK trained for that k, less 1."""
    gaps = compared["hierarchy"]["gaps"]
    lines = [
        [f"{gap['n_latents']:,.0f}", f"{gap['trained_with_k']:g}", f"{gap['k']:g}", percent(gap["gap"]["value"])]
        for gap in gaps
    ]
    return table(["N", "trained with k", "level", "above TopK"], lines)


DATA = DataSet(
    FOLDER,
    {
        FOLDER / "README.md": ("grid", "nmse", "order", "claims", "compute", "baselines", "hierarchy"),
    },
    ("order.png", "compute_ratio.png", "hierarchy.png", "frontier-n2048.png"),
    parts,
)
