"""A sweep over what an inference server writes, whose files are removed as soon as nobody needs them."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from saescale.cluster.crew.train_crew import TrainCrew
from saescale.cluster.sweep.driver import run_sweep
from saescale.cluster.sweep.extend import extend
from saescale.cluster.sweep.spec import parse_spec
from saescale.scaling.laws.settings import FitSettings
from saescale.storage import live
from saescale.storage.errors import SaescaleError
from saescale.storage.lease import Standing
from saescale.storage.rundir import RunDirectory
from saescale.trainers.harvest import contexts
from saescale.trainers.harvest.room import Room
from tests.cluster.conftest import Recorder
from tests.survival import assert_same, reached
from tests.trainers.live_case import Watch
from tests.trainers.test_served import HELDOUT, D, paced, serve, spec_of, taken
from tests.trainers.test_served_removed import BATCH, BLOCKS, FILES, MORE, ROOM, TIMES

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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::saescale.storage.errors.SaescaleWarning")
def test_a_worker_that_is_lost_finds_its_files_and_an_extension_is_told_that_they_are_gone(
    three_nodes: Any, over_served: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is away for longer than a consumer's lease, in which the other one goes on with new files."""
    monkeypatch.setattr(contexts, "BLOCK_CHARACTERS", 2**12)
    both, folder = tmp_path / "both", tmp_path / "both" / "served"
    both.mkdir()
    serve(folder, range(FILES), times=TIMES)
    kept = over_served["store"]["live"] | {"folder": str(tmp_path / "all"), "remove_hidden_states": False}
    whole = over_served | {"store": {"live": kept}, "out": str(tmp_path / "whole")}
    run_sweep(parse_spec(whole, "test"), Recorder(), settings=FitSettings(0))
    size = taken(folder)
    folder.rename(tmp_path / "first")

    spec = parse_spec(over_served, "test")
    ((url, source),) = spec.lives.items()
    room = Room(source, source.harvest("x", reads_text=True), D)
    over_served["store"]["live"]["max_bytes"] = room.beside + 2 * room.block + int(ROOM * size)
    spec = parse_spec(over_served, "test")
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
    assert_same(reached(outcome.run), reached(RunDirectory(whole["out"])))
    assert watch.bytes <= spec.lives[url].max_bytes

    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"grid": {"n_latents": [48], "k": [2]}}))
    before = Path(outcome.run.url, "sweep.yaml").read_bytes()
    said = r"live: 1 of 1 cells .* need hidden states that were removed after use .*cmpl-0000\.safetensors"
    with pytest.raises(SaescaleError, match=said):
        run_sweep(extend(spec, str(more)).spec, Recorder(), settings=FitSettings(0), extending=True)
    assert Path(outcome.run.url, "sweep.yaml").read_bytes() == before
