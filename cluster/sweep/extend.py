"""`saescale sweep SPEC --extend MORE`: the cells of MORE beside those of SPEC, of which only the missing ones train."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from saescale.cluster.sweep.axes import has_lists
from saescale.cluster.sweep.grid import Grid
from saescale.cluster.sweep.planned import Planned
from saescale.cluster.sweep.settings import told_apart
from saescale.cluster.sweep.spec import NO_STORE, SweepSpec, named_stores, parse_recorded, parse_spec
from saescale.cluster.sweep.train import Way
from saescale.storage import files
from saescale.storage.documents import read_yaml
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory

# What decides how a cell is trained and measured: cells of one law must agree in it.
_SHARED = ("train", "eval")


class Extension(NamedTuple):
    """`spec` has all cells; `added` of them are not in its run directory's sweep yet, or, before there is one, not in
    the sweep file."""

    spec: SweepSpec
    added: int


def extend(spec: SweepSpec, more: str) -> Extension:
    """`spec` with the cells of `more` besides, a sweep file or one with a grid alone; what a run directory holds stays.

    Where `more` names further stores, the sweep's among them, all cells are trained over those too. Nothing is written:
    the run directory takes the cells up when they can be trained (ledger.py). Raises SaescaleError when the trainings,
    evaluations or stores differ: such cells are not of one law. A number of `train` may differ where it is an axis in
    one of the two.
    """
    others = [read_extension(spec, more)]
    stores = _all_stores(spec, others[0], more)
    known = spec
    document = RunDirectory(spec.out).read_spec()
    if document is not None:
        known = parse_recorded(document, f"{spec.out}/sweep.yaml")
        _same(spec, known, f"{spec.out}/sweep.yaml")
        others = [spec, *others]
    grid = union(known, *others)
    there = others[-1].entries | spec.entries
    entries = [there[url] for url in stores]
    extended = spec.model_copy(
        update={"grid": grid, "train": known.train, "store": entries if len(entries) > 1 else entries[0]}
    )
    return Extension(extended, extended.size - known.size)


def read_extension(spec: SweepSpec, more: str) -> SweepSpec:
    """The cells of `more` as a sweep like `spec`. Raises SaescaleError as `extend` does."""
    other = _read(more, spec)
    _same(spec, other, more)
    _all_stores(spec, other, more)
    return other


def union(first: SweepSpec, *others: SweepSpec) -> Grid:
    """All cells of them, trained as `first` says: its lists, and what they do not cover one by one."""
    lists = {key: value for key, value in first.grid.model_dump().items() if key != "cells"}
    listed = first.model_copy(update={"grid": Grid.model_validate(lists)}) if first.grid.n_latents else None
    covered = set(listed.planned()) if listed else set()
    wanted = dict.fromkeys(cell for spec in (first, *others) for cell in spec.planned() if cell not in covered)
    architectures = sorted({cell.architecture for cell in (*wanted, *covered)})
    ways = {name: first.train.ways(name, architectures) for name in architectures}
    seeds: dict[tuple[int, int, str, str], list[int]] = defaultdict(list)
    for cell in sorted(wanted, key=lambda cell: cell.combination):
        own = json.dumps(_own(cell, ways[cell.architecture]), sort_keys=True)
        seeds[cell.n_latents, cell.k, cell.architecture, own].append(cell.seed)
    cells = [
        {"n_latents": n, "k": k, "architecture": a, "seed": found, "train": json.loads(own)}
        for (n, k, a, own), found in seeds.items()
    ]
    return Grid.model_validate((lists if listed else {}) | ({"cells": cells} if cells else {}))


def _own(cell: Planned, ways: Sequence[Way]) -> dict[str, Any]:
    """The least that `train` of a cell of the grid has to say for it to be this one; `ways`: those of the sweep."""
    given = [Planned.of(cell.combination, way) for way in ways]

    def differs(name: str) -> bool:
        return any(getattr(other, name) != getattr(cell, name) for other in given)

    numbers = ("tokens", "batch_tokens", "lr", "ema", "stream_seed")
    own: dict[str, Any] = {name: getattr(cell, name) for name in numbers if differs(name)}
    if differs("dead_after_tokens"):
        own["auxk"] = {"dead_after_tokens": cell.dead_after_tokens}
    if settings := told_apart(cell.settings, [other.settings for other in given], cell.architecture):
        own["settings"] = {cell.architecture: settings}
    return own


def _read(more: str, spec: SweepSpec) -> SweepSpec:
    try:
        document = read_yaml(more)
    except FileNotFoundError as error:
        text = f"there is no file at {more} to extend with; `saescale plan --write FILE` makes one"
        raise SaescaleError(text) from error
    if not isinstance(document, Mapping) or "grid" not in document:
        raise SaescaleError(f"{more} has no grid to extend with")
    if isinstance(document.get("eval"), Mapping):  # how often is the sweep's where the file leaves it open
        document = {**document, "eval": {"every_tokens": spec.eval.every_tokens, **document["eval"]}}
    return parse_spec(spec.model_dump(mode="json") | named_stores(document, more), more)


def _same(spec: SweepSpec, other: SweepSpec, where: str) -> None:
    for section in _SHARED:
        here: dict[str, Any] = getattr(spec, section).model_dump(mode="json")
        there: dict[str, Any] = getattr(other, section).model_dump(mode="json")
        for path, one, another in _unlike(here, there, section):
            axis = section == "train" and not path.endswith("precision")
            remedy = ", make it an axis (a list that has both)" if axis else ""
            raise SaescaleError(
                f"{where}: {path} is {another} and the sweep's is {one}; cells of one sweep are trained and measured "
                f"alike: make them the same{remedy}, or sweep it into a run directory of its own"
            )


def _unlike(here: Any, there: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Where two sections differ, but for what is an axis in one of them."""
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for key in dict.fromkeys((*here, *there)):
            yield from _unlike(here.get(key), there.get(key), f"{path}.{key}")
    elif here != there and not (has_lists(here) or has_lists(there)):
        yield path, here, there


def _all_stores(spec: SweepSpec, other: SweepSpec, where: str) -> list[str]:
    """The URLs of the sweep's stores, and of those that `other` adds."""
    if other.store == NO_STORE:
        return spec.stores
    known, given = ({_place(url): url for url in of.stores} for of in (spec, other))
    if missing := [url for place, url in known.items() if place not in given]:
        one = len(spec.stores) == len(other.stores) == 1
        what = f"store is {other.store} and the sweep's is {spec.store}" if one else f"store lacks {missing[0]}"
        raise SaescaleError(
            f"{where}: {what}; all cells of a sweep are trained over all its stores: leave store out, or name the "
            "sweep's with those to add, or sweep it into a run directory of its own"
        )
    return [*spec.stores, *(url for place, url in given.items() if place not in known)]


def _place(url: str) -> str:
    """One text for all ways to write where a store lies."""
    local = files.local_path(url)
    return url.rstrip("/") if local is None else os.path.realpath(local)
