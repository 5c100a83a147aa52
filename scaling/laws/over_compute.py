"""Laws of compute: of the frontier at each k, and of its compute-optimal points."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from saescale.scaling.laws.attempt import Skipped, fit_forms, held_out
from saescale.scaling.laws.checks import fit_warnings, frontier_warnings
from saescale.scaling.laws.estimate import Fit
from saescale.scaling.laws.frontier import Curve, Frontier, find_frontier, fit_frontier, frontier_of_ends
from saescale.scaling.laws.isoflop import IsoFlop, fit_isoflop
from saescale.scaling.laws.law import Law
from saescale.scaling.laws.over_cells import by_k
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.tables import Table, number
from saescale.storage.errors import SaescaleError


def find_frontiers(
    cells: Table, curves_at: Mapping[float, tuple[Curve, ...]] | None
) -> tuple[list[Frontier], list[Skipped]]:
    """The frontier at each k, from curves where there are any (None: from the ends of cells)."""
    if curves_at is None:
        try:
            cells.require(("flops",))
        except SaescaleError as error:
            return [], [Skipped("c", {}, False, f"without curves law c takes the flops of cells: {error}")]
        return [frontier_of_ends(at, own) for at, own in by_k(cells)], []
    frontiers: list[Frontier] = []
    skipped: list[Skipped] = []
    for k, curves in curves_at.items():
        try:
            frontiers.append(find_frontier({"k": k}, curves))
        except SaescaleError as error:
            skipped.append(Skipped("c", {"k": k}, False, str(error)))
    return frontiers, skipped


def fit_compute(forms: tuple[Law, ...], frontier: Frontier, settings: FitSettings) -> list[Fit | Skipped]:
    """All forms of law c; the upper half of the compute is held out, an extrapolation by a factor of 2."""

    def fit_one(law: Law) -> Fit:
        return replace(fit_frontier(law, frontier, settings), warnings=tuple(frontier_warnings(frontier)))

    def check(fit: Fit) -> Fit:
        half = float(fit.columns["flops"].max()) / 2
        return held_out(
            fit, fit.columns["flops"] >= half, f"C >= {number(half)}", "the upper half of the compute", settings
        )

    return fit_forms(forms, frontier.at, fit_one, check)


def fit_optimum(
    forms: tuple[Law, ...],
    frontiers: Sequence[Frontier],
    isoflops: Sequence[IsoFlop],
    settings: FitSettings,
) -> list[Fit | Skipped]:
    """A compute-optimal law at each k where iso-FLOP minima were found."""
    views = {tuple(view.frontier.at.items()): view for view in isoflops}
    found: list[Fit | Skipped] = []
    for frontier in frontiers:
        view = views.get(tuple(frontier.at.items()))
        if view is None or not view.enough:
            reason = (
                "no compute at which at least three sizes of n compete with the best one inside; add sizes, and curves"
            )
            found += [Skipped(law.name, frontier.at, law.has_floor, reason) for law in forms]
            continue

        def fit_one(law: Law, view: IsoFlop = view) -> Fit:
            return replace(fit_isoflop(law, view, settings), warnings=view.warnings)

        def check(fit: Fit) -> Fit:
            return replace(fit, warnings=(*fit.warnings, *fit_warnings(fit)))

        found += fit_forms(forms, frontier.at, fit_one, check)
    return found
