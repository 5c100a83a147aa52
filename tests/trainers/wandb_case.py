"""What tests of W&B share: cells and rows to log, fits to show, a machine without accounts, a server that records."""

import os
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import wandb
from wandb.sdk.lib import wbauth

from saescale.storage.columns import CurveRow
from saescale.trainers.cell import Cell
from saescale.trainers.loggers.wandb_cells import WandbLogger, WandbSettings
from tests.trainers.wandb_server import WandbServer, wandb_server

KEY = "0123456789abcdef" * 2 + "01234567"
OFFLINE = WandbSettings(mode="offline")
CONTEXT = {"subject": "toy", "site": "resid_post.3", "store": "s3://me:hush@bucket/store"}
DONE = {"status": "done", "error": None, "nmse": 0.25, "l0": 4.0, "dead_fraction": 0.5, "dead_fraction_long": 0.125}


FITS = {
    "format": 1,
    "source": "runs/x",
    "fits": [
        {
            "law": "n_k",
            "formula": "L = ...",
            "coefficients": {
                "alpha": {"value": -0.5, "low": -0.6, "high": -0.4},
                "zeta": {"value": 1.0, "low": None, "high": None},
            },
            "exponent_of_n_at_k": {"32": {"value": 0.1, "low": 0.05, "high": 0.2}},
            "points": 20,
            "rms_log_residual": 0.01,
        },
        {"law": "c", "formula": "L = a C^b", "coefficients": {"b": {"value": -0.1, "low": -0.2, "high": 0.0}}},
    ],
}
RESULTS = pa.table({"cell_id": ["a", "b"], "n_latents": [16, 32], "nmse": [0.5, float("nan")], "error": [None, "bad"]})


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, no settings and no memory of other tests."""
    wandb.teardown()
    # Not by monkeypatch, which would bring back the address of a service that has ended.
    os.environ.pop("WANDB_SERVICE", None)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wbauth.unauthenticate_session(update_settings=False)
    yield
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)
    wbauth.unauthenticate_session(update_settings=False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


def cell(n_latents: int = 16, **fields: Any) -> Cell:
    defaults: dict[str, Any] = {
        "store": "abc", "d_model": 8, "k": 4, "tokens": 64, "batch_tokens": 8, "lr": 1e-3,
        "settings": {"k_aux": 4}, "dead_after_tokens": 32,
    }  # fmt: skip
    return Cell(n_latents=n_latents, **(defaults | fields))


def row(step: int, nmse: float = 0.5) -> CurveRow:
    return CurveRow(step, 8 * step, 1e6 * step, nmse, 0.75, 4.0, 0.5, 0.25, 1e-3, 1234.5)


def messages(act: Callable[[], object]) -> list[str]:
    """The warnings of `act`, whatever thread they come from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught if str(w.message).startswith("W&B")]


def train(settings: WandbSettings, directory: Path, cells: list[Cell]) -> None:
    logger = WandbLogger(settings, "sweep", str(directory))
    logger.open(cells, CONTEXT)
    for c in cells:
        logger.log(c, row(1))
        logger.finish(c, DONE)
    logger.close()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Until it holds; fails when `process`, which is to bring it about, ends before, or after so long a time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.05)
