"""Hidden states of a server: files come while blocks are made of them; blocks are a pure function of the files."""

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from saescale.storage.errors import SaescaleError
from saescale.storage.live import LiveSource, open_source, read_making
from saescale.storage.source import Order
from saescale.trainers.harvest import contexts
from saescale.trainers.harvest.live import LiveHarvest, live_here
from saescale.trainers.harvest.live_spec import LiveSpec
from saescale.trainers.harvest.room import Room
from saescale.trainers.harvest.served import Served, ServedCrew

D, LAYERS, TOKENS, HELDOUT, BLOCK = 16, 3, 1_024, 64, 256


@pytest.fixture(autouse=True)
def small_blocks_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "BLOCK_CHARACTERS", 2**12)


def spec_of(folder: Path, **fields: Any) -> LiveSpec:
    given = {
        "subject": "hf:org/served", "layer": 4, "hidden_states": str(folder), "hidden_states_index": 1,
        "tokens": TOKENS, "heldout_tokens": HELDOUT, "block_rows": BLOCK, "row_group_rows": 128,
        "window_blocks": 2, "max_bytes": 10**8,
    }  # fmt: skip
    return LiveSpec.model_validate(given | fields)


def request(number: int, width: int = D, times: int = 1) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(number)
    tokens = times * (20 + number % 7)
    return {
        "token_ids": torch.randint(0, 1_000, (tokens,), generator=chance),
        "hidden_states": torch.randn(tokens, LAYERS, width, generator=chance).bfloat16(),
    }


