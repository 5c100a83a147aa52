"""Documents as they are read back: JSON, YAML and tables, each checked before anything is built from it.

Three things that a reader can meet are three errors: a file that is missing (FileNotFoundError, as in files.py, since
absence is often an answer), one that is `Damaged`, and one that a `Newer` version wrote. Each says what to do.
"""

import io
import itertools
import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import yaml
from pydantic import BaseModel, ValidationError

from saescale.storage import files
from saescale.storage.columns import conform
from saescale.storage.errors import Damaged, Newer, SaescaleError, one_line
from saescale.storage.secrets import hide_secrets

M = TypeVar("M", bound=BaseModel)
CHECKSUM = "checksum"  # the key of a document's own, over all its other keys
# libyaml is ten times as fast: a grid may be a list of thousands of cells.
YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_DEEPEST = 100  # no document is nested so deep; far below what ends the process that reads it
_MERGE, _NULL = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_OCTAL, _THOUSANDS = re.compile(r"[-+]?0[0-7_]+"), re.compile(r"\d{3}")
_MOST_VALUES = 2_000_000  # of a YAML document whose aliases are written out


def damaged(where: str, reason: str, remedy: str) -> Damaged:
    """The error of a file that is there and does not hold what it should."""
    return Damaged(f"{where} is damaged ({reason}); {remedy}", where)


# --- JSON


def read_json(where: str, remedy: str, newest: int | None = None) -> dict[str, Any]:
    """The JSON object in the file `where`, its own checksum, where it has one, checked and taken out.

    `newest`: the highest `format` that this version reads. Raises FileNotFoundError, Newer, and Damaged with `remedy`.
    """
    content = files.read_bytes(where)
    try:
        found = json.loads(content, object_pairs_hook=without_repeated)
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
        if newest is not None:
            _require_format(where, found.get("format"), newest)
        if (expected := found.pop(CHECKSUM, None)) is not None and expected != checksum(found):
            raise ValueError("its checksum is another: it was changed after it was written")
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not content.strip() else one_line(error)
        raise damaged(where, reason, remedy) from error
    return found


def read_model(where: str, model: type[M], remedy: str, newest: int | None = None) -> M:
    """The same as an instance of `model`."""
    found = read_json(where, remedy, newest)
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise damaged(where, problem_of(error), remedy) from error


def problem_of(error: ValidationError) -> str:
    """The first thing that is wrong, with its place."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return (f"{place}: " if place else "") + first["msg"].removeprefix("Value error, ")


def json_bytes(obj: Mapping[str, Any]) -> bytes:
    """A document of JSON types, numpy scalars, arrays and tuples as `read_json` takes it, with its checksum."""
    document = plain(obj)
    return (json.dumps(document | {CHECKSUM: checksum(document)}, indent=1, allow_nan=False) + "\n").encode()


def plain(obj: Any) -> Any:
    """`obj` in JSON types, without secrets of addresses; NaN and Inf, which JSON does not have, become null."""
    if isinstance(obj, dict):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [plain(value) for value in obj]
    if isinstance(obj, np.ndarray | np.generic):
        return plain(obj.tolist())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return hide_secrets(obj) if isinstance(obj, str) else obj


def checksum(document: Mapping[str, Any]) -> str:
    """xxh3-64 (hex) of a document of JSON types, whatever the order of its keys."""
    return xxhash.xxh3_64_hexdigest(json.dumps(document, sort_keys=True).encode())


def _require_format(where: str, found: Any, newest: int) -> None:
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError("it has no format" if found is None else "its format is no number")
    if found > newest:
        raise Newer(f"{where} has format {found}, this saescale reads up to {newest}; upgrade saescale")


def without_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`. Raises ValueError for a key that stands twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return made


# --- YAML


def read_yaml(where: str, remedy: str | None = None) -> Any:
    """The YAML document in the file `where`. Keys that stand twice are refused with both lines.

    `remedy`: what to do where it is damaged; None: a user wrote it, who is told what is wrong in it. Raises
    FileNotFoundError and SaescaleError.
    """
    return parse_yaml(files.read_bytes(where), where, remedy)


def parse_yaml(content: bytes, where: str, remedy: str | None = None) -> Any:
    """The same of what is read already."""
    try:
        return _parsed(content)
    except Exception as error:  # PyYAML's constructors raise whatever an odd value brings them to
        told = isinstance(error, yaml.YAMLError | ValueError)
        reason = yaml_reason(error) if told else f"it has a value that is not of its kind ({one_line(error)})"
        if remedy is not None:
            raise damaged(where, reason, remedy) from error
        raise SaescaleError(f"{where} is not valid YAML: {reason}; correct it") from error


def yaml_text(document: Any) -> str:
    """The document as text, its keys in their order."""
    return str(yaml.dump(document, Dumper=_DUMPER, sort_keys=False, allow_unicode=True))


def _parsed(content: bytes) -> Any:
    _require_flat(content)
    loader = YAML_LOADER(content)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}, 0) > _MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def yaml_reason(error: Exception) -> str:
    """What is wrong in a document, and where, in the words of the parser."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    parts = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    if mark is not None and parts:
        return " ".join(f"{', '.join(parts)} (line {mark.line + 1}, column {mark.column + 1})".split())
    if isinstance(error, yaml.reader.ReaderError):
        return f"{error.reason} (position {error.position})"
    return one_line(error)


