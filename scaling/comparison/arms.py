"""Arms of a comparison: cells that differ in their architecture and in nothing else that makes a kind of cell."""

from dataclasses import dataclass

import numpy as np

from saescale.scaling.kinds import Kind, kinds_in
from saescale.scaling.order import in_order
from saescale.scaling.tables import Table, known
from saescale.storage.columns import COLUMNS

NEEDED = ("architecture", "n_latents", "k", "nmse")
_KIND = tuple(c.name for c in COLUMNS.values() if c.one_kind and c.name != "architecture")


@dataclass(frozen=True)
class Arms:
    """Groups of cells that are equal but for their seed: one for each architecture, N and k; arrays are [groups].

    `of` is what these cells share and others of the table do not (a site, a subject). `log_nmse` is the mean of ln nmse
    over the seeds, `l0` and `dead` are means, `cells` counts. `rows` are the cells of each group in `table`.
    """

    of: Kind
    table: Table
    architectures: tuple[str, ...]
    architecture: np.ndarray
    n_latents: np.ndarray
    k: np.ndarray
    log_nmse: np.ndarray
    l0: np.ndarray
    dead: np.ndarray
    cells: np.ndarray
    rows: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, architecture: str, n_latents: float | None = None, k: float | None = None) -> np.ndarray:
        """The groups of an architecture, at one N or k where these are given: their indices."""
        mask = self.architecture == architecture
        for values, wanted in ((self.n_latents, n_latents), (self.k, k)):
            if wanted is not None:
                mask = mask & (values == wanted)
        return np.flatnonzero(mask)


def find_arms(table: Table) -> list[Arms]:
    """The arms of each subject, site, store ... of a table, where there are at least two architectures; [] without the
    columns. What is not known of a cell is taken to be as in most.

    `table` has of cells that differ in choices of training alone, such as the learning rate, the best at each N and k,
    as laws take them (LawsOfKinds.best). A cell without a measured L0 has its k for it.
    """
    if any(name not in table for name in NEEDED) or table["architecture"].dtype.kind != "U":
        return []
    table = table.select(known(table["architecture"]))
    found = [_arms(of, table.select(mask)) for of, mask in kinds_in(table, _KIND)]
    return [arms for arms in found if len(arms.architectures) > 1]


def _arms(of: Kind, table: Table) -> Arms:
    groups: dict[tuple[str, float, float], list[int]] = {}
    for row, key in enumerate(zip(*(table[name].tolist() for name in NEEDED[:3]), strict=True)):
        groups.setdefault(key, []).append(row)
    architectures = in_order(table["architecture"].tolist())
    ordered = sorted(groups, key=lambda key: (architectures.index(key[0]), *key[1:]))
    rows = tuple(np.array(groups[key], dtype=int) for key in ordered)
    l0 = table["l0"] if "l0" in table else np.full(len(table), np.nan)
    l0 = np.where(np.isfinite(l0) & (l0 > 0), l0, table["k"])
    dead = table["dead_fraction"] if "dead_fraction" in table else np.full(len(table), np.nan)
    return Arms(
        of,
        table,
        architectures,
        np.array([key[0] for key in ordered]),
        np.array([key[1] for key in ordered], dtype=float),
        np.array([key[2] for key in ordered], dtype=float),
        np.array([np.log(table["nmse"][own]).mean() for own in rows]),
        np.array([l0[own].mean() for own in rows]),
        np.array([dead[own].mean() for own in rows]),
        np.array([len(own) for own in rows]),
        rows,
    )
