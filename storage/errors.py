"""The one error that users are meant to read."""


class SaescaleError(Exception):
    """A problem that the user can act on: one line that says what is wrong, where, and what to do about it.

    The command line prints the message alone and exits with status 2; `--debug` adds the traceback.
    """
