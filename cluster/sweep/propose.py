"""`saescale plan`: the cells to train next, what they cost, how they pack, and the sweep file that trains them."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import count, islice
from typing import Any, Protocol, cast

import numpy as np

from saescale.cluster.sweep.assumed import cells_to_come
from saescale.cluster.sweep.best import Best, best_way
from saescale.cluster.sweep.proposal import Prior, Proposal, ProposedCell, Request
from saescale.cluster.sweep.spec import NO_STORE, SweepSpec, parse_recorded, parse_spec
from saescale.cluster.sweep.work import work_of
from saescale.scaling.kinds import kind_label, largest_kind, without_diverged
from saescale.scaling.laws.best import find_best
from saescale.scaling.laws.estimate import Fit, fit_law
from saescale.scaling.laws.forms.n_k import GPT4, N_K
from saescale.scaling.laws.lack_of_fit import kinds_of
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.planning.design import (
    LEVELS,
    TARGETS,
    Candidates,
    Design,
    Target,
    best_rectangle,
    candidates,
    expected,
    least_cells,
    propose,
    wanted,
)
from saescale.scaling.planning.devices import Device, as_measured
from saescale.scaling.reading import is_table
from saescale.scaling.sources import load_sources
from saescale.scaling.tables import Table, load_rows
from saescale.storage import files
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory

_DRAWS = 12  # of the fit's bootstrap, beside its best coefficients: guesses that the design is made for
_WIDER = 16  # how far beyond the largest n of a run cells may go
_SMALLEST = 512
_NOISE = 0.005
_WIDEST = 2**20  # of a subject
_KS = (8, 16, 32, 64, 128, 256, 512)


def make_proposal(request: Request) -> Proposal:
    """The plan of a request. Raises SaescaleError for a target or point that does not fit and a budget too small."""
    if request.target not in TARGETS:
        raise SaescaleError(f"unknown target {request.target}; there are {', '.join(TARGETS)}")
    if request.noise is not None and not 0 < request.noise < np.inf:
        raise SaescaleError(f"--noise {request.noise:g} is no scatter; give a number above 0, such as {_NOISE}")
    prior, base, d_model = prior_of(request)
    sizes, ks = levels_of(request, prior.cells, d_model)
    cells = _candidates(request, prior, base, d_model, sizes, ks)
    goal = wanted(cast(Target, request.target), N_K, prior.raw, [k for k in ks if k in cells.k], request.at)
    design = propose(cells, goal, request.hours, prior.cells, request.seeds)
    rectangle = best_rectangle(cells, goal, request.hours, prior.cells, request.seeds)
    rows, grid = _proposed(cells, design, prior, base, d_model)
    spec = parse_spec(base | {"grid": {"cells": grid}}, "the plan")
    before = expected(cells, goal, prior.cells) if len(prior.cells["k"]) > len(N_K.names) else None
    packs = _packs(spec, d_model, request.device)
    return Proposal(request, prior, spec, rows, goal, design, before, rectangle, packs)


def prior_of(request: Request) -> tuple[Prior, dict[str, Any], int]:
    """(what is known, the sweep to add to as a mapping without grid, d_model)."""
    none = {"n_latents": np.empty(0), "k": np.empty(0)}
    base: dict[str, Any] = {
        "name": "plan",
        "store": request.store or NO_STORE,
        "out": "runs/plan",
        "train": {"tokens": {"at": 32_768, "tokens": request.tokens, "exponent": 0.6}},
    }
    if request.source is None:
        words = f"the published law of GPT-4's SAEs and an assumed scatter of {request.noise or _NOISE:.2%}"
        prior = Prior(N_K.to_raw(GPT4)[None], request.noise or _NOISE, 0.0, none, words, {}, request.device)
        return prior, base, request.d_model
    results, curves = load_sources([request.source])
    of, results = largest_kind(without_diverged(results))
    results = results.select(find_best(results, np.zeros(len(results), dtype=bool)).rows)
    results.require(("n_latents", "k"))
    document = sweep_of(request.source)
    best = best_way(document, request.source, results) if document else None
    results = results.select(best.rows) if best else results
    try:
        fit = fit_law(
            N_K, results.columns, results["nmse"], FitSettings(_DRAWS * 10), kinds=kinds_of(results, N_K.columns)
        )
    except SaescaleError as error:
        raise SaescaleError(
            f"{request.source}: no law to plan from: {error}; or plan from the published law"
        ) from error
    widths = results["d_model"][np.isfinite(results["d_model"])] if "d_model" in results else np.empty(0)
    d_model = int(widths[0]) if len(widths) else request.d_model
    if not 1 <= d_model <= _WIDEST:
        raise SaescaleError(f"{request.source}: d_model is {d_model:g}, which is no width of a subject; correct it")
    kind = f", its cells of {label}," if (label := kind_label(of)) else ""
    kind += f" {best.words}," if best else ""
    words = f"L(N, k) of {results.source}{kind} and its scatter of {request.noise or fit.noise:.2%} about it"
    shared = 0.0
    if fit.misses and fit.lack:
        shared = fit.lack.shared
        words += f", {shared:.0%} of whose variance all seeds of one n and k share (lack of fit): new n and k tell more"
    device = request.device if request.device.given else as_measured(request.device, results, curves)
    prior = Prior(
        np.concatenate([fit.raw[None], _plausible(fit)]), request.noise or fit.noise, shared,
        {"n_latents": results["n_latents"], "k": results["k"]}, words, _seeds_of(request.source), device,
        _each_cell(results, best),
    )  # fmt: skip
    return prior, _base_of(request.source, results, base), d_model


def _each_cell(results: Table, best: Best | None) -> dict[str, Any]:
    """What the cells of a plan say beside n, k and seed, so that they are like those of a run."""
    architecture = str(results["architecture"][0]) if "architecture" in results else ""
    of_kind = {} if architecture in ("", "topk") else {"architecture": architecture}
    return of_kind | ({"train": best.own} if best else {})


def sweep_of(source: str) -> dict[str, Any] | None:
    """The sweep.yaml of a source of cells, or None where it is a table or a directory without one."""
    return None if is_table(source) else RunDirectory(source).read_spec()


def _seeds_of(source: str) -> dict[tuple[int, int], set[int]]:
    """The seeds of each n and k: of the sweep's grid, and of all rows, since a failed cell is not trained again."""
    found: dict[tuple[int, int], set[int]] = defaultdict(set)
    document = sweep_of(source)
    for cell in parse_recorded(document, f"{source}/sweep.yaml").grid.combinations() if document else ():
        found[cell.n_latents, cell.k].add(cell.seed)
    rows = load_rows(source)
    seeds = rows["seed"].tolist() if "seed" in rows else [""] * len(rows)
    for n, k, seed in zip(rows["n_latents"], rows["k"], seeds, strict=True):
        if np.isfinite([n, k]).all():
            own = found[int(n), int(k)]
            # Where nobody wrote down which it was: as if seeds went up from 0.
            known = _whole(seed)
            own.add(_unused(own, 1)[0] if known is None else known)
    return found


