"""Sweeps of several architectures with known truth: each is TopK's law times a factor, at so many times its compute."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Rows = list[dict[str, Any]]
SIZES, KS, SEEDS = (512, 1024, 2048, 4096), (8, 16, 32), (0, 1)
TOKENS, D_MODEL, EVALUATIONS = 4_000_000, 768, 40


class Known(NamedTuple):
    """`worse`: nmse over TopK's at equal N and L0. `cost`: compute over TopK's for equal training. `l0`: over k.
    `dead`: share of the latents."""

    worse: float = 1.0
    cost: float = 1.0
    l0: float = 1.0
    dead: float = 0.01


# As different as they are in the field, in order of what they reach; the last three hardly learn.
ALL = {
    "batchtopk": Known(0.985),
    "topk": Known(),
    "jumprelu": Known(1.01, l0=1.02, dead=0.2),
    "gated": Known(1.02, 1.6, 0.97),
    "hierarchical_topk": Known(1.04, l0=0.99),
    "matryoshka": Known(1.06),
    "prolu": Known(1.1, 1.3, 1.04),
    "mine": Known(1.12),
    "relu": Known(1.22, 1.3, 0.96),
    "switch": Known(1.35, 0.3),
    "frozen_encoder": Known(1.7),
    "pca": Known(1.9, dead=0.3),
    "frozen_decoder": Known(2.3),
}


def law(n: float, l0: float) -> float:
    """TopK's nmse: falls with N more steeply at a larger L0, above a floor that falls with L0."""
    return float(np.exp(0.1 - 0.16 * np.log(l0) - (0.05 + 0.03 * np.log(l0)) * np.log(n)) + 0.05 * l0**-0.15)


def known_arms(
    arms: Mapping[str, Known] = ALL,
    sizes: Sequence[int] = SIZES,
    ks: Sequence[int] = KS,
    seeds: Sequence[int] = SEEDS,
    noise: float = 0.004,
    seed: int = 0,
    **shared: Any,
) -> Rows:
    """Rows of results.parquet; `noise` is the standard deviation of ln nmse of a cell. `shared` are further columns."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, arm in arms.items():
        for n in sizes:
            for k in ks:
                for s in seeds:
                    nmse = arm.worse * law(n, arm.l0 * k)
                    row = {
                        "cell_id": "-".join([name, f"n{n}", f"k{k}", f"s{s}", *(str(v) for v in shared.values())]),
                        "subject": "known", "site": "resid_post.8", "d_model": D_MODEL, "n_latents": n, "k": k,
                        "architecture": name, "seed": s, "lr": 1e-3, "tokens": TOKENS,
                        "flops": arm.cost * TOKENS * (2.0 * n * D_MODEL + 8 * k * D_MODEL),
                        "nmse": nmse * np.exp(noise * rng.standard_normal()), "l0": arm.l0 * k,
                        "l0_error": arm.l0 - 1 if arm.l0 != 1 else None,
                        "dead_fraction": arm.dead, "wall_s": 10.0, "status": "done", "levels": None,
                    }  # fmt: skip
                    if name == "hierarchical_topk":
                        row["levels"] = json.dumps(levels(n, k, row["nmse"] / nmse))
                    rows.append(row | shared)
    return rows


def levels(n: int, k: int, factor: float) -> list[dict[str, float]]:
    """What a hierarchical cell has at every k up to its own: the further below it, the wider the gap to TopK's,
    1.04 (k / its k)^-0.02."""
    return [
        {"k": level, "nmse": factor * law(n, level) * 1.04 * (level / k) ** -0.02, "l0": level}
        for level in KS if level <= k
    ]  # fmt: skip


def known_curves(rows: Rows) -> Rows:
    """Rows of curves.parquet that end in these: larger cells take longer, and nothing of them is noise of their own."""
    curves = []
    for row in rows:
        for done in np.linspace(0, 1, EVALUATIONS + 1)[1:]:
            behind = np.exp(-done / (0.08 * (row["n_latents"] / 512) ** 0.5))
            curves.append(
                {
                    "cell_id": row["cell_id"], "step": int(done * 1000), "tokens": int(done * row["tokens"]),
                    "flops": row["flops"] * done, "nmse": row["nmse"] * (1 + behind), "l0": row["l0"],
                    "dead_fraction": row["dead_fraction"],
                }
            )  # fmt: skip
    return curves
