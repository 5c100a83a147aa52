"""The door of sources: the activation store and the README's source in memory keep the same promises."""

import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saescale.storage.errors import SaescaleError
from saescale.storage.registry import load_file
from saescale.storage.source import Batches, Order, Source
from saescale.storage.store import ActivationStore

README = Path(__file__).parents[2] / "storage" / "README.md"
MakeSource = Callable[[int], Source]


@pytest.fixture(params=["store", "memory"])
def make_source(
    request: pytest.FixtureRequest, build_store: Callable[..., ActivationStore], tmp_path: Path
) -> MakeSource:
    """A source of so many train rows and 16 held-out ones; sources of different sizes are different sources."""

    def store(rows: int) -> Source:
        return build_store(f"memory://{uuid.uuid4().hex}", train=(rows,))

    if request.param == "store":
        return store
    (block,) = re.findall(r"```python\n(# memory_source\.py\n.*?)```", README.read_text(), flags=re.DOTALL)
    path = tmp_path / "memory_source.py"
    path.write_text(block)
    module: Any = load_file(path, "source")

    def memory(rows: int) -> Source:
        same = build_store(f"memory://{uuid.uuid4().hex}", train=(rows,))
        source: Source = module.MemorySource(f"toy of {rows}", same.read_split("train"), same.read_split("heldout"))
        return source

    return memory


def taken(batches: Batches, count: int) -> list[list[list[float]]]:
    return [next(batches).x.tolist() for _ in range(count)]


def test_a_source_says_what_it_is(make_source: MakeSource) -> None:
    source = make_source(40)
    assert source.identity
    assert (source.d_model, source.dtype) == (4, "float16")
    assert source.subject
    assert source.site.hook == "resid_post"


def test_batches_are_a_pure_function_of_the_order(make_source: MakeSource) -> None:
    source, order = make_source(40), Order("train", 3, 12)
    with source.batches(order, stop=10) as stream:
        whole = [batch.x.tolist() for batch in stream]
    assert len(whole) == 10
    rows = sorted(row for batch in whole for row in batch)
    # Three epochs of 40 rows: each row three times.
    assert rows[::3] == rows[1::3] == rows[2::3]
    with source.batches(order, start=4) as stream:
        assert taken(stream, 3) == whole[4:7]
    with source.batches(order._replace(seed=4)) as stream:
        assert taken(stream, 1) != whole[:1]
    slices = []
    for rank in range(3):
        with source.batches(order, stop=10, rank=rank, ranks=3) as stream:
            slices.append([batch.x.tolist() for batch in stream])
    assert [[row for part in parts for row in part] for parts in zip(*slices, strict=True)] == whole


def test_resuming(make_source: MakeSource) -> None:
    source, order = make_source(40), Order("train", 0, 12)
    with source.batches(order, stop=9) as stream:
        whole = taken(stream, 9)
    with source.batches(order) as stream:
        taken(stream, 5)
        state = stream.state()
    for ranks in (1, 2):
        parts = []
        for rank in range(ranks):
            with source.resume(state, stop=9, rank=rank, ranks=ranks) as stream:
                parts.append([batch.x.tolist() for batch in stream])
        assert [[row for part in at for row in part] for at in zip(*parts, strict=True)] == whole[5:]
    with pytest.raises(SaescaleError, match="another"):
        make_source(41).resume(state)


def test_heldout_rows_and_where_they_are_from(make_source: MakeSource) -> None:
    source = make_source(40)
    rows = source.heldout(11)
    assert rows.act.shape == (11, 4)
    assert rows.act.dtype == np.float16
    assert [len(column) for column in rows[1:]] == [0, 0, 0]
    everything = source.heldout(columns=("act", "token", "pos", "doc"))
    assert everything.act[:11].tolist() == rows.act.tolist()
    assert everything.token.tolist() == everything.pos.tolist() == everything.doc.tolist() == list(range(16))
    assert (everything.token.dtype, everything.pos.dtype) == (np.int32, np.int16)
    only = source.heldout(9, ("doc",))
    assert (len(only.act), len(only.token), only.doc.tolist()) == (0, 0, list(range(9)))
    with pytest.raises(SaescaleError, match="16"):
        source.heldout(17)
