"""What a process leaves to the one that watches it (cluster/front/supervise.py), which can say it when this one no
longer can: libraries end a process where it stands, and so does whoever kills it."""

import json
import os
from contextlib import suppress
from typing import Any

_watcher: int | None = None  # the descriptor that it reads from


def watched_by(descriptor: int) -> None:
    """From now on `tell` tells."""
    global _watcher
    _watcher = descriptor


def tell(**facts: Any) -> None:
    """Leaves facts, of which the last of each name counts; nothing where nobody watches."""
    if _watcher is not None:
        with suppress(OSError):  # the watcher is gone
            os.write(_watcher, json.dumps(facts).encode() + b"\n")