def _whole(seed: float | str) -> int | None:
    """A seed as a table has it; None where it is no whole number."""
    try:
        return int(seed)
    except (ValueError, OverflowError):
        return None


def _unused(seeds: Set[int], wanted: int) -> list[int]:
    """The first `wanted` that are not in `seeds`."""
    return list(islice((seed for seed in count() if seed not in seeds), wanted))


def _base_of(source: str, results: Table, base: dict[str, Any]) -> dict[str, Any]:
    """How a run directory's cells were trained, or for a table the default with its tokens where they are all alike."""
    if document := sweep_of(source):
        return {key: value for key, value in document.items() if key not in ("grid", "resolved")}
    if "tokens" in results and len(np.unique(results["tokens"])) == 1 and 1 <= results["tokens"][0] < np.inf:
        tokens = int(results["tokens"][0])
        batch = next(size for size in (131_072, 8_192, 1_024, 256, 1) if tokens % size == 0)
        return base | {"train": {"tokens": tokens, "batch_tokens": batch}}
    return base


def _plausible(fit: Fit) -> np.ndarray:
    """A few of the bootstrap's coefficients whose exponents are those of a law that falls with n."""
    slopes = np.stack([fit.law.exponent_of(fit.draws, "n_latents", {"k": k}) for k in np.unique(fit.columns["k"])])
    return fit.draws[(slopes < 0).all(axis=0)][:_DRAWS]


def levels_of(request: Request, cells: Mapping[str, np.ndarray], d_model: int) -> tuple[np.ndarray, list[float]]:
    """The n and k that cells may have; n doubles from --n-min, the smallest n that is there, or _SMALLEST."""
    there = bool(len(cells["k"]))
    low = request.n_range[0] or (int(cells["n_latents"].min()) if there else _SMALLEST)
    high = request.n_range[1] or (_WIDER * int(cells["n_latents"].max()) if there else 2**24)
    if low > high:
        raise SaescaleError(f"--n-min {low} is above --n-max {high}")
    ks = sorted(set(request.ks) or ({int(k) for k in cells["k"]} if there else {k for k in _KS if k <= d_model / 4}))
    sizes = low * 2.0 ** np.arange(int(np.log2(high / low)) + 1)
    return sizes, [float(k) for k in ks]


