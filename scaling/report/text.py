"""What a report says: the outcome in words and in a few numbers, tables of laws and cells, provenance."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from saescale.scaling.kinds import kind_label
from saescale.scaling.laws.notes import kinds_of_document, law_label, rate_rows
from saescale.scaling.tables import Table
from saescale.storage.columns import COLUMNS, columns_of

Document = Mapping[str, Any]

# Of the table of cells; their names, which are long, stand last.
_LISTED = sorted((column for column in columns_of("results") if column.listed), key=lambda c: c.name == "cell_id")
_CELL_COLUMNS = {column.name: column for column in _LISTED}
_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_ALWAYS = ("n_latents", "k", "nmse")


class Tile(NamedTuple):
    """One of the numbers at the head of a report."""

    label: str
    value: str
    detail: str


class TextTable(NamedTuple):
    """A table for reading. `numbers`: all but the first column hold numbers, which stand right."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True


class Column(NamedTuple):
    """A column of the table of cells."""

    key: str  # its name in the filter
    label: str
    number: bool


class CellText(NamedTuple):
    """One value of the table of cells, as it is read and as it is sorted."""

    text: str
    value: float | None  # what the column is sorted by; None where it holds text


class CellRow(NamedTuple):
    """A row of the table of cells: what it is hidden by, and the values of the columns of `cell_columns`."""

    k: str
    name: str  # of its architecture; "" where all have the same
    cells: list[CellText]


def title(results: Table) -> str:
    """The report's, with subject and site where the cells say them."""
    names = []
    for name in ("subject", "site"):
        if name in results and results[name].dtype.kind == "U":
            there = sorted({value for value in results[name].tolist() if value})
            names.append(there[0] if len(there) == 1 else f"{len(there)} {name}s" if there else "")
    return " of ".join(["Scaling of sparse autoencoders", *filter(None, [", ".join(filter(None, names))])])


def tiles(document: Document, results: Table) -> list[Tile]:
    """The outcome in up to five numbers."""
    best = int(np.argmin(results["nmse"]))
    found = [
        Tile("cells", f"{len(results)}", f"{_range(results, 'n_latents', 'N')}; {_range(results, 'k', 'k')}"),
        Tile("lowest nmse", f"{results['nmse'][best]:.4f}",
             f"{_whose(results, best, '{} ')}at N = {results['n_latents'][best]:,.0f}, k = {results['k'][best]:g}"),
    ]  # fmt: skip
    n_k = joint(document)
    if n_k is not None and (exponents := n_k.get("exponent_of_n_at_k")):
        first, last = exponents[min(exponents, key=float)], exponents[max(exponents, key=float)]
        ks = sorted(exponents, key=float)
        bounds = [_interval(e, 2) for e in (first, last)]
        detail = f"k = {ks[0]}: {bounds[0]}; k = {ks[-1]}: {bounds[1]}" if bounds[0] else f"k = {ks[0]} to {ks[-1]}"
        found.append(Tile("exponent of n", _minus(f"{first['value']:.2f} to {last['value']:.2f}"), detail))
    if n_k is not None and (held := n_k.get("holdout")):
        found.append(Tile("held-out error", f"{held['rms_log_error']:.1%}",
                          f"rms over {held['points']} cells with {held['held_out'].replace('>=', '≥')}"))  # fmt: skip
    if "flops" in results and np.isfinite(results["flops"]).all():
        wall = "wall_s" in results and np.isfinite(results["wall_s"]).all()
        detail = f"sparse; {duration(results['wall_s'].sum())} summed over cells" if wall else "sparse"
        found.append(Tile("training FLOPs", scientific(results["flops"].sum(), 3), detail))
    return found


