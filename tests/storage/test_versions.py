"""evals.parquet, to which several processes add rows at one time: nobody's are lost, and its name has the newest."""

import multiprocessing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from saescale.storage import files, versions
from saescale.storage.columns import EVALS
from saescale.storage.documents import parquet_table
from saescale.storage.rundir import METRICS, RunDirectory

EACH = 8  # rows that a process writes


def write(url: str, cell: str, start: Any = None) -> None:
    if start is not None:
        start.wait()
    for number in range(EACH if start is not None else 1):
        rows = [{"metric": "m", "value": float(number)}]
        RunDirectory(url).write_evals(cell, f"e{number}", rows, {f"e{number}.m": {}})


def there(url: str) -> set[tuple[str, str]]:
    """What readers find, which is what the file of that name has."""
    table = RunDirectory(url).read_evals()
    assert parquet_table(files.read_bytes(files.join(url, "evals.parquet"))).to_pylist() == table.to_pylist()
    return set(zip(table["cell_id"].to_pylist(), table["evaluation"].to_pylist(), strict=True))


@pytest.mark.parametrize("kind", ["file", pytest.param("s3", marks=pytest.mark.slow)])
def test_two_processes_lose_no_row_of_each_other(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = str(tmp_path) if kind == "file" else request.getfixturevalue("s3_url")
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    both = [context.Process(target=write, args=(url, cell, start)) for cell in ("a", "b")]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert there(url) == {(cell, f"e{number}") for cell in ("a", "b") for number in range(EACH)}
    assert len(RunDirectory(url).read_evals()) == 2 * EACH
    assert files.list_names(files.join(url, "evals")) == [f"{2 * EACH:05d}.parquet"]


def test_who_was_slower_begins_again(any_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the table and making its next version, as late as can be."""
    write(any_url, "first")
    create, others = files.create, ["b", "c"]  # after the second of which the version that was read is gone

    def late(url: str, content: bytes) -> bool:
        while others:
            write(any_url, others.pop())
        return create(url, content)

    monkeypatch.setattr(files, "create", late)
    write(any_url, "a")
    assert {cell for cell, _ in there(any_url)} == {"first", "a", "b", "c"}


def test_who_gives_the_table_its_name_late_gives_it_to_the_newest(
    any_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic, others, seen = files.write_atomic, ["b"], set[str]()

    def late(url: str, content: Any) -> int:
        if url.endswith("evals.parquet") and others:
            write(any_url, others.pop())
            written = write_atomic(url, content)
            # It is as it was before that one; readers are not told so.
            seen.update(RunDirectory(any_url).read_evals()["cell_id"].to_pylist())
            return written
        return write_atomic(url, content)

    monkeypatch.setattr(files, "write_atomic", late)
    write(any_url, "a")
    assert seen == {"a", "b"}
    assert {cell for cell, _ in there(any_url)} == {"a", "b"}


def test_who_is_killed_before_the_table_has_its_name_has_added_its_rows(
    any_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(any_url, "a")
    with monkeypatch.context() as patch:
        patch.setattr(versions, "_publish", lambda *_: None)
        write(any_url, "b")
    assert set(RunDirectory(any_url).read_evals()["cell_id"].to_pylist()) == {"a", "b"}
    write(any_url, "c")
    assert {cell for cell, _ in there(any_url)} == {"a", "b", "c"}


def test_a_table_is_changed_by_hand(tmp_path: Path) -> None:
    url, where = str(tmp_path), tmp_path / "evals.parquet"
    for cell in ("a", "b"):
        write(url, cell)
    kept = parquet_table(where.read_bytes())
    assert RunDirectory(url).read_evals().schema.metadata == {METRICS: b'{"e0.m": {}}'}
    for other in (kept.slice(1), kept.slice(1).replace_schema_metadata()):  # with and without the mark
        pq.write_table(other, where)
        assert there(url) == {("b", "e0")}
    where.unlink()
    assert RunDirectory(url).read_evals().equals(EVALS.empty_table())
    write(url, "c")
    assert there(url) == {("c", "e0")}