def _require_flat(content: bytes) -> None:
    """libyaml composes a document on the C stack, where too deep a one ends the process."""
    depth = 0
    for bracket in re.finditer(rb"[\[\]{}]", content):
        depth = depth + 1 if bracket[0] in b"[{" else max(0, depth - 1)
        if depth > _DEEPEST:
            break
    if depth > _DEEPEST or re.search(rb"(?:[-?:][ \t]+){%d}" % _DEEPEST, content):
        raise ValueError(f"it is nested more than {_DEEPEST} deep")


def _values(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for with its aliases written out. Raises ValueError for a fault of the document."""
    if isinstance(node, yaml.ScalarNode):
        _require_decimal(node)
        return 1
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    if (found := known.get(id(node))) is not None:
        if not found:
            raise ValueError(f"the anchor of line {node.start_mark.line + 1} holds itself")
        return found
    known[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        _require_once(node)
        _require_no_comma(node)
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value
    known[id(node)] = 1 + sum(_values(part, known, depth + 1) for part in parts)
    return known[id(node)]


def _require_once(node: yaml.MappingNode) -> None:
    places: dict[tuple[str, str], yaml.Mark] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        place, name = key.start_mark, (key.tag, key.value)
        if (first := places.get(name)) is not None:
            where = f"in line {first.line + 1} and again in line {place.line + 1}"
            if first.line == place.line:
                where = f"in line {place.line + 1}, column {first.column + 1}, and again in column {place.column + 1}"
            advice = "write one: <<: [*a, *b]" if key.tag == _MERGE else "keep one"
            raise ValueError(f"the key {key.value} stands {where}: {advice}")
        places[name] = place


def _require_decimal(node: yaml.ScalarNode) -> None:
    """YAML 1.1 reads 0100 as 64 and 1:30 as 90, and people mean neither."""
    if not node.style and node.tag in _NUMBERS and (":" in node.value or _OCTAL.fullmatch(node.value)):
        what = "colon" if ":" in node.value else "leading 0"
        raise ValueError(
            f"{node.value} in line {node.start_mark.line + 1} is another number in YAML: write it without a {what}, "
            "in quotes if it is text, and a number of thousands without a comma"
        )


def _require_no_comma(node: yaml.MappingNode) -> None:
    """{tokens: 4,096} has the keys tokens and 096 in YAML."""
    for (_, before), (key, value) in itertools.pairwise(node.value):
        number = isinstance(before, yaml.ScalarNode) and not before.style and before.tag in _NUMBERS
        if number and _THOUSANDS.fullmatch(str(key.value)) and value.tag == _NULL and not value.value:
            raise ValueError(
                f"{before.value},{key.value} in line {key.start_mark.line + 1} has a comma, which ends the number: "
                f"write {before.value}{key.value}"
            )


# --- tables


def read_table(where: str, schema: pa.Schema, remedy: str) -> pa.Table:
    """The Parquet table in the file `where` with the columns of `schema`. Raises FileNotFoundError and Damaged."""
    content = files.read_bytes(where)
    try:
        return conform(parquet_table(content), schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(where, one_line(error) if content else "it is empty", remedy) from error


def parquet_table(content: bytes) -> pa.Table:
    """The table of a Parquet file, its pages held to their checksums where they bear some. Raises what Arrow does."""
    # In this thread alone: one of Arrow's own that still works when the interpreter ends aborts the process
    # (arrow issue 34314), and `read_table` starts some whatever it is told.
    parquet = pq.ParquetFile(pa.BufferReader(content), pre_buffer=False, page_checksum_verification=True)
    return parquet.read(use_threads=False)


def table_bytes(table: pa.Table) -> bytes:
    """The table as Parquet whose pages bear checksums, so that an altered byte is noticed."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()