def summarise(document: Document, results: Table) -> list[str]:
    """What the run shows, in a few sentences of plain text; `results` has n_latents, k and nmse."""
    n, k, nmse = results["n_latents"], results["k"], results["nmse"]
    best = int(np.argmin(nmse))
    sentences = [
        f"{len(results)} cells, {_range(results, 'n_latents', 'N')} and {_range(results, 'k', 'k')}. "
        f"The lowest held-out nmse is {nmse[best]:.4f}{_whose(results, best, ' ({})')}, at N = {n[best]:,.0f} and "
        f"k = {k[best]:g}."
    ]
    if len(kinds := kinds_of_document(document)) > 1:
        fitted = len({kind_label(entry["of"]) for entry in document["fits"] if "of" in entry})
        told = "Each" if fitted == len(kinds) else str(fitted or "None")
        whose = "their" if 1 < fitted < len(kinds) else "its"
        sentences.append(f"{told} of the {len(kinds)} kinds of cells got laws of {whose} own.")
        return [typeset(sentence) for sentence in sentences]
    n_k = joint(document)
    if n_k is None:
        reasons = [s["reason"] for s in document.get("skipped", ()) if s["law"] == "n_k"]
        sentences.append("L(N, k) was not fitted" + (f" ({reasons[0]})." if reasons else "."))
    else:
        exponents = n_k["exponent_of_n_at_k"]
        first, last = min(exponents, key=float), max(exponents, key=float)
        sentences.append(
            f"At fixed k the reducible part of nmse falls as a power of n: exponent {_value(exponents[first])} at "
            f"k = {first}, {_value(exponents[last])} at k = {last} (95 % bootstrap intervals). "
            f"The law L(N, k) leaves {n_k['rms_log_residual']:.2%} rms of nmse unexplained over {n_k['points']} cells."
        )
        if n_k["holdout"]:
            sentences.append(
                f"Fitted without {n_k['holdout']['held_out']}, it predicts those cells within "
                f"{n_k['holdout']['rms_log_error']:.2%} rms." + _coverage(n_k["holdout"])
            )
    # On a bound an exponent says nothing, which a warning tells.
    frontier = [entry for entry in document["fits"] if entry["law"] == "c" and entry["floor"] and entry["at"]
                and all(bound["interval_only"] for bound in entry.get("bounds_reached", ()))]  # fmt: skip
    if frontier:
        least, most = (pick(entry["coefficients"]["a"]["value"] for entry in frontier) for pick in (min, max))
        sentences.append(
            f"Along the compute frontier the part above the floor falls as C to the power of −{least:.2f}"
            + (f" to −{most:.2f}, by k." if len(frontier) > 1 else f" at k = {frontier[0]['at']['k']:g}.")
        )
    if exponent := (document.get("tokens_to_convergence") or {}).get("exponent_of_n"):
        sentences.append(
            f"The tokens that a cell takes to converge grow as a power of n: exponent {_value(exponent)}; about 0.6 "
            "was published for GPT-2 small (Gao et al. 2024)."
        )
    return [typeset(sentence) for sentence in sentences]


def _whose(results: Table, row: int, words: str) -> str:
    """`words` with the kind of that cell, where there are several; else nothing."""
    names = ("architecture", "subject", "site")
    of = {name: results[name][row].item() for name in names if name in results and len(np.unique(results[name])) > 1}
    return words.format(kind_label(of)) if of else ""


def joint(document: Document) -> Mapping[str, Any] | None:
    """The entry of L(N, k), where there is one kind of cells."""
    entries = [entry for entry in document["fits"] if entry["law"] == "n_k"]
    return entries[0] if len(kinds_of_document(document)) == 1 and entries else None


def formulas(document: Document) -> dict[str, str]:
    """The formula of each law that was fitted, by its name with or without floor."""
    return {_form(entry): entry["formula"] for entry in document["fits"]}


