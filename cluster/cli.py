"""The entry point of `saescale`: its commands, and what becomes of errors.

Each command imports what it needs when it runs, so that `saescale --help` answers at once.
"""

import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer

from saescale.cluster.front import environment, evals, exchange, jobs, laws, plan, stores, subjects, sweeps
from saescale.cluster.front.console import ShowsWarnings
from saescale.cluster.front.supervise import supervise
from saescale.storage.errors import SaescaleError, one_line

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Measures how sparse autoencoders scale: harvest activations, sweep N and k, fit the laws.",
)

# In the order in which --help shows them.
COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": sweeps.quickstart,
    "harvest": stores.harvest,
    "sweep": sweeps.sweep,
    "submit": jobs.submit,
    "status": jobs.status,
    "logs": jobs.logs,
    "stop": jobs.stop,
    "list": jobs.list_jobs,
    "eval": evals.evaluate,
    "fit": laws.fit,
    "plan": plan.plan,
    "reproduce": laws.reproduce,
    "report": sweeps.report,
    "inspect": stores.inspect,
    "export": exchange.export,
    "import": exchange.import_,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(subjects.app, name="subject")


# Those that hold Ray, and that it may end where they stand.
WATCHED = ("quickstart", "harvest", "sweep", "eval")


def main() -> None:
    """The entry point of the process: runs a command, in a process of its own where that could be ended by Ray."""
    environment.prepare()
    if next((word for word in sys.argv[1:] if not word.startswith("-")), None) in WATCHED:
        supervise(command)
    else:
        command()


def command() -> None:
    """Runs a command; what a user can act on becomes one line and status 2, the rest one line and status 1."""
    warnings.showwarning = ShowsWarnings()
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        # A batch system's polite end is treated as Ctrl-C: the workers save their checkpoints first.
        signal.signal(signal.SIGTERM, _interrupt)
    debug = "--debug" in sys.argv
    try:
        app()
    except SystemExit as end:
        if end.code == 130:  # what typer makes of KeyboardInterrupt
            _complain("interrupted; run the same command again to go on from here")
        raise
    except BrokenPipeError:  # such as of `| head`
        environment.forget_output()
        sys.exit(1)
    except SaescaleError as error:
        if debug:
            traceback.print_exc()
        _complain(f"error: {error}")
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno in environment.FULL:
            _complain(
                f"error: {error.filename or 'a file or the output'}: {one_line(error)}; free space, and try again"
            )
            sys.exit(2)
        _complain(f"unexpected {type(error).__name__}: {one_line(error)} (traceback: saescale --debug COMMAND ...)")
        sys.exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measures how sparse autoencoders scale: harvest activations, sweep N and k, fit the laws."""


if __name__ == "__main__":
    main()
