"""What all commands share: the console, options that several of them have, and how they speak."""

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.storage.secrets import hide_secrets

if TYPE_CHECKING:
    from saescale.cluster.front.display import Display


class _Console(Console):
    """Shows no secret of an address."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(hide_secrets(each) if isinstance(each, str) else each for each in objects), **options)


# Tables that go into a pipe or a file are not cut: there is no terminal whose width they have to fit.
_WHOLE = 10_000
console = _Console()
if not console.is_terminal:
    console = _Console(width=_WHOLE)

ArchitectureFile = Annotated[
    list[str] | None,
    typer.Option(help="A Python file that defines an architecture of your own, called as the file is; repeatable."),
]
Actors = Annotated[
    str | None, typer.Option(help="Ray actors that share the work: a number, or auto (one for each GPU or node).")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster (default: RAY_ADDRESS, else a local one).")]
Bootstraps = Annotated[int, typer.Option(help="Bootstrap fits behind each interval.", min=0)]
Extend = Annotated[
    str | None, typer.Option(help="A sweep file or plan whose cells are added; those that are there stay.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document alone on stdout.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Train the cells that failed again.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Of a model larger than one GPU: auto, or the most on each device: 0=70GB,1=70GB,cpu=200GB."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with a Hugging Face model.")
]
SweepOut = Annotated[str | None, typer.Option(help="Run directory in place of the file's.")]
SweepWandb = Annotated[str | None, typer.Option(help="W&B mode in place of the file's.")]


def say(text: str, style: str | None = None) -> None:
    """A line on stdout, as it is: what is in brackets too, such as in a name of the user's."""
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def say_marked(text: str) -> None:
    """A line on stdout with rich's markup; names in it have to be escaped."""
    console.print(text, highlight=False, soft_wrap=True)


def command(*words: str) -> str:
    """A command of saescale as a shell takes it."""
    return shlex.join(("saescale", *words))


class ShowsWarnings:
    """For `warnings.showwarning`: what users should know of, on stderr, a line each and each once; no other warnings.

    Python itself says a text once for every place in the code that comes to say it.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        text = hide_secrets(str(message))
        if issubclass(category, SaescaleWarning) and text not in self._said:
            self._said.add(text)
            print(f"warning: {text}", file=sys.stderr)


def say_stores(urls: Sequence[str]) -> None:
    """Which stores a sweep is over, where they are several: a pattern in the sweep file says it in a word."""
    if len(urls) > 1:
        say(f"over {len(urls)} stores: {', '.join(urls)}")


def show_notes(notes: Sequence[str]) -> None:
    """What must be said beside numbers, a line each."""
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)


def number_of_actors(of: str, given: str) -> int | str:
    """What --actors of a command says, "auto" or a number. Raises SaescaleError for anything else."""
    if given == "auto":
        return given
    if not given.isascii() or not given.isdigit() or not int(given):
        raise SaescaleError(f"{of}: --actors must be a number of at least 1, or auto, not {given!r}")
    return int(given)


def use_architectures(paths: Sequence[str] | None) -> None:
    """Makes the user's files architectures of this process. Raises SaescaleError for one that is none."""
    from saescale.trainers.architectures import ARCHITECTURES

    for path in paths or ():
        ARCHITECTURES.give(path)


def table(*columns: str) -> Table:
    """A table without lines; the first column is text, the others are numbers."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right")
    return made


def display() -> "Display":
    """What shows the progress of long work, a context manager."""
    from saescale.cluster.front.display import Display

    return Display(console)
