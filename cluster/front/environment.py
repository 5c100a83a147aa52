"""What a shell, a batch system, a notebook or a locale hands to a command, made fit for it and its workers."""

import codecs
import errno
import logging
import os
import sys
import unicodedata

_IN_ASCII = {
    "·": "-", "−": "-", "–": "-", "—": "-", "━": "-", "×": "x", "±": "+/-", "≥": ">=", "≤": "<=", "…": "...",
    "α": "alpha", "β": "beta", "γ": "gamma", "ζ": "zeta", "η": "eta", "λ": "lambda", "σ": "sigma", "µ": "u",
}  # fmt: skip
_HANDLER = "saescale.spell"
FULL = (errno.ENOSPC, errno.EDQUOT)


def prepare() -> None:
    """To be called first. The process gets an input and outputs where it has none, and outputs that can say everything:
    what a terminal's encoding lacks is spelt in what it has."""
    # Before torch is imported, here and in the workers: threads that spin while they wait make everything many times
    # slower as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Figures are drawn into files; a notebook's MPLBACKEND names what this matplotlib may not know.
    os.environ["MPLBACKEND"] = "agg"
    # A home folder that cannot be written to is no news about figures.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    codecs.register_error(_HANDLER, _spell)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def forget_output() -> None:
    """For when nobody reads the output any more: what is still to be flushed goes nowhere, without complaint."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_spelt, error.object[error.start : error.end])), error.end


def _spelt(character: str) -> str:
    simple = unicodedata.normalize("NFKC", character)
    spelt = "".join(_IN_ASCII.get(part, part) for part in simple)
    return spelt if spelt.isascii() else "?"
