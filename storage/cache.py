"""Where what was downloaded or compiled is kept on this machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where downloads are kept: `SAESCALE_CACHE`, else `saescale` in the user's cache folder."""
    chosen = os.environ.get("SAESCALE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "saescale"
