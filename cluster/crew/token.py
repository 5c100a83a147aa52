"""The token of a Ray cluster, from where Ray itself takes it: RAY_AUTH_TOKEN, else the file that RAY_AUTH_TOKEN_PATH
names, else ~/.ray/auth_token."""

import os
from contextlib import suppress
from pathlib import Path

from saescale.storage.errors import SaescaleError, one_line

_MODE, _TOKEN, _PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def has_token() -> bool:
    """Whether Ray finds a token on this machine. Raises SaescaleError where RAY_AUTH_TOKEN_PATH names no file that
    holds one."""
    if os.environ.get(_TOKEN):
        return True
    if named := os.environ.get(_PATH):
        _require_token_in(Path(named))
        return True
    home = home_token()
    try:
        return home is not None and home.exists()
    except OSError:
        return False


def has_to_send_one() -> bool:
    """Whether somebody chose RAY_AUTH_MODE=token."""
    if os.environ.get(_MODE) == "":
        del os.environ[_MODE]  # an empty one counts as a choice for Ray
    return os.environ.get(_MODE, "").lower() == "token"


def use_token() -> bool:
    """Has Ray send the token where there is one and nobody said otherwise; whether that is new.

    Only for a cluster that asks for one: from the workers of another this process would then ask for it in vain. Raises
    what `has_token` raises.
    """
    if os.environ.get(_MODE) or not has_token():
        return False
    os.environ[_MODE] = "token"
    with suppress(ImportError, AttributeError):  # Ray before it knew tokens
        from ray._raylet import Config  # type: ignore[attr-defined]

        Config.initialize("")  # what this process has read of its environment before
    return True


def refused(where: str) -> SaescaleError:
    """What to say where the cluster at `where` does not take what this machine sends."""
    if has_token():
        return SaescaleError(
            f"{where} refuses this machine's token; put the cluster's into RAY_AUTH_TOKEN, or its file into "
            "RAY_AUTH_TOKEN_PATH"
            + (f" (and unset RAY_AUTH_MODE={os.environ[_MODE]})" if os.environ.get(_MODE, "token") != "token" else "")
        )
    return SaescaleError(
        f"{where} asks for a token and there is none here; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file"
    )


def home_token() -> Path | None:
    """The file in the user's home folder, there or not; None where the user has no home."""
    try:
        return Path.home() / ".ray" / "auth_token"
    except RuntimeError:
        return None


def _require_token_in(path: Path) -> None:
    try:
        found = path.read_bytes().strip()
    except OSError as error:
        raise SaescaleError(
            f"the token cannot be read: RAY_AUTH_TOKEN_PATH is {path} ({one_line(error)}); name the file that holds it"
        ) from None
    if not found:
        raise SaescaleError(f"the token's file {path} is empty; put the cluster's token into it (RAY_AUTH_TOKEN_PATH)")
