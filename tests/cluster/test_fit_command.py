"""`saescale fit` on what people feed to it: any table ends in finite numbers or in one line."""

import gzip
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saescale.scaling.laws.forms.n_k import GPT4, N_K
from tests.cluster.command import assert_one_line, saescale_here

SIZES, KS = (512, 1024, 2048, 4096), (8, 16, 32, 64)


def value(n: float, k: float, noise: float = 0.01) -> float:
    """nmse of the published law, with a scatter that is the same every time."""
    law = N_K.value(GPT4, {"n_latents": np.array([max(n, 1)]), "k": np.array([k])})[0]
    return float(law * math.exp(noise * math.sin(n * k)))


ROWS = [{"n_latents": n, "k": k, "nmse": value(n, k)} for n in SIZES for k in KS]


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """What numpy and scipy warn of would stand on a user's screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[dict[str, Any]], name: str = "cells.csv", header: str = "") -> str:
        names = list(dict.fromkeys(key for row in rows for key in row))
        lines = [header or ",".join(names), *(",".join(str(row.get(key, "")) for key in names) for row in rows)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return write


def fit(*arguments: str, bootstraps: int = 0) -> dict[str, Any]:
    result = saescale_here("fit", *arguments, "--bootstraps", str(bootstraps), "--json")
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout, parse_constant=pytest.fail)
    return document


def test_a_cell_counts_once(write: Callable[..., str], tmp_path: Path) -> None:
    rows = [row for row in ROWS if row["k"] == 8]
    base = write(rows)
    alone = fit(base, "--law", "n", bootstraps=40)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "again.parquet")
    for sources in ((base, base), (write(rows * 2, "twice.csv"),), (base, str(tmp_path / "again.parquet"))):
        found = fit(*sources, "--law", "n", bootstraps=40)
        assert [f["coefficients"] for f in found["fits"]] == [f["coefficients"] for f in alone["fits"]]
        said = ("named several times and read once", "4 cells are in several sources", "4 rows are equal")
        assert sum(any(words in text for words in said) for text in found["warnings"]) == 1
    seeds = fit(write([row | {"seed": seed} for seed in (0, 1) for row in rows], "seeds.csv"), "--law", "n")
    assert seeds["cells"] == 8


def test_a_cell_of_two_values_is_said(write: Callable[..., str]) -> None:
    rows = [row | {"subject": "toy", "seed": 0} for row in ROWS]
    other = [row | {"nmse": 1.02 * row["nmse"]} for row in rows[:3]]
    for sources in ((write(rows, "a.csv"), write(other, "b.csv")), (write(rows + other, "both.csv"),)):
        (said,) = [text for text in fit(*sources, "--law", "n")["warnings"] if "of another nmse" in text]
        assert said.startswith("3 cells are like another in n_latents, k, seed")
        assert "up to 2.00% off" in said


def test_where(write: Callable[..., str]) -> None:
    kinds = [row | {"architecture": name, "nmse": row["nmse"] * factor}
             for name, factor in (("topk", 1), ("re|lu x", 1.1)) for row in ROWS]  # fmt: skip
    source = write(kinds)
    apart = fit(source, "--where", "architecture=re|lu x", "--law", "n_k")
    assert (apart["cells"], apart["warnings"]) == (16, [])
    both = fit(source, "--law", "n_k")
    assert [entry["of"]["architecture"] for entry in both["fits"]] == ["topk", "re|lu x"]
    assert both["fits"][1]["coefficients"] == apart["fits"][0]["coefficients"]
    law = ("--law", "n")
    several = fit(
        source, *law, "--where", "architecture=topk", "--where", "k=8", "--where", "k=16", "--where", "N<=4096"
    )
    assert several["cells"] == 8
    assert fit(source, *law, "--where", "architecture!=topk", "--where", "K<32")["cells"] == 8
    for condition, said in (
        ("architecture=gated", "no finished cell with --where architecture=gated; architecture is re|lu x, topk"),
        ("architectur=topk", "no column architectur; did you mean architecture?"),
        ("k=eight", "k holds numbers, not 'eight'"),
        ("architecture>topk", "holds text, which has no order"),
        ("topk", "write a column, ="),
    ):
        assert_one_line(saescale_here("fit", source, "--where", condition), said)


def test_nothing_fitted_is_an_error(write: Callable[..., str]) -> None:
    few = write(ROWS[:2], "few.csv")
    assert_one_line(
        saescale_here("fit", few), "no law could be fitted: 2 points for 6 coefficients; it takes at least 8"
    )
    equal = write([row | {"nmse": 0.2} for row in ROWS], "equal.csv")
    assert_one_line(
        saescale_here("fit", equal), "nmse is 0.2 at all 16 points: there is nothing that a law could follow"
    )
    lacks = write([{"N": row["n_latents"], "k": row["k"], "nmse": row["nmse"]} for row in ROWS], "lacks.csv")
    assert_one_line(
        saescale_here("fit", lacks), "no column n_latents; it has N, k, nmse. If N is it, call it n_latents"
    )


def test_predictions_take_all_that_is_asked(write: Callable[..., str]) -> None:
    source = write([row | {"tokens": 1_000_000} for row in ROWS])
    at = ("--law", "n_k", "--predict")
    same = fit(source, *at, "n=65536,k=32,tokens=1e6")["predictions"]
    assert [row["value"] for row in same] == [row["value"] for row in fit(source, *at, "n=65536,k=32")["predictions"]]
    for point, said in (
        ("n=65536,k=32,tokens=2e6", "no fitted law applies at n = 65536, k = 32, D = 2000000"),
        ("n=1e6,k=2e6", "k is above n"),
        ("n=65536", "there are n_k (needs n, k)"),
    ):
        assert_one_line(saescale_here("fit", source, *at, point, "--bootstraps", "0"), said)


def test_too_few_bootstraps_give_no_interval(write: Callable[..., str]) -> None:
    found = fit(write(ROWS), "--law", "n_k", bootstraps=1)
    assert {c["low"] for c in found["fits"][0]["coefficients"].values()} == {None}
    assert found["warnings"] == ["1 bootstrap fits give no 95 % interval, and none is shown: it takes 40, better 1000"]
    for fitted in fit(write(ROWS), "--law", "n_k", bootstraps=40)["fits"]:
        for name, c in fitted["coefficients"].items():
            assert c["low"] <= c["value"] <= c["high"], (fitted["law"], name)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda n, k, y: round(y, 1), None),
        (lambda n, k, y: float(n) ** -0.5, -0.5),
        (lambda n, k, y: 0.2 if n < 2000 else 0.1, None),
        (lambda n, k, y: 0.21 if (n, k) == (512, 8) else 0.2, None),
        (lambda n, k, y: 1e12 * float(n) ** -6, "bounds"),
        (lambda n, k, y: y * 1e30, None),
        (lambda n, k, y: y * 1e-30, None),
    ],
    ids=["one digit", "exact power", "two values", "one other", "steep", "huge", "tiny"],
)
def test_degenerate_tables(
    write: Callable[..., str], change: Callable[[int, int, float], float], expected: float | str | None
) -> None:
    rows = [row | {"nmse": change(row["n_latents"], row["k"], row["nmse"])} for row in ROWS]
    found = fit(write(rows), bootstraps=40)
    assert {fitted["law"] for fitted in found["fits"]} == {"n_k", "n"}
    if expected == "bounds":
        assert all(fitted["bounds_reached"] for fitted in found["fits"] if not fitted["floor"])
    elif expected:
        for each in found["fits"][0]["exponent_of_n_at_k"].values():
            assert each["value"] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("factor", [1e300, 1e-300], ids=["above", "below"])
def test_numbers_without_a_scale(write: Callable[..., str], factor: float) -> None:
    source = write([row | {"nmse": row["nmse"] * factor} for row in ROWS])
    assert_one_line(saescale_here("fit", source), "nmse is", "at a point, which no law is fitted to")


def test_an_infinite_nmse_is_that_of_a_diverged_cell(write: Callable[..., str]) -> None:
    rows = [*ROWS, {"n_latents": 8192, "k": 8, "nmse": math.inf}]
    for options in ((), ("--keep-diverged",)):
        found = fit(write(rows), "--law", "n_k", *options)
        assert found["cells"] == 16
        assert any("N = 8192, k = 8: nmse inf" in text for text in found["warnings"])


# --- any table


def _csv(rows: list[dict[str, Any]], names: list[str], separator: str, encoding: str, packed: bool) -> bytes:
    lines = [separator.join(names), *(separator.join(str(v) for v in row.values()) for row in rows)]
    content = "\r\n".join(lines).encode(encoding)
    return gzip.compress(content) if packed else content


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, bytes]:
    """(name, content) of a table as somebody might have written it."""
    nmse: Callable[[int, int], Any] = draw(st.sampled_from([
        value, lambda n, k: round(value(n, k), 1), lambda n, k: 0.2, lambda n, k: max(n, 1) ** -0.3, lambda n, k: k,
        lambda n, k: 1e27 if k == 8 else value(n, k), lambda n, k: -value(n, k), lambda n, k: 0, lambda n, k: None,
        lambda n, k: f"{value(n, k):.4f}".replace(".", ","), lambda n, k: f"{100 * value(n, k):.2f}%",
        lambda n, k: "n.m." if n == 512 else value(n, k), lambda n, k: math.inf if n == 512 else value(n, k),
        lambda n, k: value(n, k) * 1e200,
    ]))  # fmt: skip
    extra = draw(st.dictionaries(
        st.sampled_from(["seed", "tokens", "flops", "l0", "status", "d_model", "note", "Unnamed: 0", "dead_fraction"]),
        st.sampled_from(["n.m.", "", "done", "Finished", "1764076800123456789", "0.5", "1e15", "1,024", "nan", "-1",
                         "inf", "0", "\u00e9|<b>"]), max_size=4,
    ))  # fmt: skip
    sizes = draw(st.sampled_from([SIZES, (512,), (512, 1024), (1, 2, 3, 2**60), (0, 512), (512.5, 1024)]))
    ks = draw(st.sampled_from([KS, (8,), (1, 2), ("8k",)]))
    times = draw(st.sampled_from([1, 1, 2]))
    rows: list[dict[str, Any]] = [
        {"n_latents": n, "k": k, "nmse": nmse(n, k if isinstance(k, int) else 8), **extra} for n in sizes for k in ks
    ] * times  # fmt: skip
    spell = draw(st.sampled_from([str, str.upper, str.title, lambda s: f" {s} ", lambda s: s.replace("_", " ")]))
    names = [spell(name) for name in rows[0]]
    if draw(st.booleans()) and draw(st.booleans()):
        names[draw(st.integers(0, len(names) - 1))] = draw(st.sampled_from(["nmse", "", "k", "N", "fvu", "# x"]))
    if draw(st.integers(0, 2)):
        separator = draw(st.sampled_from([",", "\t", ";", " ", "|"]))
        encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
        content = _csv(rows, names, separator, encoding, draw(st.booleans()))
        return draw(st.sampled_from(["t.csv", "t.tsv", "t.txt", "t.csv.gz"])), content
    columns = [pa.array([row[name] for row in rows], from_pandas=True) if len({type(row[name]) for row in rows}) == 1
               else pa.array([str(row[name]) for row in rows]) for name in rows[0]]  # fmt: skip
    kind = draw(st.sampled_from(["plain", "dictionary", "binary"]))
    if kind != "plain":
        to = pa.dictionary(pa.int32(), pa.string()) if kind == "dictionary" else pa.binary()
        columns = [c.cast(to) if pa.types.is_string(c.type) else c for c in columns]
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns, names=names), sink)
    content = bytearray(sink.getvalue().to_pybytes())
    for _ in range(draw(st.sampled_from([0, 0, 1, 20]))):
        content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return "t.parquet", bytes(content)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(table=tables(), laws=st.sampled_from([(), ("--law", "n"), ("--law", "n_d"), ("--predict", "n=8192,k=16")]))
def test_any_table_ends_in_numbers_or_in_one_line(
    table: tuple[str, bytes], laws: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tmp_path_factory.mktemp("any") / table[0]
    source.write_bytes(table[1])
    result = saescale_here("fit", str(source), "--json", "--bootstraps", "0", *laws)
    lines = result.stderr.splitlines()
    assert result.returncode in (0, 2), result.stderr
    if result.returncode == 0:
        document = json.loads(result.stdout, parse_constant=pytest.fail)
        assert document["fits"]
        for fitted in document["fits"]:
            assert all(math.isfinite(c["value"]) for c in fitted["coefficients"].values())
        return
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"error: {source}: ") or "no fitted law applies" in lines[0]
    assert "unexpected" not in lines[0]
