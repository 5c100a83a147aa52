"""`saescale sweep SPEC --extend MORE`: the cells of MORE beside those of SPEC, of which only the missing ones train."""

import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from saescale.cluster.sweep.spec import NO_STORE, Grid, SweepSpec, named_stores, parse_recorded, parse_spec
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
    evaluations or stores differ: such cells are not of one law.
    """
    other = read_extension(spec, more)
    grid, stores = union(spec.grid, other.grid), _all_stores(spec, other, more)
    known = spec
    document = RunDirectory(spec.out).read_spec()
    if document is not None:
        known = parse_recorded(document, f"{spec.out}/sweep.yaml")
        _same(spec, known, f"{spec.out}/sweep.yaml")
        grid = union(known.grid, grid)
    extended = spec.model_copy(update={"grid": grid, "store": stores if len(stores) > 1 else stores[0]})
    return Extension(extended, extended.size - known.size)


def read_extension(spec: SweepSpec, more: str) -> SweepSpec:
    """The cells of `more` as a sweep like `spec`. Raises SaescaleError as `extend` does."""
    other = _read(more, spec)
    _same(spec, other, more)
    _all_stores(spec, other, more)
    return other


def union(first: Grid, second: Grid) -> Grid:
    """All cells of both: the lists of the first, and what they do not cover one by one."""
    lists = {key: value for key, value in first.model_dump().items() if key != "cells"} if first.k else {}
    covered = set(Grid.model_validate(lists).combinations()) if lists else set()
    seeds: dict[tuple[int, int, str], list[int]] = defaultdict(list)
    for n_latents, k, architecture, seed in sorted({*first.combinations(), *second.combinations()} - covered):
        seeds[n_latents, k, architecture].append(seed)
    cells = [{"n_latents": n, "k": k, "architecture": a, "seed": own} for (n, k, a), own in seeds.items()]
    return Grid.model_validate(lists | ({"cells": cells} if cells else {}))


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
        for key in here:
            if here[key] != there[key]:
                raise SaescaleError(
                    f"{where}: {section}.{key} is {there[key]} and the sweep's is {here[key]}; cells of one sweep are "
                    "trained and measured alike: make them the same, or sweep it into a run directory of its own"
                )


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