def law_tables(document: Document) -> list[TextTable]:
    """Each law with its intervals and how well it fits: one table for each form, a row for each k or coefficient."""
    found = []
    n_k = joint(document)
    if n_k is not None and n_k.get("exponent_of_n_at_k"):
        rows = [[k, _minus(f"{e['value']:.4f}"), _interval(e, 4)] for k, e in n_k["exponent_of_n_at_k"].items()]
        note = "Of the reducible part of L(N, k): these say more than its coefficients, which trade off."
        found.append(TextTable("Exponent of n at each k", note, ("k", "exponent", "95 % interval"), rows))
    forms: dict[str, list[Mapping[str, Any]]] = {}
    for entry in document["fits"]:
        forms.setdefault(_form(entry), []).append(entry)
    for name, entries in forms.items():
        if len(entries) == 1 and not entries[0]["at"] and not entries[0].get("of"):
            coefficients = entries[0]["coefficients"]
            rows = [[symbol, scientific(c["value"], 4), _interval(c, None)] for symbol, c in coefficients.items()]
            header: tuple[str, ...] = ("coefficient", "value", "95 % interval")
            found.append(TextTable(f"Law {name}", typeset(_quality(entries[0])), header, rows))
            continue
        held = sorted({column for entry in entries for column in entry["at"]})
        symbols = list(entries[0]["coefficients"])
        of_kinds = [kind_label(entry.get("of", {})) for entry in entries]
        kind = ("kind",) if any(of_kinds) else ()
        rows = [
            [*(label for _ in kind),
             *(f"{entry['at'][column]:g}" if column in entry["at"] else "" for column in held),
             *(_with_interval(entry["coefficients"][symbol]) for symbol in symbols),
             f"{entry['points']}", f"{entry['rms_log_residual']:.2%}", _held_out(entry)]
            for entry, label in zip(entries, of_kinds, strict=True)
        ]  # fmt: skip
        header = (*kind, *held, *symbols, "points", "rms residual", "held-out error")
        found.append(TextTable(f"Law {name}", "", header, rows))
    if rates := rate_rows(document):
        note = (
            "lr* is the minimum of a well through ln nmse over ln lr; at the right, what the best rate of the smallest "
        )
        note += "N costs at the largest."
        header = ("kind", "k", "exponent of N", "exponent of k", "smallest N's rate at the largest")
        own = rates if any(row[0] for row in rates) else [row[1:] for row in rates]
        found.append(TextTable("Best learning rate", note, header[-len(own[0]) :], own))
    return found


def _form(entry: Mapping[str, Any]) -> str:
    """What the fits of one form of a law are called together, whatever their k and kind of cells."""
    return law_label({**entry, "at": {}, "of": {}})


def _quality(entry: Mapping[str, Any]) -> str:
    """How well a law fits, in a sentence."""
    parts = [f"{entry['points']} points, {entry['rms_log_residual']:.2%} rms of ln nmse left over"]
    if held := _held_out(entry):
        parts.append(f"held-out error {held}")
    if starts := entry.get("starts"):
        parts.append(f"{starts['agree']} of {starts['tried']} starts agree")
    condition = (entry.get("condition_number") or {}).get("projected")
    if condition is not None:
        parts.append(f"condition number of its exponents {scientific(condition, 2)}")
    # Of a lack of fit a warning says it.
    if (lack := entry.get("lack_of_fit")) and not lack["significant"]:
        parts.append(lack["words"])
    if compared := (entry.get("without_last_term") or {}).get("words"):
        parts.append(compared)
    return "; ".join(parts) + "."


def _held_out(entry: Mapping[str, Any]) -> str:
    held = entry.get("holdout")
    return typeset(f"{held['rms_log_error']:.2%} ({held['held_out']})") if held else ""


def _with_interval(value: Mapping[str, float | None]) -> str:
    bounds = _interval(value, None).replace(" to ", ", ")
    return scientific(value["value"] or 0.0, 4) + (f" [{bounds}]" if bounds else "")


def totals(document: Document, results: Table) -> dict[str, str]:
    """Where the numbers come from and what they cost."""
    found = {"source": results.source}
    for column, label in (("flops", "training FLOPs (sparse)"), ("flops_dense", "training FLOPs (dense equivalent)")):
        if column in results and np.isfinite(results[column]).all():
            found[label] = scientific(results[column].sum(), 4)
    if "wall_s" in results and np.isfinite(results["wall_s"]).all():
        found["training time summed over cells"] = duration(results["wall_s"].sum())
    if made := document.get("made_from"):
        found["fitted from"] = (
            f"results {made.get('results')}, {made.get('bootstraps')} bootstrap fits, seed {made.get('seed')}"
        )
    return found


def cell_columns(results: Table) -> list[Column]:
    """The columns in which cells differ; N, k and nmse always."""
    names = _shown(results)
    return [
        Column(_CELL_COLUMNS[name].key, _CELL_COLUMNS[name].label, results[name].dtype.kind == "f") for name in names
    ]


