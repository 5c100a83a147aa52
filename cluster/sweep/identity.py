"""What makes a sweep this one: what its sweep.yaml says, and how that of a run directory differs from another."""

from collections.abc import Mapping, Sequence, Set
from importlib.metadata import version
from typing import Any, NamedTuple

from saescale.cluster.sweep.planned import Planned
from saescale.cluster.sweep.spec import SweepSpec, parse_recorded
from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.recorded import recorded_sources
from saescale.storage.rundir import SPEC, RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.own import digests, require_same
from saescale.trainers.precision import Precision

# Parts of a sweep that may change between two calls of the same sweep: they do not change what its cells are.
_FREE = ("store", "out", "resources", "wandb")
_PACKAGES = ("saescale", "torch", "ray", "lightning", "numpy", "numba", "pyarrow")


class _Asked(NamedTuple):
    """The cells of a sweep: those planned, over each store."""

    planned: Set[Planned]  # one grid can be written in many ways, and what it means is these
    stores: Mapping[str | None, str]  # URLs by fingerprint: a store that was moved is the same

    def within(self, other: "_Asked") -> bool:
        return self.planned <= other.planned and self.stores.keys() <= other.stores.keys()


def document_of(
    spec: SweepSpec, stores: Sequence[ActivationStore], precision: Precision, own: Mapping[str, str]
) -> dict[str, Any]:
    """What sweep.yaml says: the spec with its defaults, what `auto` came to, the stores in order, the versions, and the
    digests of the user's `own` files of architectures."""
    sources = [{"fingerprint": s.fingerprint, "subject": s.subject, "site": s.site.name} for s in stores]
    versions = {name: version(name) for name in _PACKAGES}
    resolved = {"precision": precision, "sources": sources, "versions": versions}
    architectures = {"architectures": digests(own)} if own else {}
    return spec.model_dump(mode="json") | {"resolved": resolved | architectures}


def taken_up(
    run: RunDirectory, recorded: Mapping[str, Any], spec: SweepSpec, document: Mapping[str, Any], extending: bool
) -> dict[str, Any]:
    """What sweep.yaml is to say when `spec`, of which it says `document` by itself, goes on in `run`, whose sweep.yaml
    is `recorded`.

    What began the sweep stays as it was written, such as the versions that its first cells were trained with.
    `extending`: `spec` may have cells and stores besides. Raises SaescaleError where `run` holds another sweep.
    """
    own, began_with = (of.get("resolved", {}).get("architectures") or {} for of in (document, recorded))
    require_same(began_with, own, run.url)
    here = _Asked(set(spec.planned()), _stores(document))
    same_text = all(recorded.get(key) == document[key] for key in ("grid", "train"))
    planned = here.planned if same_text else set(parse_recorded(recorded, f"{run.url}/{SPEC}").planned())
    there = _Asked(planned, _stores(recorded))
    differences = _differences(_identity(recorded), _identity(document))
    if differences or not there.within(here) or not (extending or here.within(there)):
        if not differences and (changed := _changed_store(there, here)):
            raise SaescaleError(
                f"{run.url} holds another sweep ({changed} was changed or harvested again); restore the store, or give "
                "this sweep another run directory (out)"
            )
        # What decides how cells are trained is told where it is not the grid that differs.
        same_cells = there.planned <= here.planned if extending else there.planned == here.planned
        trained = [] if same_cells else _differences(recorded.get("train"), document["train"], "train")
        combinations = {cell.combination for cell in there.planned} != {cell.combination for cell in here.planned}
        grid = [_other_cells(there.planned, here.planned)] if not same_cells and (combinations or not trained) else []
        said = list(dict.fromkeys([*grid, *_other_stores(there.stores, here.stores), *trained, *differences]))
        raise SaescaleError(
            f"{run.url} holds another sweep ({'; '.join(said[:3])}); give this one another run directory (out), "
            f"or remove that one{'' if differences else _other_way(run, there, here)}"
        )
    if there.planned != here.planned:
        resolved = {**recorded["resolved"], **({"architectures": {**began_with, **own}} if own else {})}
        recorded = {**recorded, "grid": document["grid"], "resolved": resolved}
    if there.stores.keys() != here.stores.keys():
        resolved = {**recorded["resolved"], "sources": document["resolved"]["sources"]}
        recorded = {**recorded, "store": document["store"], "resolved": resolved}
    return dict(recorded)


