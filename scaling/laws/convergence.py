"""How many tokens a cell takes to converge, as a power of its number of latents."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from saescale.scaling.laws.estimate import Fit, fit_law
from saescale.scaling.laws.law import Exponent, Law, Term
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table
from saescale.storage.errors import SaescaleError

WITHIN = 0.02  # of its final nmse: where a cell counts as converged
_N = Exponent("g", ("n_latents",))
_AT_ONE_K = Law("convergence", "D = G n^g", ("n_latents",), (Term("G", (_N,)),), target="tokens")
_OVER_K = Law(
    "convergence", "D = G n^g k^h", ("n_latents", "k"), (Term("G", (_N, Exponent("h", ("k",)))),), target="tokens"
)


@dataclass(frozen=True)
class Convergence:
    """Tokens at which each cell's held-out nmse comes within 2 % of its final one, and their law.

    `fit` is None where `reason` says why; `rows` are cells that converged, `unconverged` how many did not: those whose
    nmse at three quarters of their tokens was not yet within 2 % of the final one, which is no limit then. `early`:
    how many converged before their first evaluation, at tokens that are not known.
    """

    rows: tuple[dict[str, float | str], ...]
    unconverged: int
    fit: Fit | None
    reason: str = ""
    early: int = 0

    def document(self) -> dict[str, Any]:
        """As in fits.json; `exponent_of_n` is what Gao et al. 2024 give as about 0.6."""
        document: dict[str, Any] = {
            "within": WITHIN, "cells": list(self.rows), "unconverged": self.unconverged,
            "converged_before_first_evaluation": self.early,
        }  # fmt: skip
        if self.fit is None:
            return document | {"reason": self.reason}
        return document | {
            "formula": self.fit.law.formula,
            "coefficients": self.fit.coefficients(),
            "exponent_of_n": self.fit.coefficients()["g"],
            "rms_log_residual": self.fit.rms_log_residual,
        }


def find_convergence(cells: Table, curves: Table, settings: FitSettings) -> Convergence:
    """Of `cells` (cell_id, n_latents, k) with their `curves` (cell_id, tokens, nmse), with a bootstrap over cells."""
    rows: list[dict[str, float | str]] = []
    unconverged = early = 0
    usable = np.isfinite(curves["nmse"]) & (curves["nmse"] > 0) & (curves["tokens"] > 0)
    of_cell = curves.rows_of("cell_id")
    for row, cell_id in enumerate(cells["cell_id"].tolist()):
        own = of_cell.get(cell_id)
        if own is None or (own := own[usable[own]]).size < 4:
            continue
        own = own[np.argsort(curves["tokens"][own])]
        tokens, nmse = curves["tokens"][own], curves["nmse"][own]
        reached = _reached(tokens, nmse)
        if reached is None:
            early += 1
            continue
        if reached > 0.75 * tokens[-1]:
            unconverged += 1
            continue
        sizes = {"n_latents": float(cells["n_latents"][row]), "k": float(cells["k"][row])}
        rows.append({"cell_id": str(cell_id), **sizes, "tokens": reached})
    if not rows:
        return Convergence((), unconverged, None, _none_of(unconverged, early), early)
    columns = {name: np.array([float(r[name]) for r in rows]) for name in ("n_latents", "k", "tokens")}
    law = _OVER_K if len(np.unique(columns["k"])) > 1 else _AT_ONE_K
    try:
        fit = fit_law(law, columns, columns["tokens"], settings)
    except SaescaleError as error:
        return Convergence(tuple(rows), unconverged, None, f"of cells that converged: {error}", early)
    return Convergence(tuple(rows), unconverged, fit, early=early)


def _none_of(unconverged: int, early: int) -> str:
    """Why there is no cell whose tokens to convergence are known."""
    if early:
        more = f"; {unconverged} did not converge" if unconverged else ""
        return f"{early} cells converged before their first evaluation{more}: evaluate earlier"
    return f"no cell with a curve converged ({unconverged} did not)"


def _reached(tokens: np.ndarray, nmse: np.ndarray) -> float | None:
    """Tokens after which a curve stays within `WITHIN` of its end, between evaluations by interpolation in ln tokens;
    None where it does from its first evaluation on, which says only that it was earlier."""
    excess = np.log(nmse / nmse[-1]) - np.log1p(WITHIN)
    above = np.flatnonzero(excess > 0)
    if not len(above):
        return None
    last = int(above[-1])
    share = excess[last] / (excess[last] - excess[last + 1])
    return float(np.exp(np.log(tokens[last]) + share * np.log(tokens[last + 1] / tokens[last])))
