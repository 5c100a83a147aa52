"""When a cell counts as converged, the one rule, and how many tokens that takes, as a power of its latents."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from saescale.scaling.laws.estimate import Fit, fit_law
from saescale.scaling.laws.law import Exponent, Law, Term
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table, size_of
from saescale.scaling.words import listed
from saescale.storage.errors import SaescaleError

WITHIN = 0.02  # of its final nmse: where a cell counts as converged
_QUARTER = 0.75  # of its tokens, from where on it has to
LEAST_POINTS = 3  # evaluations below which a curve says nothing
_N = Exponent("g", ("n_latents",))
_AT_ONE_K = Law("convergence", "D = G n^g", ("n_latents",), (Term("G", (_N,)),), target="tokens")
_OVER_K = Law(
    "convergence", "D = G n^g k^h", ("n_latents", "k"), (Term("G", (_N, Exponent("h", ("k",)))),), target="tokens"
)


class Ending(NamedTuple):
    """How a curve of held-out nmse ends. `above`: by how much of the final nmse it still lay above it over the last
    quarter of its tokens, at most. `reached`: the tokens after which it stays within 2 % of it; None where it does
    from its first evaluation on, which says only that it was earlier."""

    above: float
    reached: float | None

    @property
    def converged(self) -> bool:
        """The one rule, for warnings, the law of tokens and everything that is said of them: over the last quarter of
        its tokens a converged cell stays within 2 % of its final nmse."""
        return self.above <= WITHIN


def ending(tokens: np.ndarray, nmse: np.ndarray) -> Ending:
    """Of a curve [evaluations], tokens increasing; between evaluations ln nmse is linear in ln tokens."""
    at, excess = np.log(tokens), np.log(nmse / nmse[-1])
    quarter = np.log(_QUARTER) + at[-1]
    late = np.append(excess[at >= quarter], np.interp(quarter, at, excess))
    outside = np.flatnonzero(excess > np.log1p(WITHIN))
    if not len(outside):
        return Ending(float(np.expm1(late.max())), None)
    last = int(outside[-1])
    share = (excess[last] - np.log1p(WITHIN)) / (excess[last] - excess[last + 1])
    return Ending(float(np.expm1(late.max())), float(np.exp(at[last] + share * (at[last + 1] - at[last]))))


@dataclass(frozen=True)
class Convergence:
    """Tokens at which each cell's held-out nmse comes within 2 % of its final one, and their law.

    `fit` is None where `reason` says why; `rows` are cells that converged, `falling` those that did not, in words; the
    final nmse of these is no limit. `early`: how many converged before their first evaluation, at unknown tokens.
    """

    rows: tuple[dict[str, float | str], ...]
    falling: tuple[str, ...]
    fit: Fit | None
    reason: str = ""
    early: int = 0

    @property
    def unconverged(self) -> int:
        """How many cells did not converge."""
        return len(self.falling)

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


def unconverged(found: Iterable[Convergence]) -> list[str]:
    """What must be said of the cells that did not converge."""
    falling = [words for each in found for words in each.falling]
    if not falling:
        return []
    return [
        f"{len(falling)} cells are not converged, over the last quarter of training their held-out nmse was "
        f"still more than {WITHIN:.0%} above its end ({listed(falling)}): L(N, k) describes this budget of "
        "tokens, not convergence"
    ]


def find_convergence(cells: Table, curves: Table, settings: FitSettings) -> Convergence:
    """Of `cells` (cell_id, n_latents, k) with their `curves` (cell_id, tokens, nmse), with a bootstrap over cells."""
    rows: list[dict[str, float | str]] = []
    falling: list[str] = []
    early = 0
    usable = np.isfinite(curves["nmse"]) & (curves["nmse"] > 0) & (curves["tokens"] > 0)
    of_cell = curves.rows_of("cell_id")
    for row, cell_id in enumerate(cells["cell_id"].tolist()):
        own = of_cell.get(cell_id)
        if own is None or (own := own[usable[own]]).size < LEAST_POINTS:
            continue
        own = own[np.argsort(curves["tokens"][own])]
        end = ending(curves["tokens"][own], curves["nmse"][own])
        if not end.converged:
            falling.append(f"{size_of(cells, row)}: {end.above:.1%}")
        elif end.reached is None:
            early += 1
        else:
            sizes = {"n_latents": float(cells["n_latents"][row]), "k": float(cells["k"][row])}
            rows.append({"cell_id": str(cell_id), **sizes, "tokens": end.reached})
    found = Convergence(tuple(rows), tuple(falling), None, early=early)
    fit, reason = _fit(found, settings)
    return Convergence(found.rows, found.falling, fit, reason, early)


def _fit(found: Convergence, settings: FitSettings) -> tuple[Fit | None, str]:
    """The law of the cells that converged, or why there is none."""
    if not found.rows:
        return None, _none_of(found.unconverged, found.early)
    columns = {name: np.array([float(row[name]) for row in found.rows]) for name in ("n_latents", "k", "tokens")}
    law = _OVER_K if len(np.unique(columns["k"])) > 1 else _AT_ONE_K
    try:
        return fit_law(law, columns, columns["tokens"], settings), ""
    except SaescaleError as error:
        return None, f"of cells that converged: {error}"


def _none_of(unconverged: int, early: int) -> str:
    """Why there is no cell whose tokens to convergence are known."""
    if early:
        more = f"; {unconverged} did not converge" if unconverged else ""
        return f"{early} cells converged before their first evaluation{more}: evaluate earlier"
    return f"no cell with a curve converged ({unconverged} did not)"