def provenance_of(run: RunDirectory, recorded: Mapping[str, Any] | None) -> dict[str, str]:
    """What the report says about where a run's numbers come from, all of it from its sweep.yaml, `recorded`.

    Raises SaescaleError where `run` holds no sweep.
    """
    if recorded is None:
        raise SaescaleError(f"{run.url} is not a run directory: there is no sweep.yaml of a sweep that ran in it")
    spec, sources = recorded, recorded_sources(recorded)
    if not sources or any(source.fingerprint is None or source.subject is None for source in sources):
        raise run.damaged_spec("what it says of its stores is not there")
    several = len(sources) > 1
    try:
        return {
            "sweep": spec["name"],
            **{f"store {i}" if several else "store": source.words() for i, source in enumerate(sources, 1)},
            "subject": ", ".join(dict.fromkeys(str(source.subject) for source in sources)),
            **({"sites": ", ".join(dict.fromkeys(str(source.site) for source in sources))} if several else {}),
            "held-out rows": f"{spec['eval']['tokens']:,}",
            "precision": spec["resolved"]["precision"],
            "versions": ", ".join(f"{name} {number}" for name, number in spec["resolved"]["versions"].items()),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise run.damaged_spec(f"what it says of {one_line(error)} is not there") from error


def _stores(document: Mapping[str, Any]) -> dict[str | None, str]:
    return {source.fingerprint: source.url for source in recorded_sources(document)}


def _identity(document: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a sweep this one, beside its cells and how each is trained: all that decides how they are measured."""
    kept = {key: value for key, value in document.items() if key not in (*_FREE, "grid", "train", "resolved")}
    asked, came_to = (document.get(section, {}).get("precision") for section in ("train", "resolved"))
    if isinstance(of_nmse := kept.get("eval"), Mapping):  # what is measured besides changes no cell
        kept["eval"] = {key: value for key, value in of_nmse.items() if key != "evaluations"}
    return kept | {"precision": came_to, "train": {"precision": asked}}


def _changed_store(there: _Asked, here: _Asked) -> str:
    """Which stores hold other rows than they did, in words; "" where none does."""
    was = {url: key for key, url in there.stores.items() if key not in here.stores}
    now = {url: key for key, url in here.stores.items() if key not in there.stores}
    changed = [(url, was[url], now[url]) for url in now if url in was]
    if not changed and len(was) == len(now) == len(here.stores) == 1:  # its only one, which may have been moved too
        changed = [(url, next(iter(was.values())), key) for url, key in now.items()]
    return "; ".join(f"store_fingerprint is {old} there and {new} here: {url}" for url, old, new in changed)


def _other_cells(there: Set[Planned], here: Set[Planned]) -> str:
    parts = []
    for cells, where in ((there - here, "there"), (here - there, "here")):
        if cells:
            first, many = min(cells), "cell is" if len(cells) == 1 else "cells are"
            parts.append(f"{len(cells)} {many} only {where} (n = {first.n_latents}, k = {first.k}, seed {first.seed})")
    return f"grid: {', '.join(parts)}"


def _other_stores(there: Mapping[str | None, str], here: Mapping[str | None, str]) -> list[str]:
    only = [f"{url} ({key}) is only there" for key, url in there.items() if key not in here]
    only += [f"{url} ({key}) is only here" for key, url in here.items() if key not in there]
    return [f"store: {', '.join(only)}"] if only else []


def _other_way(run: RunDirectory, there: _Asked, here: _Asked) -> str:
    """What else can be done about a sweep that differs in its cells alone."""
    if here.within(there):
        return f"; or use {run.url}/sweep.yaml, which has these cells and those that were added"
    if there.within(here):
        return f"; or add the cells: saescale sweep {run.url}/sweep.yaml --extend THIS.yaml"
    return ""


def _differences(there: Any, here: Any, path: str = "") -> list[str]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = sorted({*there, *here})
        names = {key: f"{path}.{key}" if path else key for key in keys}
        return [d for key in keys for d in _differences(there.get(key), here.get(key), names[key])]
    return [] if there == here else [f"{path} is {there} there and {here} here"]
