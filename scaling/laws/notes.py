"""What people read of a fits.json document: short names of its laws, its coefficients, and what must be said of it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saescale.scaling.kinds import Kind, kind_label
from saescale.scaling.words import MOST, listed

Entry = Mapping[str, Any]
_ALIKE, _LIKEWISE = 4, 2  # of more than four notes that differ in their numbers alone two are written out


class CoefficientRow(NamedTuple):
    """A row of the coefficient table; `low` and `high` are None without a bootstrap, `kind` names the kind of cells
    where there are several."""

    law: str
    coefficient: str
    value: float
    low: float | None
    high: float | None
    kind: str = ""


def law_label(entry: Entry) -> str:
    """A short name of one entry of "fits" or "skipped", such as "n at k = 32, with floor" or "gated: n_k"."""
    kind = kind_label(entry.get("of", {}))
    return (f"{kind}: " if kind else "") + _label(entry["law"], [entry["at"]], entry["floor"])


def kinds_of_document(document: Entry) -> list[Kind]:
    """The kinds of cells that have laws in a document or were skipped, each once; [{}] where there is one."""
    found: list[Kind] = []
    for entry in (*document["fits"], *document["skipped"]):
        if (of := entry.get("of", {})) not in found:
            found.append(of)
    return found or [{}]


def of_kind(document: Entry, of: Kind) -> dict[str, Any]:
    """The document with the entries of one kind of cells alone, as if there were no other."""
    found = dict(document)
    for key, value in document.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            own = [entry for entry in value if entry.get("of", {}) == of]
            found[key] = [{name: part for name, part in entry.items() if name != "of"} for entry in own]
    if isinstance(found.get("tokens_to_convergence"), list):
        found["tokens_to_convergence"] = next(iter(found["tokens_to_convergence"]), None)
    return found


def about(name: str, note: str) -> str:
    """A note with the metric that it is about, once."""
    return note if note.startswith(name) else f"{name}: {note}"


def metric_document(metrics: Sequence[Entry], name: str) -> dict[str, Any]:
    """One metric of the `metrics` of a fits.json, all kinds of cells together, as a document of its own."""
    own = [entry for entry in metrics if entry["metric"] == name]
    kinds = {
        text: [kind_label(e.get("of", {})) for e in own if text in e["warnings"]] for e in own for text in e["warnings"]
    }
    said = [text if len(labels) == len(own) else f"{listed(labels, ', ')}: {text}" for text, labels in kinds.items()]
    return {
        **{key: own[0][key] for key in ("metric", "better", "fitted")},
        "fits": [fit for entry in own for fit in entry["fits"]],
        "skipped": [fit for entry in own for fit in entry["skipped"]],
        "warnings": said,
    }


def fit_notes(document: Entry) -> list[str]:
    """What must be said beside the coefficients of a fits.json document: laws that were not fitted, warnings about the
    cells, about each fit and about best rates.

    What holds for several kinds, k or laws is said once and names them; of notes that differ only in their numbers from
    kind to kind the first two.
    """
    kinds = [kind_label(of) for of in kinds_of_document(document)]
    skipped = _said_once([(entry, entry["reason"]) for entry in document["skipped"]], kinds)
    warned = _said_once([(entry, warning) for entry in document["fits"] for warning in entry["warnings"]], kinds)
    of_rates: dict[str, list[str]] = {}
    for rates in document.get("rates", ()):
        for text in rates["warnings"]:
            of_rates.setdefault(text, []).append(kind_label(rates.get("of", {})))
    rated = [(f"{listed(names, ', ')}: " if any(names) else "") + text for text, names in of_rates.items()]
    return [*(f"not fitted: {note}" for note in skipped), *document["warnings"], *warned, *rated]


def coefficient_rows(document: Entry) -> list[CoefficientRow]:
    """The coefficient table of a fits.json document, exponents of n at each k included."""
    rows = []
    for entry in document["fits"]:
        kind, label = kind_label(entry.get("of", {})), _label(entry["law"], [entry["at"]], entry["floor"])
        named = dict(entry["coefficients"])
        for key, symbol in (("exponent_of_n_at_k", "k"), ("exponent_of_n_at_d_model", "s")):
            named |= {f"exponent of n at {symbol} = {level}": v for level, v in entry.get(key, {}).items()}
        rows += [CoefficientRow(label, name, v["value"], v["low"], v["high"], kind) for name, v in named.items()]
    return rows


def kind_rows(document: Entry) -> list[tuple[str, str, str]]:
    """(law, kind of cells, coefficients in words) of each fit of a document of several kinds, so that kinds of one law
    and k stand below each other. Of a law in n and k exponents of n at the ends and the middle of k stand for all."""
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for entry in document["fits"]:
        named = {f"{name} = ": value for name, value in entry["coefficients"].items()}
        if exponents := entry.get("exponent_of_n_at_k"):
            ks = list(exponents)
            shown = dict.fromkeys((ks[0], ks[len(ks) // 2], ks[-1]))
            named = {f"at k = {k} n^": exponents[k] for k in shown}
        label = _label(entry["law"], [entry["at"]], entry["floor"])
        words = ", ".join(f"{name}{with_ends(value)}" for name, value in named.items())
        rows.setdefault(label, []).append((label, kind_label(entry.get("of", {})), words))
    return [row for own in rows.values() for row in own]


def rate_rows(document: Entry) -> list[tuple[str, str, str, str, str]]:
    """(kind of cells, k, exponent of N, exponent of k, what the smallest N's best rate costs at the largest N) of each
    law of the best rate, the one over all k with "all"; and of each k that has no law but two minima."""
    rows = []
    for rates in document.get("rates", ()):
        kind, costs = kind_label(rates.get("of", {})), {entry.get("k"): entry for entry in rates["transfer"]}
        of_k = {law["at"].get("k"): law["coefficients"] for law in rates["laws"] if law["law"] == "lr_n"}
        for k in dict.fromkeys((*of_k, *costs)):
            cost = costs.get(k, {}).get("nmse_higher_by")
            words = "not known" if cost is None else f"nmse {cost:.2%} higher"
            g = with_ends(of_k[k]["g"]) if k in of_k else ""
            rows.append((kind, "" if k is None else f"{k:g}", g, "", words if k in costs else ""))
        for law in (law for law in rates["laws"] if law["law"] == "lr_n_k"):
            g, h = (with_ends(law["coefficients"][name]) for name in ("g", "h"))
            rows.append((kind, "all", g, h, ""))
    return rows


def with_ends(value: Mapping[str, float | None]) -> str:
    """A value with its interval, such as "-0.163 (-0.18 to -0.15)"."""
    low, high = value["low"], value["high"]
    return f"{value['value']:.3g}" + ("" if low is None or high is None else f" ({low:.3g} to {high:.3g})")


def _said_once(notes: Sequence[tuple[Entry, str]], kinds: Sequence[str]) -> list[str]:
    """Each text once, after the laws that it concerns; `notes` are (entry of fits or skipped, text)."""
    concerned: dict[str, list[Entry]] = {}
    for entry, text in notes:
        concerned.setdefault(text, []).append(entry)
    alike: dict[str, list[str]] = {}
    for text in concerned:
        # Numbers of one kind's fit say the same of all kinds: one line for each of 144 would be read by nobody.
        alike.setdefault(re.sub(r"[\d.,]*\d[\d.e%+-]*", "#", text) if len(kinds) > 1 else text, []).append(text)
    said = []
    for texts in alike.values():
        shown = texts if len(texts) <= _ALIKE else texts[:_LIKEWISE]
        said += [f"{_laws(concerned[text], kinds)}: {text}" for text in shown]
        if others := [entry for text in texts[len(shown) :] for entry in concerned[text]]:
            said.append(f"{_laws(others, kinds)}: likewise, with other numbers (--json has them)")
    return said


def _laws(entries: Sequence[Entry], kinds: Sequence[str]) -> str:
    """The laws of entries, such as "n at k = 8, 16; c at k = 8, with floor", each with the kinds of cells after it."""
    laws: dict[tuple[str, bool], dict[str, list[Mapping[str, float]]]] = {}
    for entry in entries:
        of_law = laws.setdefault((entry["law"], entry["floor"]), {})
        of_law.setdefault(kind_label(entry.get("of", {})), []).append(entry["at"])
    words = []
    for (law, floor), ats in laws.items():
        for label, names in _grouped({kind: _label(law, own, floor) for kind, own in ats.items()}).items():
            words.append(label + _of_kinds(names, kinds))
    return "; ".join(words)


def _of_kinds(names: Sequence[str], kinds: Sequence[str]) -> str:
    """Which kinds those are: their names, or where they are many how many, and which few are not among them."""
    if not any(names):
        return ""
    others = [kind for kind in kinds if kind not in names]
    if not others and len(kinds) > 1:
        return " of all kinds"
    if len(names) <= MOST:
        return f" ({listed(names, ', ')})"
    return (
        f" of all kinds but {listed(others, ', ')}"
        if len(others) <= MOST
        else f" of {len(names)} of {len(kinds)} kinds"
    )


def _grouped(labels: Mapping[str, str]) -> dict[str, list[str]]:
    """The keys of each value."""
    found: dict[str, list[str]] = {}
    for name, label in labels.items():
        found.setdefault(label, []).append(name)
    return found


def _label(law: str, ats: Sequence[Mapping[str, float]], floor: bool) -> str:
    """Such as "n at k = 8, 16, with floor" for n with a floor at k = 8 and at k = 16."""
    held = "".join(
        f" at {column} = {listed((f'{level:g}' for level in sorted({at[column] for at in ats if column in at})), ', ')}"
        for column in ats[0]
    )
    return law + held + (", with floor" if floor else "")
