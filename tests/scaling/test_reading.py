"""Tables as people write them: one content in many spellings, and no digit lost."""

import datetime
import gzip
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from saescale.scaling.sources import load_sources
from saescale.scaling.tables import Table, load_results
from saescale.storage.errors import SaescaleError

PLAIN = "n_latents,k,nmse\n512,8,0.25\n1024,16,0.125\n"


def read(folder: Path, content: str | bytes, name: str = "cells.csv") -> Table:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_results(str(path))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (PLAIN, "cells.csv"),
        (PLAIN.replace(",", "\t"), "cells.tsv"),
        (PLAIN.replace(",", "\t"), "cells.csv"),
        (PLAIN.replace(",", ";"), "cells.csv"),
        (PLAIN.replace(",", ";").replace(".", ","), "cells.csv"),
        (PLAIN.replace(",", "|"), "cells.txt"),
        (PLAIN.replace(",", "   "), "cells.txt"),
        ("sep=;\n" + PLAIN.replace(",", ";"), "cells.csv"),
        (PLAIN.replace("\n", "\r\n"), "cells.csv"),
        (PLAIN.replace("\n", "\r"), "cells.csv"),
        (PLAIN.replace("\n", ",,\n") + ",,,,\n\n\n", "cells.csv"),
        ("# made by hand\n" + PLAIN + "# the end, of it\n", "cells.csv"),
        ("# " + PLAIN, "cells.csv"),
        (PLAIN + PLAIN.splitlines()[0] + "\n", "cells.csv"),
        (PLAIN.replace("n_latents,k,nmse", " N_Latents , K,NMSE "), "cells.csv"),
        (PLAIN.replace("n_latents", "n latents"), "cells.csv"),
        (PLAIN.replace("n_latents,k,nmse", '"n_latents","k","nmse"').replace("0.25", '"0.25"'), "cells.csv"),
        (PLAIN.replace("0.25", "25%").replace("0.125", "12.5 %"), "cells.csv"),
        (PLAIN.replace("0.25", "2.5e-1").replace("512", "512.0"), "cells.csv"),
        (",n_latents,k,nmse\n0,512,8,0.25\n1,1024,16,0.125\n", "cells.csv"),
        ("n_latents\tk\tnmse\n1\t512\t8\t0.25\n2\t1024\t16\t0.125\n", "cells.tsv"),
        (b"\xef\xbb\xbf" + PLAIN.encode(), "cells.csv"),
        (PLAIN.encode("utf-16"), "cells.csv"),
        (PLAIN.encode("utf-16-le"), "cells.csv"),
        (gzip.compress(PLAIN.encode(), mtime=0), "cells.csv.gz"),
        (PLAIN.replace("nmse", "nmse,note").replace("0.25", "0.25,caf\xe9").encode("latin-1"), "cells.csv"),
        (PLAIN.replace("nmse", "nmse,note").replace("0.25", '0.25,"a\n# ""b"", c"'), "cells.csv"),
    ],
)
def test_one_content_in_many_spellings(tmp_path: Path, content: str | bytes, name: str) -> None:
    table = read(tmp_path, content, name)
    assert [table[column].tolist() for column in ("n_latents", "k", "nmse")] == [[512, 1024], [8, 16], [0.25, 0.125]]
    assert table.notes == ()


@pytest.mark.parametrize(
    "cast",
    [
        lambda column: column.cast(pa.string()),
        lambda column: column.cast(pa.large_string()),
        lambda column: column.cast(pa.string()).cast(pa.binary()),
        lambda column: column.cast(pa.string()).dictionary_encode(),
        lambda column: column.dictionary_encode(),
        lambda column: column.cast(pa.float32()),
        lambda column: pa.array([Decimal(str(v)) for v in column.to_pylist()]),
    ],
    ids=["string", "large_string", "binary", "categorical text", "categorical", "float32", "decimal"],
)
def test_types_of_parquet(tmp_path: Path, cast: Callable[[pa.Array], pa.Array]) -> None:
    plain = {"n_latents": [512, 1024], "k": [8, 16], "nmse": [0.25, 0.125]}
    columns = {name: cast(pa.array(values)) for name, values in plain.items()}
    columns["day"] = pa.array([datetime.date(2026, 1, 1), None])
    columns["parts"] = pa.array([[1, 2], None])
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "cells.parquet")
    table = load_results(str(tmp_path / "cells.parquet"))
    assert {name: table[name].tolist() for name in plain} == plain
    assert table["day"].tolist() == ["2026-01-01", ""]


