"""The errors and the warning that users are meant to read. What is secret in an address is in none of them."""

from typing import Any

from saescale.storage.secrets import hide_secrets


class SaescaleError(Exception):
    """A problem that the user can act on: one line that says what is wrong, where, and what to do about it.

    The command line prints the message alone and exits with status 2; `--debug` adds the traceback.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*_without_secrets(args))


class Unavailable(SaescaleError):
    """A store that did not answer, or not in time: the same may succeed a little later."""


class Damaged(SaescaleError):
    """A file, `where`, that is there and does not hold what it should: cut short, altered, or another program's."""

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(message)
        self.where = where


class Newer(SaescaleError):
    """A file that a later version wrote, in a format that this one does not know."""


class Superseded(SaescaleError):
    """Another driver has taken the run over, or another worker the cell; what this one still does is not written."""


class SaescaleWarning(UserWarning):
    """Something that the user should know of and that work went on after: one line.

    The command line shows these and no other warnings, those of its workers included.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*_without_secrets(args))


def one_line(error: BaseException) -> str:
    """What an error says, on one line; of an OSError the reason alone."""
    if isinstance(error, OSError) and error.strerror:
        return hide_secrets(error.strerror)
    return hide_secrets(" ".join(str(error).split())) or type(error).__name__


def _without_secrets(args: tuple[Any, ...]) -> list[Any]:
    return [hide_secrets(each) if isinstance(each, str) else each for each in args]
