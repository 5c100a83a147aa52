"""A summary that did not reach W&B is logged again by the next run of the sweep; one that did is not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from saescale.cluster.sweep import driver
from saescale.storage.rundir import RunDirectory
from saescale.trainers.loggers import wandb_client
from saescale.trainers.loggers.wandb_cells import WandbSettings
from tests.cluster.conftest import Recorder
from tests.trainers.wandb_case import FITS, RESULTS, bare_machine, messages, server
from tests.trainers.wandb_server import WandbServer

__all__ = ["bare_machine", "server"]  # fixtures

SUMMARY = wandb_client.run_id("summary", "sweep")
ONLINE = WandbSettings(entity="me", mode="online")


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A sweep that is trained and analysed; only W&B is still to be done."""
    run = RunDirectory(str(tmp_path / "run"))
    run.write_json("fits.json", {**FITS, "made_from": {"results": "abc"}})
    monkeypatch.setattr(driver, "is_current", lambda *_, **__: True)
    monkeypatch.setattr(driver, "provenance_of", lambda *_: {"subject": "toy"})
    monkeypatch.setattr(run.__class__, "read_results", lambda _: RESULTS)
    return SimpleNamespace(run=run, document={}, settle=lambda: None)


def analyse(ledger: Any, settings: WandbSettings = ONLINE) -> tuple[str, list[str]]:
    """(how to read what was logged, the stages that were shown)."""
    display = Recorder()
    spec: Any = SimpleNamespace(wandb=settings, name="sweep")
    _, read = driver._analyse(spec, ledger, display, 0)
    assert read is not None
    return read, display.stages


def summarised(server: WandbServer) -> bool:
    return any(name == f"{SUMMARY}/wandb-summary.json" for name in server.files)


def test_after_a_server_that_refused(server: WandbServer, ledger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.refuse = lambda path: True
    found: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(wandb_client, "INIT_TIMEOUT", 3.0)
        assert len(messages(lambda: found.append(analyse(ledger)))) == 1
    assert found[0][0].endswith("the summary was not sent whole, run the sweep again to send it")
    assert json.loads((Path(ledger.run.url) / "wandb.json").read_text())["whole"] is False
    assert not summarised(server)

    server.refuse = lambda path: False
    wandb.teardown()  # the sweep is run again by another process
    read, stages = analyse(ledger)
    assert stages == ["logging the summary to W&B"]
    assert "/me/saescale/groups/sweep" in read
    assert "not sent whole" not in read
    assert summarised(server)
    assert analyse(ledger) == (read, [])


def test_after_a_server_that_was_out_of_reach(
    server: WandbServer, ledger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(wandb_client, "reachable", lambda *_: "offline")
        assert "wandb sync" in analyse(ledger)[0]
    assert not summarised(server)
    assert "/me/saescale/groups/sweep" in analyse(ledger)[0]
    assert summarised(server)


def test_offline_by_choice_is_logged_once(ledger: Any) -> None:
    offline = WandbSettings(mode="offline")
    read, stages = analyse(ledger, offline)
    assert stages == ["logging the summary to W&B"]
    assert "wandb sync" in read
    assert analyse(ledger, offline) == (read, [])
