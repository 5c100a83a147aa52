"""The commands about subjects: what there is, what one of them is, and the training of those whose truth is known."""

import json
from typing import Annotated, Any, Literal

import typer
import yaml
from rich.markup import escape

from saescale.cluster.front.console import Json, TrustRemoteCode, command, console, display, say, say_marked, table
from saescale.storage.errors import SaescaleError

PARTS = 12  # of a task, that are shown

app = typer.Typer(no_args_is_help=True, help="List, train and describe subjects, the models that SAEs are trained on.")


@app.command("list")
def list_() -> None:
    """Says which subjects there are.

    Example: [bold]saescale subject list[/]
    """
    from saescale.trainers.subjects.subject import SUBJECTS, subject_names
    from saescale.trainers.subjects.train import trainable_names

    trainable = trainable_names()
    shown = table("subject", "trainable", "what")
    shown.columns[1].justify = shown.columns[2].justify = "left"
    for name in subject_names():
        shown.add_row(name, "yes" if name in trainable else "", escape(SUBJECTS.about(name)))
    console.print(shown)
    say(f"Next: {command('subject', 'show', 'othello')}")


@app.command()
def train(
    subject: Annotated[str, typer.Argument(help="One that can be trained: saescale subject list.")],
    out: Annotated[str, typer.Option(help="The folder to write; the same command goes on in it.")],
    sequences: Annotated[int, typer.Option(help="To train on, each of them once.", min=1)] = 131_072,
    batch: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 64,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of the first weights and the sequences.", min=0)] = 0,
    start: Annotated[
        str | None, typer.Option(help="The folder of a trained one to begin with, instead of random weights.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights as written: float32, float16 or bfloat16.")] = "float32",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the subject, as name=value; repeatable.")
    ] = None,
) -> None:
    """Trains a subject on sequences that it makes itself, and scores it on held-out ones.

    Example: [bold]saescale subject train othello --out subjects/mine --set board=8 --set n_layers=8[/]
    """
    from saescale.trainers.subjects.train import TrainingSpec, checked, train_subject

    given = {"subject": subject, "out": out, "settings": _settings(set_ or []), "sequences": sequences, "batch": batch}
    spec = checked(TrainingSpec, given | {"lr": lr, "seed": seed, "start": start, "dtype": dtype}, "subject train")
    with display() as shown:
        record = train_subject(spec, shown.training)
    _show_curve(record["curve"])
    say(f"{out}: {_scores(record['score'])}")
    say(f"Next: {command('harvest', f'{subject}:{out}', '--layer', '0', '--out', 'stores/mine')}")


@app.command()
def show(
    subject: Annotated[str, typer.Argument(help="Its name, such as othello or othello:subjects/mine.")],
    sequences: Annotated[
        int, typer.Option(help="Held-out sequences to score it on, where it has a score.", min=1)
    ] = 500,
    task: Annotated[
        str | None, typer.Option(help="A task: how well it does it, and which heads and MLPs it needs for it.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Of the task.", min=2)] = 16,
    compute_dtype: Annotated[
        Literal["float32", "bfloat16", "auto"],
        typer.Option(help="Of the task: bfloat16 and auto may round small effects away."),
    ] = "float32",
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Loads a subject and says what it is, which labels it has, and how well it does what it was trained for.

    With --task: how well it does that, and by which heads and MLPs.

    Example: [bold]saescale subject show othello[/]
    Example: [bold]saescale subject show smollm2-135m --task ioi[/]
    """
    from saescale.trainers.subjects.subject import get_subject

    if task is not None:
        from saescale.trainers.tasks.circuit import circuit
        from saescale.trainers.tasks.task import TASKS

        TASKS.check(task)
        model = get_subject(subject, dtype=compute_dtype, trust_remote_code=trust_remote_code)
        if json_:  # and nothing else
            print(json.dumps(circuit(model, task, prompts), indent=1))
            return
        with display() as shown:
            of_task = circuit(model, task, prompts, progress=shown.patching)
        _show_task(subject, of_task)
        return
    found = _described(get_subject(subject, trust_remote_code=trust_remote_code), sequences)
    if json_:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        words = _scores(value) if name == "score" else ", ".join(value) if isinstance(value, list) else str(value)
        say_marked(f"[bold]{name:<16}[/]{escape(words)}")


@app.command()
def boards(
    cell: Annotated[str, typer.Argument(help="A cell of a run on othello: RUN/cells/CELL.")],
    out: Annotated[str, typer.Option(help="The picture to write: .png, .svg or .pdf.")] = "boards.png",
    number: Annotated[int, typer.Option(help="Positions, each of another game.", min=1, max=24)] = 6,
) -> None:
    """Draws boards as the latents of a cell see them, beside the true ones.

    Example: [bold]saescale subject boards runs/othello/cells/n512-k8-s0-1a2b3c4d --out boards.png[/]
    """
    from saescale.cluster.front.board_picture import draw_boards_of
    from saescale.storage.files import write_atomic
    from saescale.storage.writable import require_writable

    kind = out.rpartition(".")[2]
    if kind not in ("png", "svg", "pdf"):
        raise SaescaleError(f"--out {out}: a picture ends in .png, .svg or .pdf")
    require_writable(out.rpartition("/")[0] or ".")
    write_atomic(out, draw_boards_of(cell, number)[kind])
    say(f"wrote {out}")


def _described(subject: Any, sequences: int) -> dict[str, Any]:
    from saescale.trainers.subjects.subject import Generates, Learns

    found: dict[str, Any] = {
        "subject": subject.name,
        "weights": subject.fingerprint,
        "layers": subject.n_layers,
        "d_model": subject.d_model,
        "computes in": str(subject.dtype).removeprefix("torch."),
        "reads": "sequences of its own" if isinstance(subject, Generates) else "text",
    }
    if subject.labels:
        found["labels"] = list(subject.labels)
    if isinstance(subject, Learns):
        found["score"] = subject.score(sequences)
    return found


def _show_curve(curve: list[dict[str, float]]) -> None:
    """The scores on the way."""
    shown = table(*curve[0])
    for point in curve:
        shown.add_row(*(f"{value:,.4g}" if name != "sequences" else f"{value:,}" for name, value in point.items()))
    console.print(shown)


def _show_task(subject: str, found: dict[str, Any]) -> None:
    say(f"{found['task']} of {subject}, {found['prompts']} prompts; the metric is the {found['unit']}")
    for which in ("clean", "corrupt"):
        say_marked(f"[bold]{which:<16}[/]{escape(_scores(found[which]))}")
    shown = table("part", "lost by noising", "of that straight", "back by denoising")
    for part in found["parts"][:PARTS]:
        shown.add_row(part["part"], *(f"{part[name]:.3f}" for name in ("noising", "direct", "denoising")))
    console.print(shown)
    for kind, best in found["heads"].items():
        words = ", ".join(f"{each['part'].removeprefix('head ')} ({each['score']:.3f})" for each in best)
        say_marked(f"[bold]{kind:<16}[/]{escape(words)}")


def _settings(given: list[str]) -> dict[str, Any]:
    """`name=value` words; values as YAML has them. Raises SaescaleError for what is none, or given twice."""
    found: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not name:
            raise SaescaleError(f"--set takes name=value, such as n_layers=4, not {each!r}")
        if name in found:
            raise SaescaleError(f"--set {name} is given twice; once is enough")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SaescaleError(f"--set {each}: {value!r} is no value of YAML; write a number or a word") from error
    return found


def _scores(score: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in score.items())