@pytest.mark.parametrize("word", ["done", "Done", "FINISHED", "completed ", "success", True])
def test_what_is_finished(tmp_path: Path, word: Any) -> None:
    rows = [{"n_latents": 512, "k": 8, "nmse": 0.3, "status": word}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "cells.parquet")
    assert len(load_results(str(tmp_path / "cells.parquet"))) == 1


def test_integers_are_not_floats(tmp_path: Path) -> None:
    """What is a name keeps its digits; what laws calculate with becomes the nearest float64."""
    seeds, big = [1764076800123456789, 1764076800123456790], 2**63 + 1025
    rows = [{"n_latents": 512, "k": 8, "nmse": 0.3, "seed": seed, "flops": big, "job": seed} for seed in seeds]
    schema = pa.schema([("n_latents", pa.int32()), ("k", pa.int8()), ("nmse", pa.float64()), ("seed", pa.int64()),
                        ("flops", pa.uint64()), ("job", pa.uint64())])  # fmt: skip
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "cells.parquet")
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (tmp_path / "cells.csv").write_text("\n".join(lines) + "\n")
    for name in ("cells.parquet", "cells.csv"):
        table, _ = load_sources([str(tmp_path / name)])
        assert table["seed"].tolist() == table["job"].tolist() == [str(seed) for seed in seeds]
        assert table["flops"].tolist() == [float(big)] * 2
    text = "n_latents,k,nmse,seed\n512,8,0.3,123456789012345678901234567890\n512,8,0.3,1\n"
    assert read(tmp_path, text)["seed"].tolist() == ["123456789012345678901234567890", "1"]
    assert read(tmp_path, text.replace("123456789012345678901234567890", "0"))["seed"].tolist() == [0, 1]


def test_what_no_law_needs_is_no_reason_to_refuse(tmp_path: Path) -> None:
    table = read(tmp_path, "n_latents,k,nmse,l0,tag,tag,flops\n512,8,0.25,n.m.,a,b,1e15\n1024,16,0.125,7,c,d,lots\n")
    assert np.isnan(table["l0"]).tolist() == [True, False]
    assert "tag" not in table  # two that differ, of a name that no law knows
    assert table.notes == (f"{table.source}: taken as missing where there is no number: flops ('lots')",)
    with pytest.raises(SaescaleError, match=r"flops is 'lots' in row 2 \(N = 1024, k = 16\), which is no number"):
        table.require(("flops",))
    assert read(tmp_path, "n_latents,k,nmse,nmse\n512,8,0.25,0.25\n")["nmse"].tolist() == [0.25]


def test_places_are_those_of_the_source(tmp_path: Path) -> None:
    """Whatever is left out on the way, a message names the row as it stands in the file."""
    text = "n_latents,k,nmse,status,tokens\n512,8,,failed,1\n512,8,0.3,done,1\n1024,8,0.2,done,n.a.\n"
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "b.csv").write_text(text.replace("0.3", "0.25").replace("0.2,", "0.15,"))
    table, _ = load_sources([str(tmp_path / "a.csv")])
    with pytest.raises(SaescaleError, match=r"tokens is missing in row 3 \(N = 1024, k = 8\)"):
        table.require(("tokens",))
    both, _ = load_sources([str(tmp_path / "b.csv"), str(tmp_path / "a.csv")])
    with pytest.raises(SaescaleError, match=r"tokens is missing in row 3 of .*b.csv"):
        both.require(("tokens",))


def test_commented_rows_are_said(tmp_path: Path) -> None:
    assert read(tmp_path, PLAIN + "#2048,8,1.7\n").notes == (
        f"{tmp_path}/cells.csv: taken for comments, since they begin with #: 1 of its rows",
    )
