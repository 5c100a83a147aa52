"""A table that several processes add to at one time, such as evals.parquet: nobody's rows get lost, whoever is killed.

    table = read("runs/a/evals.parquet", EVALS, remedy)
    change("runs/a/evals.parquet", EVALS, remedy, lambda there: pa.concat_tables([there, new]))

A change makes the table's next version, NAME/NNNNN.parquet, which of several that try one can (`files.create`); the
others begin again with what that one wrote. Then the newest version gets the table's own name. The newest one stays
beside it, since a process that was halted may yet write the table as it was; older ones go. What says in its metadata
that it is older than the newest version does not count, and whatever else has the table's name does: so a table may be
removed or replaced by hand while nobody changes it.
"""

import json
import re
import uuid
from collections.abc import Callable
from typing import NamedTuple

import pyarrow as pa

from saescale.storage import files
from saescale.storage.documents import read_table, table_bytes

_VERSION = b"saescale.version"  # a key of the metadata of the table's schema
_FILE = re.compile(r"(\d+)\.parquet")


class _Version(NamedTuple):
    number: int
    table: pa.Table | None  # with its metadata; None: there is none


def read(where: str, schema: pa.Schema, remedy: str) -> pa.Table | None:
    """The newest version of the table `where`; None where it is missing. Raises Damaged, whose advice is `remedy`."""
    table = _newest(where, schema, remedy).table
    return None if table is None else _bare(table)


def change(where: str, schema: pa.Schema, remedy: str, changed: Callable[[pa.Table], pa.Table]) -> None:
    """Puts what `changed` makes of the table in its place; it may be called again. Raises what `read` raises, and
    SaescaleError where nothing can be written."""
    while True:
        number, there = _newest(where, schema, remedy)
        if there is None:  # from now on one that is missing was removed by somebody
            files.create(where, _content(schema.empty_table(), number))
            continue
        content = _content(changed(_bare(there)), number + 1)
        # A version before the newest one was removed, and may be made again by who has seen neither.
        if files.create(_file(where, number + 1), content) and _last(where) == number + 1:
            break
    _publish(where, number + 1, content)


def _publish(where: str, number: int, content: bytes) -> None:
    """Gives a version the table's name, and then the newest one where others were made meanwhile: of all that do so,
    whoever is last has seen the newest."""
    while True:
        files.write_atomic(where, content)
        if (last := _last(where)) == number:
            break
        try:
            content, number = files.read_bytes(_file(where, last)), last
        except FileNotFoundError:  # a newer one has come
            continue
    for name in files.list_names(_folder(where)):
        if (match := _FILE.fullmatch(name)) and int(match[1]) < number:
            files.remove(files.join(_folder(where), name))


def _newest(where: str, schema: pa.Schema, remedy: str) -> _Version:
    while True:
        last = _last(where)
        try:
            table = read_table(where, schema, remedy)
        except FileNotFoundError:
            return _Version(last, None)
        if (number := _number(table, last)) >= last:
            return _Version(number, table)
        try:
            return _Version(last, read_table(_file(where, last), schema, f"remove {_folder(where)}"))
        except FileNotFoundError:  # a newer one has come
            continue


def _content(table: pa.Table, number: int) -> bytes:
    """Like no other's: whoever made a version knows it again."""
    mine = {_VERSION: json.dumps({"number": number, "by": uuid.uuid4().hex}).encode()}
    return table_bytes(table.replace_schema_metadata((table.schema.metadata or {}) | mine))


def _number(table: pa.Table, otherwise: int) -> int:
    """Which version it is; `otherwise` where something else than this file wrote it."""
    said = (table.schema.metadata or {}).get(_VERSION)
    return otherwise if said is None else int(json.loads(said)["number"])


def _bare(table: pa.Table) -> pa.Table:
    """Without the mark of its version."""
    kept = {name: value for name, value in (table.schema.metadata or {}).items() if name != _VERSION}
    return table.replace_schema_metadata(kept or None)


def _last(where: str) -> int:
    """The number of the newest version; 0 where there is none."""
    found = (_FILE.fullmatch(name) for name in files.list_names(_folder(where)))
    return max((int(match[1]) for match in found if match), default=0)


def _folder(where: str) -> str:
    return where.removesuffix(".parquet")


def _file(where: str, number: int) -> str:
    return files.join(_folder(where), f"{number:05d}.parquet")
