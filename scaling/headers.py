"""The names of a table's columns, as whoever wrote it spelt them."""

import difflib
import re
from collections.abc import Iterable, Sequence

import pyarrow as pa

from saescale.scaling.words import listed
from saescale.storage.columns import COLUMNS, OLD_NAMES, current_names, folded
from saescale.storage.errors import SaescaleError

KNOWN = frozenset((*(c.name for c in COLUMNS.values() if set(c.tables) != {"evals"}), *OLD_NAMES))
_INDEX = re.compile(r"|index|level_\d+|unnamed:_\d+|__index_level_\d+__")  # rows counted, which says nothing of them
# What others call a column: named where it is missing, and never taken for it.
_ALSO_CALLED: dict[str, tuple[str, ...]] = {
    "n_latents": ("n", "d_sae", "dict_size", "num_latents", "n_features", "width", "latents", "d_hidden"),
    "k": ("top_k", "topk", "n_active", "sparsity", "l0"),
    "nmse": ("fvu", "mse", "normalized_mse", "normalised_mse", "val_nmse", "heldout_nmse", "loss"),
    "tokens": ("n_tokens", "num_tokens", "train_tokens", "training_tokens", "d"),
    "flops": ("c", "compute", "train_flops", "training_flops", "total_flops"),
    "d_model": ("d_in", "s", "hidden_size", "activation_dim"),
}


def named_columns(table: pa.Table, source: str) -> dict[str, pa.ChunkedArray]:
    """The columns under today's names, whatever their case, spaces and age; without the index of a data frame.

    Of two columns of one name that say the same there is one; where they differ, a name of results.parquet raises
    SaescaleError, and any other is left out.
    """
    spelt = [str(name) for name in table.column_names]
    names = current_names([folded(name) if folded(name) in KNOWN else name.strip() for name in spelt])
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if not _INDEX.fullmatch(folded(name)):
            places.setdefault(name, []).append(i)
    found = {}
    for name, where in places.items():
        told = [i for i in where if table.column(i).null_count < len(table)] or where[:1]
        first = table.column(told[0])
        if all(first.equals(table.column(i)) for i in told[1:]):
            found[name] = first
        elif name in KNOWN:
            cases = " and ".join(f"column {i + 1} ({spelt[i]!r})" for i in told)
            raise SaescaleError(f"{source}: two columns are called {name} and differ, {cases}; keep one of them")
    return found


def missing_words(missing: Sequence[str], there: Iterable[str]) -> str:
    """What is missing and what there is instead, with the name that is most likely meant."""
    names = list(there)
    free = [name for name in names if name not in KNOWN or name == "l0"]
    likely = {name: close for name in missing if (close := nearest(name, free))}
    if likely:
        advice = "; ".join(f"if {close} is it, call it {name}" for name, close in likely.items())
    else:
        advice = "Add what is missing (the names are those of results.parquet)"
    has = listed(names, ", ", most=40) or "none"
    return f"no column {', '.join(missing)}; it has {has}. {advice[0].upper()}{advice[1:]}"


def nearest(name: str, there: Iterable[str]) -> str | None:
    """The one of `there` that is most likely meant by a name that is not."""
    spelt = {folded(other): other for other in there}
    if also := other_name(name, spelt):
        return spelt[also]
    close = difflib.get_close_matches(folded(name), spelt, n=1, cutoff=0.6)
    return spelt[close[0]] if close else None


def other_name(name: str, there: Iterable[str]) -> str | None:
    """The one of `there` by which others call a column."""
    spelt = {folded(other): other for other in there}
    return next((spelt[other] for other in _ALSO_CALLED.get(name, ()) if other in spelt), None)
