"""A run directory as a notebook sees it: its tables, its fits, and its trained SAEs."""

import math
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from saescale.scaling.metrics import metrics_table
from saescale.storage.columns import RESULTS, columns_of
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory

if TYPE_CHECKING:
    from saescale.trainers.exchange.trained import Trained

_SHOWN = 12  # cells that an error lists


class Run:
    """What lies below `url`. Tables and fits are read anew each time, so a run that goes on can be watched."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._directory = RunDirectory(url)

    @property
    def results(self) -> pa.Table:
        """One row a cell (storage/RUN.md)."""
        return self._directory.read_results()

    @property
    def curves(self) -> pa.Table:
        """One row a cell and evaluation of its training."""
        return self._directory.read_curves()

    @property
    def evals(self) -> pa.Table:
        """What `saescale eval` measured; no rows before that."""
        return self._directory.read_evals()

    @property
    def metrics(self) -> pa.Table:
        """The results with each metric of whole cells that was measured: `downstream_loss.kl` with its 95 % interval in
        `downstream_loss.kl.low` and `.high`; null where a cell has none."""
        return metrics_table(self.results, self.evals)

    @property
    def fits(self) -> dict[str, Any]:
        """The document of fits.json. Raises SaescaleError where the laws were not fitted yet."""
        found = self._directory.read_fits()
        if found is None:
            raise SaescaleError(f"{self.url} has no fits.json yet; run saescale report {self.url}")
        return found

    def load(
        self,
        n_latents: int | None = None,
        k: int | None = None,
        architecture: str | None = None,
        seed: int | None = None,
        **columns: Any,
    ) -> "Trained":
        """The one finished cell that has what is given; `columns`: others of its columns, such as lr = 1e-3.

        Raises SaescaleError, which lists what there is, where none or several have it.
        """
        wanted = {"n_latents": n_latents, "k": k, "architecture": architecture, "seed": seed, **columns}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        if unknown := [name for name in wanted if name not in RESULTS.names]:
            raise SaescaleError(f"results have no column {unknown[0]}; there are {', '.join(RESULTS.names)}")
        done = [row for row in self.results.to_pylist() if row["status"] == "done"]
        found = [row for row in done if all(_is(row[name], value) for name, value in wanted.items())]
        if len(found) != 1:
            asked = " and ".join(f"{name} = {value}" for name, value in wanted.items()) or "no more said"
            many = f"{len(found)} finished cells" if found else "no finished cell"
            raise SaescaleError(f"{self.url} has {many} with {asked}; there are {_listed(found or done)}")
        from saescale.trainers.exchange.native import read

        return read(self._directory.cell_url(found[0]["cell_id"]))


def open_run(url: str) -> Run:
    """The run directory at `url`. Raises SaescaleError where there is none."""
    if RunDirectory(url).read_spec() is None:
        raise SaescaleError(f"{url} is no run directory: there is no sweep.yaml of a sweep that ran in it")
    return Run(url)


def _is(there: Any, wanted: Any) -> bool:
    """Whether a column has that value; rates follow from laws, and nobody writes all their digits."""
    return there == wanted or (isinstance(there, float) and math.isclose(there, wanted, rel_tol=1e-3))


def _listed(rows: list[dict[str, Any]]) -> str:
    """The cells by what names them, and by the other columns in which they differ."""
    names = ["n_latents", "k", "seed"]
    others = [c.name for c in columns_of("results") if c.role == "spec" and c.name not in (*names, "cell_id")]
    names += [name for name in others if name != "architecture" and len({row[name] for row in rows}) > 1]
    cells = [" ".join([row["architecture"], *(f"{name} = {row[name]}" for name in names)]) for row in rows]
    more = f" and {len(cells) - _SHOWN} more" if len(cells) > _SHOWN else ""
    return ", ".join(cells[:_SHOWN]) + more if cells else "none"