def serve(folder: Path, numbers: range, pause_s: float = 0.0, times: int = 1) -> None:
    """As vLLM's connector does, but in two parts: a file is seen before it is whole."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        save_file(request(number, times=times), folder.parent / "whole")
        content = (folder.parent / "whole").read_bytes()
        with (folder / f"cmpl-{number:04d}.safetensors").open("wb") as file:
            file.write(content[:200])
            file.flush()
            time.sleep(pause_s)
            file.write(content[200:])


def streamed(url: str) -> tuple[LiveSource, np.ndarray]:
    source = open_source(url)
    assert isinstance(source, LiveSource)
    with source.batches(Order("train", 1, 128), stop=TOKENS // 128) as stream:
        return source, np.concatenate([batch.x for batch in stream])


def test_rows_of_a_server_that_goes_on_writing(tmp_path: Path) -> None:
    folder, spec = tmp_path / "served", spec_of(tmp_path / "served")
    serve(folder, range(5))
    writer = threading.Thread(target=serve, args=(folder, range(5, 90), 0.01))
    writer.start()
    with live_here(spec, str(tmp_path / "live")):
        source, rows = streamed(str(tmp_path / "live"))
    writer.join()
    held = source.heldout(columns=("act", "token", "pos", "doc"))
    # Each row leads back to its file; what is trained on is of other files than what is held out.
    names = sorted((tmp_path / "served").iterdir())
    by_row = {}
    for name in names:
        number = int(name.stem[-4:])
        states = request(number)["hidden_states"][:, 1].to(torch.float16).numpy()
        by_row |= {row.tobytes(): (number, pos) for pos, row in enumerate(states)}
    trained, heldout = ([by_row[row.tobytes()] for row in act] for act in (rows, held.act))
    assert len(set(trained)) == TOKENS
    assert not {number for number, _ in trained} & {number for number, _ in heldout}
    assert all(pos > 0 for _, pos in trained + heldout)
    assert [pos for _, pos in heldout] == held.pos.tolist()
    tokens = {number: request(number)["token_ids"].tolist() for number, _ in heldout}
    assert [tokens[number][pos] for number, pos in heldout] == held.token.tolist()
    assert source.site.layer == 4

    # Once more from the same files, in the order that was noted: the same bits, though all are there at once.
    for block in Path(source.url).glob("train-*"):
        block.unlink()
    with live_here(spec, source.url):
        again = streamed(source.url)[1]
    assert np.array_equal(again.view(np.uint16), rows.view(np.uint16))


def paced(
    folder: Path,
    url: str,
    numbers: range,
    most: list[int],
    stop: threading.Event,
    pause_s: float = 0.0,
    times: int = 1,
) -> None:
    """A client of the server that looks whether there is room before it sends a request, and gives up after a while;
    `most` gets what all files took after each."""
    for number in numbers:
        until = time.monotonic() + 120
        while time.monotonic() < until and not stop.is_set():
            making = read_making(url)
            if making and making.server_max_bytes and taken(folder) + 4_096 * times <= making.server_max_bytes:
                break
            time.sleep(0.02)
        serve(folder, range(number, number + 1), 0.0 if stop.is_set() else pause_s, times)
        most.append(taken(folder))


def taken(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # it has just been removed
            total += path.stat().st_size
    return total


def test_files_that_all_have_passed_are_removed_and_max_bytes_holds_with_those_that_wait(
    tmp_path: Path,
) -> None:
    """The producer is ended in between, and begins again where its next block does."""
    serve(tmp_path / "kept", range(90))
    allowed = taken(tmp_path / "kept") // 2
    with live_here(spec_of(tmp_path / "kept"), str(tmp_path / "all")):
        _, expected = streamed(str(tmp_path / "all"))
    both = tmp_path / "both"
    folder, url = both / "served", str(both / "live")
    spec = spec_of(folder, remove_hidden_states=True)
    room = Room(spec, spec.harvest("x", reads_text=True), D)
    spec = spec.model_copy(update={"max_bytes": room.beside + 2 * room.block + allowed})
    both.mkdir()
    stop = threading.Event()
    most: list[int] = []
    serve(folder, range(3))
    client = threading.Thread(target=paced, args=(folder, url, range(3, 90), most, stop))
    client.start()
    found: list[np.ndarray] = []
    try:
        with live_here(spec, url):
            stream = open_source(url).batches(Order("train", 1, 128), stop=TOKENS // 128)
            for batch in range(5):
                found.append(next(stream).x.copy())
                stream.passed(batch + 1)
        with stream, live_here(spec, url) as live:
            for batch in range(5, TOKENS // 128):
                found.append(next(stream).x.copy())
                stream.passed(batch + 1)
            live.clear()
    finally:
        stop.set()
        client.join()
    assert np.array_equal(np.concatenate(found), expected)
    assert max(most) <= allowed
    assert not any(path.name < "cmpl-0040" for path in folder.iterdir())


def test_a_server_that_takes_all_the_room_is_named(tmp_path: Path) -> None:
    folder, url = tmp_path / "served", str(tmp_path / "live")
    spec = spec_of(folder)
    room = Room(spec, spec.harvest("x", reads_text=True), D)
    serve(folder, range(30))
    rows = (TOKENS + HELDOUT) * LAYERS * D * 2  # of as many as are needed; the server gives more
    tight = spec.model_copy(update={"max_bytes": room.beside + 2 * room.block + rows})
    with live_here(tight, url):
        stream = open_source(url).batches(Order("train", 1, 128))
        serve(folder, range(30, 60))
        with stream, pytest.raises(SaescaleError, match=r"the server's files take [\d,]+ bytes, .* nothing is lost"):
            for _ in stream:
                pass
    with live_here(spec, url):  # with more room it goes on
        serve(folder, range(60, 90))
        assert len(streamed(url)[1]) == TOKENS


def test_the_tokens_of_blocks_that_are_there_need_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a consumer that keeps all of its blocks, since all have room."""
    monkeypatch.setattr(contexts, "BLOCK_CHARACTERS", 2**5)
    folder, url, tokens = tmp_path / "served", str(tmp_path / "live"), 8 * TOKENS
    spec = spec_of(folder, tokens=tokens)
    assert Room(spec, spec.harvest("x", reads_text=True), D).tokens < 4 * tokens
    serve(folder, range(40), times=12)
    with live_here(spec, url), open_source(url).batches(Order("train", 1, 128), stop=tokens // 128) as stream:
        assert len({row.tobytes() for batch in stream for row in batch.x}) == tokens


@pytest.mark.parametrize("removed", [False, True])
def test_files_that_will_never_have_room_are_told_before_anything_begins(removed: bool, tmp_path: Path) -> None:
    """Of what is kept all rows; of what goes those on which cells measure their centre, where there are cells."""
    folder, url = tmp_path / "served", str(tmp_path / "live")
    spec = spec_of(folder, remove_hidden_states=removed)
    room = Room(spec, spec.harvest("x", reads_text=True), D)
    serve(folder, range(30))
    least = room.beside + 2 * room.block + (TOKENS + HELDOUT) * LAYERS * D * 2

    def begun(max_bytes: int) -> LiveHarvest:
        served, spool = Served(str(folder), url, removes=removed), f"{url}/.tokens-x"
        few = spec.model_copy(update={"max_bytes": max_bytes})
        return LiveHarvest(few, url, ServedCrew(served, 1, spool), spool, served=served, awaited=lambda: None)

    with pytest.raises(SaescaleError, match=rf"1,088 rows .* take 104,448 bytes .* give max_bytes at least {least:,}$"):
        begun(least - 1).__enter__()
    assert not Path(url).exists()
    with begun(least):
        pass


def test_files_are_not_removed_where_they_are_needed_twice(tmp_path: Path) -> None:
    serve(tmp_path / "served", range(30))
    with live_here(spec_of(tmp_path / "served", remove_hidden_states=True), str(tmp_path / "live")):
        stream = open_source(str(tmp_path / "live")).batches(Order("train", 1, 128), stop=2 * TOKENS // 128)
        with stream, pytest.raises(SaescaleError, match="removes files after one pass, and a cell trains on more"):
            for _ in stream:
                pass
    assert len(list((tmp_path / "served").iterdir())) == 30


def test_a_file_of_another_width_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    serve(folder, range(30))
    save_file(request(30, width=D + 1), folder / "cmpl-0030.safetensors")
    with live_here(spec_of(folder), str(tmp_path / "live")):
        told = r"cmpl-0030.safetensors holds .* width 17 .* and the first file of its folder .* width 16"
        with pytest.raises(SaescaleError, match=told):
            streamed(str(tmp_path / "live"))


def test_a_folder_of_another_width_is_named_when_a_producer_begins_again(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    serve(folder, range(30))
    with live_here(spec_of(folder), str(tmp_path / "live")):
        pass
    for path in folder.iterdir():
        path.unlink()
    save_file(request(30, width=D + 1), folder / "cmpl-0030.safetensors")
    said = rf"live holds a live source of width {D}, and \S+served has rows of width {D + 1}: of another model"
    with pytest.raises(SaescaleError, match=said):
        live_here(spec_of(folder), str(tmp_path / "live")).__enter__()


def test_what_sweep_yaml_says_is_read_again(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    assert LiveSpec.model_validate(spec.model_dump(mode="json")) == spec
    # Of a run that was begun when one actor was what nobody had to ask for: the same rows, in the same folder.
    fields = spec.model_dump(mode="json", exclude={"device_map", "remove_hidden_states"}) | {"actors": 1}
    assert LiveSpec.model_validate(fields).folder_of("run") == spec.folder_of("run")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"corpus": "x.jsonl"}, "corpus says nothing to hidden states"),
        ({"hidden_states": None}, "hidden_states_index is of hidden_states"),
        ({"hidden_states": None, "hidden_states_index": 0, "remove_hidden_states": True}, "remove_hidden_states is of"),
        ({"device_map": "auto"}, "device_map says nothing to hidden states"),
        ({"actors": 2}, "actors says nothing to hidden states"),
        ({"max_bytes": "1 furlong"}, "should be a size such as 200 GB"),
        ({"max_bytes": "1.5.2 GB"}, "should be a size such as 200 GB"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        spec_of(tmp_path, **fields)


def test_files_of_something_else_and_layers_that_are_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    serve(folder, range(2))
    with pytest.raises(SaescaleError, match="hidden_states_index = 3, and the files have layers 0 to 2"):
        live_here(spec_of(folder, hidden_states_index=3), str(tmp_path / "live")).__enter__()
    save_file({"weight": torch.zeros(2)}, folder / "a.safetensors")
    with pytest.raises(SaescaleError, match=r"a\.safetensors holds weight, and no token_ids"):
        live_here(spec_of(folder), str(tmp_path / "live")).__enter__()
    assert not (tmp_path / "live").exists()


@pytest.mark.parametrize(
    "header",
    [b"[1]", b"{", b'"x"', b'{"a": []}', b'{"a": {"data_offsets": [0]}}', b"[" * 4_000],
    ids=["list", "cut", "text", "no entry", "one offset", "deep"],
)
def test_what_is_no_file_of_a_server_is_waited_for_as_one_that_is_not_whole(tmp_path: Path, header: bytes) -> None:
    folder = tmp_path / "states"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "b.safetensors").write_bytes(b"short")
    assert next(Served(str(folder), str(tmp_path / "live")).each()) is None