def _candidates(
    request: Request, prior: Prior, base: dict[str, Any], d_model: int, sizes: np.ndarray, ks: Sequence[float]
) -> Candidates:
    n, k = (v.ravel() for v in np.meshgrid(sizes, np.array(ks), indexing="ij"))
    allowed = k <= n
    n, k = n[allowed], k[allowed]
    if not len(n):
        raise SaescaleError(f"no cell to add has k <= n: k is {min(ks):g} or more, n at most {sizes.max():g}")
    _require_enough(request, n, k, prior.cells)
    spec = parse_spec(base | {"grid": {"cells": grid_of(n, k, [[0]] * len(n), prior)}}, "the plan")
    possible, needs = cells_to_come(spec, d_model), _needs(spec, request.device)
    # All cells of a sweep are trained over all its stores.
    hours = len(spec.stores) * np.array([prior.device.seconds(work_of(cell)) for cell in possible]) / 3600
    memory = np.array([needs([cell]) for cell in possible])
    fits = memory <= request.device.memory
    if not fits.any():
        raise SaescaleError(
            f"no cell fits into the memory of {request.device.name}; the smallest takes {memory.min() / 2**30:.3g} GiB"
        )
    if not fits.all():
        _require_enough(request, n[fits], k[fits], prior.cells, request.device)
    cheapest = hours[fits].min()
    fits &= hours <= request.hours
    if not fits.any():
        raise SaescaleError(
            f"{request.hours:.3g} h on {request.device.name} do not reach for one cell; the cheapest takes "
            f"{cheapest:.3g} h. Raise --budget or lower --tokens"
        )
    return candidates(N_K, prior.raw, n[fits], k[fits], hours[fits], prior.noise, prior.shared)


def _require_enough(
    request: Request, n: np.ndarray, k: np.ndarray, there: Mapping[str, np.ndarray], device: Device | None = None
) -> None:
    """Raises SaescaleError where cells of `n` and `k` beside those that are `there` make no law at any budget;
    `device`: the cells are those that its memory holds."""
    which = f" that fit into the memory of {device.name}" if device else ""
    for name, values, remedy in (
        ("k", {*k, *there["k"]}, "add --k"),
        ("n", {*n, *there["n_latents"]}, "lower --n-min or raise --n-max"),
    ):
        if len(values) < LEVELS:
            raise SaescaleError(
                f"a law takes {LEVELS} values of {name}; there are {len(values)} "
                f"({', '.join(f'{value:g}' for value in sorted(values))}) in cells of k <= n{which}: "
                + ("lower --n-min, add smaller --k or name a larger --gpu" if device else remedy)
            )
    most = len(n) * request.seeds + len(there["k"])
    if most < least_cells(N_K):
        raise SaescaleError(
            f"a law takes {least_cells(N_K)} cells; there are at most {most}{which}: raise --seeds, or ask for more n "
            "or k"
        )


def _proposed(
    cells: Candidates,
    design: Design,
    prior: Prior,
    base: dict[str, Any],
    d_model: int,
) -> tuple[tuple[ProposedCell, ...], list[dict[str, Any]]]:
    """The rows of the plan and of the sweep file's grid, with the first seeds that no cell of an n and k has."""
    chosen = np.flatnonzero(design.counts)
    own = [prior.seeds.get((int(cells.n_latents[i]), int(cells.k[i])), frozenset()) for i in chosen]
    seeds = [_unused(taken, int(design.counts[i])) for taken, i in zip(own, chosen, strict=True)]
    grid = grid_of(cells.n_latents[chosen], cells.k[chosen], seeds, prior)
    spec = parse_spec(base | {"grid": {"cells": grid}}, "the plan")
    work = {(c.n_latents, c.k): (c.tokens, work_of(c)) for c in cells_to_come(spec, d_model)}
    rows = []
    for cell in grid:
        tokens, each = work[cell["n_latents"], cell["k"]]
        hours = prior.device.seconds(each) / 3600 * len(cell["seed"]) * len(spec.stores)
        rows.append(ProposedCell(cell["n_latents"], cell["k"], tuple(cell["seed"]), tokens, each.flops, hours))
    return tuple(rows), grid


def grid_of(n: np.ndarray, k: np.ndarray, seeds: Sequence[list[int]], prior: Prior) -> list[dict[str, Any]]:
    cells = zip(n.tolist(), k.tolist(), seeds, strict=True)
    return [{"n_latents": int(a), "k": int(b), "seed": own, **prior.cell} for a, b, own in cells]


def _needs(spec: SweepSpec, device: Device) -> Callable[[Sequence[Any]], float]:
    """Bytes that a pack takes on the device, over a store of which only d_model is known."""
    from saescale.trainers.training.memory import StreamSize, pack_memory

    stream = StreamSize(8_192, 2**40)
    kernels: Any = "cpu" if device.name == "cpu" else "cuda"
    return lambda cells: pack_memory(cells, spec.eval.tokens, stream, kernels).total


def _packs(spec: SweepSpec, d_model: int, device: Device) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    from saescale.cluster.sweep.packing import pack_cells

    packs = pack_cells(cells_to_come(spec, d_model), {}, 1, device.memory, _needs(spec, device))
    return tuple(tuple((c.n_latents, c.k, c.seed) for c in pack) for pack in packs)


class _Planned(Protocol):
    def yaml(self) -> str: ...


def write_proposal(proposal: _Planned, url: str) -> None:
    """Writes the sweep file of a plan. Raises SaescaleError when it cannot be written."""
    files.write_atomic(url, proposal.yaml().encode())
