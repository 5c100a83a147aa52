"""The commands about what is streamed: harvest, and inspect, which also says what lies in a run."""

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from saescale.cluster.front.console import Address, command, console, display, say, say_marked
from saescale.storage.errors import SaescaleError

if TYPE_CHECKING:
    from saescale.cluster.crew.harvest_worker import ActorRow

Corpus = Annotated[
    str | None, typer.Option(help="python-prose (default), or a path or URL of .txt, .jsonl or .parquet files.")
]


def harvest(
    subject: Annotated[str, typer.Argument(help="smollm2-135m, hf:<org>/<name>, hf:/path/to/folder or your own.")],
    out: Annotated[str, typer.Option(help="URL of the activation store to write.")],
    layer: Annotated[int, typer.Option(help="The site is resid_post of this layer, counted from 0.")],
    corpus: Corpus = None,
    tokens: Annotated[int, typer.Option(help="Training rows.")] = 262_144,
    heldout_tokens: Annotated[int, typer.Option(help="Held-out rows, of other documents.")] = 32_768,
    context_length: Annotated[int | None, typer.Option(help="Text tokens per context (default: 64).")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16, as stored.")] = "float16",
    seed: Annotated[int, typer.Option(help="Of the split and the order of documents and rows.")] = 0,
    actors: Annotated[
        str | None, typer.Option(help="Ray actors that share the work: a number, or auto (one for each GPU or node).")
    ] = None,
    address: Address = None,
) -> None:
    """Writes the residual stream of a subject, on a text or on sequences of its own, into an activation store.

    Without --actors and --address this process does it alone. The store is the same whatever the number of actors.

    Example: [bold]saescale harvest hf:openai-community/gpt2 --layer 8 --corpus 'data/*.jsonl' --out stores/gpt2-l8[/]
    """
    from pydantic import ValidationError

    from saescale.trainers.device import set_threads
    from saescale.trainers.harvest.conduct import harvest as run_harvest
    from saescale.trainers.harvest.spec import HarvestSpec

    given = {
        "subject": subject, "out": out, "layer": layer, "corpus": corpus, "tokens": tokens, "dtype": dtype,
        "heldout_tokens": heldout_tokens, "context_length": context_length, "seed": seed,
    }  # fmt: skip
    try:
        spec = HarvestSpec.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        raise SaescaleError(f"harvest: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    crew: list[ActorRow] = []
    if actors is None and address is None:
        set_threads(os.cpu_count() or 1)
        with display() as shown:
            manifest = run_harvest(spec, shown.harvest)
    else:
        wanted = _actors(actors or "auto")
        from saescale.cluster.crew.harvest import harvest_on_actors

        with display() as shown:
            manifest, crew = harvest_on_actors(spec, wanted, address, shown.harvest)
    if crew:
        from saescale.cluster.front.display import actor_table

        console.print(actor_table(crew))
    rows, site = sum(shard.rows for shard in manifest.shards), f"{manifest.site.hook} of layer {manifest.site.layer}"
    say(f"{out}: {rows:,} rows of {manifest.subject}, {site}, d_model {manifest.d_model}")
    say(f"Next: {command('inspect', out)}")


def inspect(
    url: Annotated[str, typer.Argument(help="An activation store, a run directory or one cell's folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte of a store and check it.")] = False,
) -> None:
    """Says what lies at a URL: a store, a run or a trained SAE.

    Example: [bold]saescale inspect stores/smollm2-135m-l22 --verify[/]
    """
    from saescale.cluster.front.inspection import describe

    for name, value in describe(url, verify).items():
        say_marked(f"[bold]{name:<16}[/]{escape(value)}")


def _actors(given: str) -> int | str:
    if given == "auto":
        return given
    if not given.isascii() or not given.isdigit() or not int(given):
        raise SaescaleError(f"harvest: --actors must be a number of at least 1, or auto, not {given!r}")
    return int(given)
