"""What a sweep's settings do to its result that nobody may have meant: said before anything is trained, and of cells
that ended so."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saescale.cluster.sweep.spec import SweepSpec
from saescale.scaling.words import listed
from saescale.storage.columns import is_diverged, misses_k
from saescale.storage.errors import SaescaleError
from saescale.trainers.cell import Cell, auto_k_aux, traits_of


def cautions(spec: SweepSpec, d_model: int | None) -> list[str]:
    """A line for each; of a store that cannot be read from here d_model is not known (None), and less is said.

    Raises SaescaleError where a cell measures nothing: as many latents as there are dimensions give any row back.
    """
    said, sizes = [], sorted({cell.n_latents for cell in spec.grid.combinations()})
    window = spec.train.auxk.dead_after_tokens
    revived = sorted({c.n_latents for c in spec.grid.combinations() if "k_aux" in traits_of(c.architecture).settings})
    k_aux = spec.train.settings.get("k_aux", spec.train.auxk.k)
    k_aux = (auto_k_aux(d_model) if d_model else None) if k_aux == "auto" else k_aux
    never = "AuxK never runs and " if revived and k_aux != 0 else ""
    if short := [n for n in sizes if spec.tokens_of(n) <= window]:
        most = max(spec.tokens_of(n) for n in short)
        said.append(
            f"{_cells(short, sizes)} train on {most:,} tokens or fewer and a latent counts as dead after {window:,}: "
            f"{never}the dead fraction is 0 by construction; lower train.auxk.dead_after_tokens"
        )
    if isinstance(k_aux, int) and (fewer := [n for n in revived if n < k_aux]):
        said.append(
            f"AuxK takes {k_aux} latents and {_cells(fewer, sizes)} have fewer: there it takes all that are dead"
        )
    if d_model:
        ks = sorted({cell.k for cell in spec.grid.combinations()})
        if void := [k for k in ks if k >= d_model]:
            raise SaescaleError(
                f"grid.k: k = {_list(void)} is not below d_model = {d_model}: so many latents give any row back, and "
                "nmse says nothing; remove it"
            )
        if near := [k for k in ks if k >= d_model / 2]:
            said.append(
                f"k = {_list(near)} is half of d_model = {d_model} or more: nmse falls there because rows have no more "
                "dimensions, and laws are for k much smaller"
            )
    return said


def diverged(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to say of cells that ended, and that no fit will take."""
    bad = [result for result in results if is_diverged(result["nmse"])]
    if not bad:
        return []
    named = ", ".join(f"{result['cell_id']}: {result['nmse']:.3g}" for result in bad[:5])
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return [
        f"{len(bad)} of {len(results)} cells ended with nmse above 1, worse than the mean alone ({named}{more}): they "
        "diverged, and fits leave them out; try a smaller train.lr"
    ]


def missed(cells: Iterable[Cell], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to say of cells that ended far from their k, of which it is a target."""
    from saescale.trainers.training.controller import is_off

    settings = {cell.cell_id: cell.whole_settings for cell in cells}
    bad = [result for result in results if misses_k(result.get("l0_error"))]
    if not bad:
        return []
    off = {row["cell_id"] for row in bad if is_off(settings[row["cell_id"]], row["coefficient"])}
    named = listed(f"{r['cell_id']}: L0 {r['l0']:.3g}" + " with its penalty off" * (r["cell_id"] in off) for r in bad)
    why = "; where the penalty is off k is above what it has without one: lower k or train.lr" if off else ""
    return [
        f"{len(bad)} of {len(results)} cells ended with L0 more than 10 % off k ({named}): fits take the L0 that was "
        f"measured{why}"
    ]


def _cells(sizes: list[int], all_sizes: list[int]) -> str:
    return "cells" if sizes == all_sizes else f"cells of N = {_list(sizes)}"


def _list(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)
