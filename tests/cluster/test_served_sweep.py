"""A sweep over what an inference server writes, whose files are removed as soon as nobody needs them."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from saescale.cluster.crew.train_crew import TrainCrew
from saescale.cluster.sweep import turns
from saescale.cluster.sweep.driver import run_sweep
from saescale.cluster.sweep.extend import extend
from saescale.cluster.sweep.spec import SweepSpec, parse_spec
from saescale.scaling.laws.settings import FitSettings
from saescale.storage import live
from saescale.storage.errors import SaescaleError
from saescale.storage.lease import Standing
from saescale.storage.rundir import RunDirectory
from saescale.trainers.harvest import contexts
from saescale.trainers.harvest.room import Room
from tests.cluster.conftest import Recorder
from tests.survival import assert_same, reached
from tests.trainers.test_served import HELDOUT, D, paced, serve, spec_of, taken
from tests.trainers.test_served_removed import BATCH, BLOCKS, FILES, MORE, ROOM, TIMES
from tests.watched_disk import Watch

AWAY_S = 5.0  # until another worker is begun in place of one that was killed


@pytest.fixture
def over_served(document: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    served = spec_of(tmp_path / "both" / "served", tokens=MORE, block_rows=BLOCKS).model_dump(
        mode="json", exclude_defaults=True
    )
    document["store"] = {"live": served | {"folder": str(tmp_path / "both" / "live"), "remove_hidden_states": True}}
    document["grid"] = {"n_latents": [32], "k": [2, 4]}
    document["train"] |= {"tokens": MORE, "batch_tokens": BATCH}
    document["eval"] = {"tokens": HELDOUT, "every_tokens": 8_192, "evaluations": []}
    document["resources"]["checkpoint_every_s"] = 0.01
    return document


def with_little_room(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[SweepSpec, dict[str, Any]]:
    """The sweep with room for a part of the server's files, and what it reaches over all of them, kept."""
    monkeypatch.setattr(contexts, "BLOCK_CHARACTERS", 2**12)
    both, folder = tmp_path / "both", tmp_path / "both" / "served"
    both.mkdir()
    serve(folder, range(FILES), times=TIMES)
    kept = document["store"]["live"] | {"folder": str(tmp_path / "all"), "remove_hidden_states": False}
    whole = document | {"store": {"live": kept}, "out": str(tmp_path / "whole")}
    run_sweep(parse_spec(whole, "test"), Recorder(), settings=FitSettings(0))
    size = taken(folder)
    folder.rename(tmp_path / "first")
    (source,) = parse_spec(document, "test").lives.values()
    room = Room(source, source.harvest("x", reads_text=True), D)
    document["store"]["live"]["max_bytes"] = room.beside + 2 * room.block + int(ROOM * size)
    return parse_spec(document, "test"), reached(RunDirectory(whole["out"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
def test_one_worker_trains_packs_in_turns_where_what_is_kept_for_the_others_fills_the_room(
    three_nodes: Any, over_served: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of the server never sends more than there is room for, and the sweep ends."""
    over_served["train"]["stream_seed"] = [0, 1, 2]
    over_served["grid"]["k"] = [2]
    spec, expected = with_little_room(over_served, tmp_path, monkeypatch)
    spec = spec.model_copy(update={"resources": spec.resources.model_copy(update={"workers": 1})})
    both, (url,) = tmp_path / "both", spec.lives
    monkeypatch.setattr(turns, "GIVE_WAY_S", 1.0)
    watch, most, stop = Watch(str(both), monkeypatch), list[int](), threading.Event()
    serve(both / "served", range(3), times=TIMES)
    client = threading.Thread(target=paced, args=(both / "served", url, range(3, FILES), most, stop, 0.0, TIMES))
    client.start()
    try:
        outcome = run_sweep(spec, Recorder(), settings=FitSettings(0))
    finally:
        stop.set()
        client.join()
    attempts = [json.loads(path.read_text())["turn"] for path in Path(spec.out).glob("cells/*/result.json")]
    assert sum(attempts) >= 5  # two of the three at least made way for another one
    assert_same(reached(outcome.run), expected)
    assert max(most) <= ROOM * sum(path.stat().st_size for path in (tmp_path / "first").iterdir())
    assert watch.bytes <= spec.lives[url].max_bytes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
def test_a_worker_that_is_lost_finds_its_files_and_an_extension_is_told_that_they_are_gone(
    three_nodes: Any, over_served: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is away for longer than a consumer's lease, in which the other one goes on with new files."""
    spec, expected = with_little_room(over_served, tmp_path, monkeypatch)
    both, folder = tmp_path / "both", tmp_path / "both" / "served"
    (url,) = spec.lives
    monkeypatch.setattr(live, "GONE_S", 3.0)
    replace = TrainCrew.replace

    def late(self: TrainCrew, *arguments: Any) -> Any:
        time.sleep(AWAY_S)
        return replace(self, *arguments)

    monkeypatch.setattr(TrainCrew, "replace", late)
    watch, killed, most, stop = Watch(str(both), monkeypatch), list[str](), list[int](), threading.Event()

    def kill(standing: Standing) -> None:
        for cell in standing.running:
            if not killed and cell.step >= 6 and len(standing.running) == 2:
                killed.append(cell.cell_id)
                os.kill(int(cell.worker.split("/")[-1]), signal.SIGKILL)

    serve(folder, range(3), times=TIMES)
    client = threading.Thread(target=paced, args=(folder, url, range(3, FILES), most, stop, 0.2, TIMES))
    client.start()
    try:
        outcome = run_sweep(spec, Recorder(kill), settings=FitSettings(0))
    finally:
        stop.set()
        client.join()
    assert killed
    assert_same(reached(outcome.run), expected)
    assert watch.bytes <= spec.lives[url].max_bytes

    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"grid": {"n_latents": [48], "k": [2]}}))
    before = Path(outcome.run.url, "sweep.yaml").read_bytes()
    said = r"live: 1 of 1 cells .* need hidden states that were removed after use .*cmpl-0000\.safetensors"
    with pytest.raises(SaescaleError, match=said):
        run_sweep(extend(spec, str(more)).spec, Recorder(), settings=FitSettings(0), extending=True)
    assert Path(outcome.run.url, "sweep.yaml").read_bytes() == before