def common_columns(results: Table) -> str:
    """What all cells have in common, such as "architecture topk, seed 0"."""
    names = [name for name in _CELL_COLUMNS if name in results and name not in _shown(results)]
    texts = {_CELL_COLUMNS[name].label: _text(name, results[name][0]) for name in names}
    return ", ".join(f"{label} {text}" for label, text in texts.items() if text)


def cell_rows(results: Table) -> list[CellRow]:
    """Every SAE, by N and k."""
    order = np.lexsort([results["k"], results["n_latents"]])
    names = _shown(results)
    of = results["architecture"] if "architecture" in names else np.full(len(results), "")
    return [
        CellRow(
            f"{results['k'][row]:g}",
            str(of[row]),
            [CellText(_text(n, results[n][row]), _plain(results[n][row])) for n in names],
        )
        for row in order
    ]


def duration(seconds: float) -> str:
    """Such as "2 h 05 min", "3 min 12 s" or "14 s"."""
    whole = round(float(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def _shown(results: Table) -> list[str]:
    names = [name for name in _CELL_COLUMNS if name in results]
    return [name for name in names if name in _ALWAYS or len(np.unique(results[name])) > 1]


def _text(column: str, value: Any) -> str:
    """Text as it is; whole numbers in full, others to five digits; nothing for a missing number."""
    if isinstance(value, str):
        return value
    if np.isnan(value):
        return ""
    if column == "dead_fraction":
        return f"{100 * value:.2f} %"
    if (decimals := COLUMNS[column].decimals) is not None:
        return f"{value:.{decimals}f}"
    if value % 1 == 0 and abs(value) < 1e10:
        return f"{value:,.0f}"
    return scientific(value, 5)


def _plain(value: Any) -> float | None:
    return None if isinstance(value, str) or np.isnan(value) else float(value)


def _range(results: Table, column: str, symbol: str) -> str:
    low, high = results[column].min(), results[column].max()
    return f"{symbol} = {low:,.0f}" + (f" to {high:,.0f}" if high > low else "")


def _coverage(held: Mapping[str, Any]) -> str:
    rows: Iterable[Mapping[str, Any]] = held.get("predictions", ())
    given = [row for row in rows if row.get("low") is not None and row.get("high") is not None]
    inside = sum(row["low"] <= row["measured"] <= row["high"] for row in given)
    return f" {inside} of {len(given)} lie within the interval of their prediction." if given else ""


def _value(value: Mapping[str, float | None]) -> str:
    text = f"{value['value']:.3f}"
    return (
        text if value["low"] is None or value["high"] is None else text + f" [{value['low']:.3f}, {value['high']:.3f}]"
    )


def _interval(value: Mapping[str, float | None], digits: int | None) -> str:
    low, high = value.get("low"), value.get("high")
    if low is None or high is None:
        return ""
    ends: tuple[float, float] = (low, high)
    return " to ".join(scientific(end, 4) if digits is None else _minus(f"{end:.{digits}f}") for end in ends)


def scientific(value: float, digits: int) -> str:
    """To so many digits; where a plain number would be long, such as "5.92 × 10¹³"."""
    text = f"{value:.{digits}g}"
    mantissa, _, power = text.partition("e")
    if not power:
        return _minus(text)
    return _minus(mantissa) + " × 10" + str(int(power)).translate(_RAISED)


def typeset(text: str) -> str:
    """Prose with ≥, with the typographic minus before numbers, and without a break beside an equals sign."""
    text = re.sub(r"(\d(?:\.\d+)?)e([+-]\d+)", lambda m: f"{m[1]} × 10{str(int(m[2])).translate(_RAISED)}", text)
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text).replace(">=", "≥").replace("<=", "≤")
    return re.sub(r" ([=≥≤]) ", "\u00a0\\1\u00a0", text).replace(" %", "\u00a0%")


def markdown(value: Any) -> str:
    """Text of anybody's (names, paths, errors) for a page of Markdown or a cell of its tables: on one line, and shown
    as it is."""
    line = re.sub(r"[\\`*{}\[\]<>|$~&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", re.sub(r"\s*[\r\n\v\f]\s*", " ", str(value)))
    return re.sub(r"^(\d+)(?=[.)](?: |$))", r"\1\\", re.sub(r"^(?=[#+-])", r"\\", line))


def _minus(text: str) -> str:
    return text.replace("-", "−")
