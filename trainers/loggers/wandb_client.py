"""What all runs share: online, offline or off; opening a run; errors as one warning; nothing secret in what is sent.

Logging serves the sweep and never fails it.
"""

import hashlib
import os
import re
import shlex
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import BaseModel

from saescale.storage.errors import SaescaleWarning
from saescale.storage.secrets import hide_secrets
from saescale.trainers.loggers.wandb_settings import Mode, WandbSettings

if TYPE_CHECKING:
    from wandb import Run, Settings

# Seconds to wait for the server when a run opens, when it closes, and when asking whether it is there at all.
INIT_TIMEOUT = 30.0
FINISH_TIMEOUT = 60.0
PROBE_TIMEOUT = 10.0
# At most so many seconds of points are lost when the process is killed.
FLUSH_INTERVAL = 2.0

_SECRET_KEY = re.compile(r"secret|passw|credential|api_?key|access_?key|(^|_)token$|^key$", re.IGNORECASE)


def resolve_mode(settings: WandbSettings) -> Mode:
    """What `mode` means on this machine. Never prompts, contacts no server, raises nothing.

    `auto` obeys WANDB_MODE where that says `offline` or `disabled`, and else is online when a key is
    configured for the server in question (WANDB_BASE_URL): in the environment, netrc or W&B's settings.
    `online` without a key becomes `offline` with a warning, because asking for one would stop the sweep.
    """
    if settings.mode in ("off", "offline"):
        return settings.mode
    try:
        found = server()
        from wandb.sdk.lib import wbauth

        if settings.mode == "auto" and found.mode in ("disabled", "offline", "dryrun"):
            return "off" if found.mode == "disabled" else "offline"
        auth = wbauth.authenticate_session(host=found.base_url, source="saescale", prompt=False, update_session=False)
    except Exception as error:
        warn(f"could not look for a key ({one_line(error)}): logging offline")
        return "offline"
    if auth is None and settings.mode == "online":
        warn(f"mode is online but {found.base_url} has no key (run `wandb login`): logging offline")
    return "online" if auth else "offline"


def how_to_read(mode: Mode, directory: str, settings: WandbSettings, sweep: str) -> str:
    """The one line that tells users where the runs of `sweep` are and how to look at them."""
    if mode == "off":
        return "W&B is off"
    if mode == "offline":
        if not os.path.isdir(os.path.join(directory, "wandb")):
            return f"W&B: nothing was logged, not even below {directory}; the warnings above say why"
        return f"W&B: {offline_runs(directory)}"
    entity = settings.entity or os.environ.get("WANDB_ENTITY")
    if entity is None:
        return f"W&B: group {sweep!r} of your project {settings.project!r} at {server().app_url}"
    return f"W&B: {group_url(entity, settings.project, sweep)}"


def import_wandb() -> ModuleType:
    # Read when wandb is imported: no crash reports to its makers, and no lines of its own among ours.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb


def init(settings: WandbSettings, mode: Mode, directory: str, **what: Any) -> "Run":
    """Opens a run within INIT_TIMEOUT seconds or raises; an existing one with the same id is continued."""
    wandb = import_wandb()
    os.makedirs(directory, exist_ok=True)  # else wandb silently writes to a temporary folder
    # Artifacts and tables that wait for their upload lie beside the runs, not in the user's home.
    os.environ.setdefault("WANDB_DATA_DIR", os.path.abspath(os.path.join(directory, "wandb")))
    run: Run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        mode=mode,
        dir=directory,
        resume="allow",
        reinit="create_new",
        allow_val_change=True,
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=FLUSH_INTERVAL,
            # The folder in which a user happens to stand is not part of the experiment: upload none of it.
            disable_git=True,
            disable_code=True,
            # A pack's cells share one device: sampling it once per cell would only multiply one curve.
            x_disable_stats=True,
        ),
        **what,
    )
    return run


def run_id(what: str, sweep: str) -> str:
    return f"{what}-{hashlib.sha256(sweep.encode()).hexdigest()[:8]}"


def reachable(mode: Mode, directory: str) -> Mode:
    """`mode`, or offline (with a warning) when it is online and the server gives no answer of any kind.

    A cluster without internet then keeps its runs, to be uploaded from elsewhere, and waits for none of them.
    """
    if mode != "online":
        return mode
    url = server().base_url
    try:
        with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT):
            return mode
    except urllib.error.HTTPError:
        return mode
    except Exception as error:
        # Certificates are for wandb to judge: it may know of others than Python does.
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            return mode
        warn(f"no answer from {url}: {one_line(error)}; {offline_runs(directory)}")
        return "offline"


def server() -> "Settings":
    """W&B's own settings of this process: environment, then files."""
    import_wandb()
    from wandb.sdk import wandb_setup

    return wandb_setup.singleton().settings


def offline_runs(directory: str) -> str:
    runs = shlex.quote(os.path.join(directory, "wandb"))
    return f"offline runs: read them with `wandb leet {runs}`, upload with `wandb sync {runs}/offline-run-*`"


def how_to_send(sync_dir: str) -> str:
    """How to send the rest of a run that was online, from its folder; without the option wandb passes it over."""
    return f"`wandb sync --no-skip-online {shlex.quote(sync_dir)}` sends the rest"


def group_url(entity: str, project: str, group: str) -> str:
    return f"{server().app_url}/{quote(entity)}/{quote(project)}/groups/{quote(group, safe='')}"


def without_secrets(value: Any) -> Any:
    """`value` as JSON-like data, less entries whose key names a secret and less the secret parts of URLs."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {str(k): without_secrets(v) for k, v in value.items() if not _SECRET_KEY.search(str(k))}
    if isinstance(value, list | tuple):
        return [without_secrets(v) for v in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return hide_secrets(str(value))


def one_line(error: BaseException) -> str:
    text = hide_secrets(f"{type(error).__name__}: {error}")
    if key := os.environ.get("WANDB_API_KEY"):
        text = text.replace(key, "***")
    return " ".join(text.split())[:300]


def warn(text: str) -> None:
    warnings.warn(f"W&B: {text}", SaescaleWarning, stacklevel=2)
