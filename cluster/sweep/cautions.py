"""What a sweep's settings do to its result that nobody may have meant: said before anything is trained, and of cells
that ended so."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saescale.cluster.sweep.planned import Planned
from saescale.cluster.sweep.spec import SweepSpec
from saescale.scaling.laws.convergence import LEAST_POINTS
from saescale.scaling.words import listed
from saescale.storage.columns import is_diverged, misses_k
from saescale.storage.errors import SaescaleError
from saescale.trainers.cell import Cell, auto_k_aux


def cautions_of_each(spec: SweepSpec, widths: Mapping[str, int | None]) -> list[str]:
    """Those of every store of `spec`, by its URL and d_model; what holds for some of them names these.

    Raises SaescaleError as `cautions` does, which then names the store.
    """
    of: dict[str, list[str]] = defaultdict(list)
    for url, d_model in widths.items():
        try:
            found = cautions(spec, d_model)
        except SaescaleError as error:
            raise SaescaleError(f"{error} (the store {url})" if len(widths) > 1 else str(error)) from None
        for caution in found:
            of[caution].append(url)
    return [caution if len(urls) == len(widths) else f"{', '.join(urls)}: {caution}" for caution, urls in of.items()]


def cautions(spec: SweepSpec, d_model: int | None) -> list[str]:
    """A line for each; of a store that cannot be read from here d_model is not known (None), and less is said.

    Raises SaescaleError where a cell measures nothing: as many latents as there are dimensions give any row back.
    """
    said, cells = [], spec.planned()
    sizes = sorted({cell.n_latents for cell in cells})
    auto = auto_k_aux(d_model) if d_model else None
    k_aux = {cell: _k_aux(cell, auto) for cell in cells}
    for window in sorted({cell.dead_after_tokens for cell in cells}):
        short = [cell for cell in cells if cell.dead_after_tokens == window and cell.tokens <= window]
        if short:
            # Of AuxK with a k that is not known yet it is said too.
            never = "AuxK never runs and " if any(k_aux[cell] != 0 for cell in short) else ""
            said.append(
                f"{_cells([cell.n_latents for cell in short], sizes)} train on {max(cell.tokens for cell in short):,} "
                f"tokens or fewer and a latent counts as dead after {window:,}: {never}the dead fraction is 0 by "
                "construction; lower train.auxk.dead_after_tokens"
            )
    every = spec.eval.every_tokens
    if few := [cell.n_latents for cell in cells if -(-cell.tokens // every) < LEAST_POINTS]:
        said.append(
            f"{_cells(few, sizes)} have fewer than {LEAST_POINTS} points on their curve (nmse is measured every "
            f"{every:,} tokens): laws of compute and convergence pass them over; lower eval.every_tokens"
        )
    architectures = spec.grid.architectures
    none = f"{' and '.join(architectures)} {'has' if len(architectures) == 1 else 'have'} nothing of the kind"
    said += [f"{told} does nothing: {none}" for told in spec.train.without_taker(architectures)]
    for taken in sorted({k for k in k_aux.values() if k}):
        fewer = [cell.n_latents for cell in cells if k_aux[cell] == taken and cell.n_latents < taken]
        there = f"{_cells(fewer, sizes)} have fewer: there it takes all that are dead"
        said += [f"AuxK takes {taken} latents and {there}"] if fewer else []
    if d_model:
        ks = sorted({cell.k for cell in cells})
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


def _k_aux(cell: Planned, auto: int | None) -> int | None:
    """Dead latents that AuxK takes; 0 where there is none, None where that depends on a store that is not known."""
    found = json.loads(cell.settings).get("k_aux", 0)
    return auto if found == "auto" else found


def _cells(of: Iterable[int], all_sizes: list[int]) -> str:
    sizes = sorted(set(of))
    return "cells" if sizes == all_sizes else f"cells of N = {_list(sizes)}"


def _list(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)
