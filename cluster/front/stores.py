"""The commands about what is streamed: harvest, and inspect, which also says what lies in a run."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from saescale.cluster.front.console import (
    Actors,
    Address,
    ArchitectureFile,
    DeviceMap,
    TrustRemoteCode,
    command,
    console,
    display,
    number_of_actors,
    say,
    say_marked,
    use_architectures,
)
from saescale.storage.errors import SaescaleError

if TYPE_CHECKING:
    from saescale.cluster.crew.harvest_worker import ActorRow

Corpus = Annotated[
    str | None,
    typer.Option(
        help="python-prose (default), or a path, pattern, folder or URL of .txt, .jsonl, .parquet or .csv files."
    ),
]
TextColumn = Annotated[str | None, typer.Option(help="Field or column with the texts (default: text).")]
CutDocuments = Annotated[
    int | None,
    typer.Option(
        help="Cut documents longer than so many characters; each part is a document of its own for the split."
    ),
]


def harvest(
    subject: Annotated[
        str,
        typer.Argument(
            help="smollm2-135m, hf:<org>/<name>, hf:/path/to/folder, othello, maze, dictionary or your own."
        ),
    ],
    out: Annotated[str, typer.Option(help="URL of the activation store to write; of --layers the folder of stores.")],
    layer: Annotated[int | None, typer.Option(help="The site is resid_post of this layer, counted from 0.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Several layers in one pass, a store for each below --out: 0-11, or 0,4,8, or all."),
    ] = None,
    corpus: Corpus = None,
    text_column: TextColumn = None,
    cut_documents: CutDocuments = None,
    tokens: Annotated[int | None, typer.Option(help="Training rows (default: 262144).")] = None,
    heldout_tokens: Annotated[
        int | None, typer.Option(help="Held-out rows, of other documents (default: 32768).")
    ] = None,
    heldout_from: Annotated[
        int | None,
        typer.Option(help="Draw them from about so many of the first tokens of the corpus, as a live source does."),
    ] = None,
    context_length: Annotated[int | None, typer.Option(help="Text tokens per context (default: 64).")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16, as stored.")] = "float16",
    compute_dtype: Annotated[
        str, typer.Option(help="Of the forward pass: float32, bfloat16 or auto, what the device is made for.")
    ] = "auto",
    batch_contexts: Annotated[int, typer.Option(help="Contexts that go through the subject at a time.")] = 16,
    shard_rows: Annotated[
        int | None, typer.Option(help="Rows of a Parquet file (default: 32768, in memory at once).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split and the order of documents and rows.")] = 0,
    actors: Actors = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit: of hf:<org>/<name>, as @<revision> behind it.")
    ] = None,
    device_map: DeviceMap = None,
    trust_remote_code: TrustRemoteCode = False,
    address: Address = None,
) -> None:
    """Writes the residual stream of a subject, on a text or on sequences of its own, into an activation store.

    Without --actors and --address this process does it alone. The store is the same whatever the number of actors, and
    whether --layer or --layers wrote it: those are stores of the same rows, OUT/resid_post.0 and so on.

    Example: [bold]saescale harvest hf:openai-community/gpt2 --layer 8 --corpus 'data/*.jsonl' --out stores/gpt2-l8[/]
    Example: [bold]saescale harvest hf:openai-community/gpt2 --layers 0-11 --corpus 'data/*.jsonl' --out stores/gpt2[/]
    """
    from pydantic import ValidationError

    from saescale.storage.writable import require_lasting
    from saescale.trainers.device import set_threads, usable_cores
    from saescale.trainers.harvest.conduct import harvest_each
    from saescale.trainers.harvest.layers import each_layer, stores_of_all
    from saescale.trainers.harvest.spec import HarvestSpec
    from saescale.trainers.subjects.subject import at_revision

    require_lasting(out)
    if (layer is None) == (layers is None):
        raise SaescaleError("harvest: give --layer with one layer, or --layers with several (0-11, or 0,4,8, or all)")
    given = {
        "subject": subject, "out": out, "layer": layer, "corpus": corpus, "text_column": text_column, "tokens": tokens,
        "heldout_tokens": heldout_tokens, "heldout_from": heldout_from, "context_length": context_length,
        "cut_documents": cut_documents, "dtype": dtype, "compute_dtype": compute_dtype,
        "batch_contexts": batch_contexts, "shard_rows": shard_rows, "seed": seed, "device_map": device_map,
    }  # fmt: skip
    given |= {"subject": at_revision(subject, revision), "trust_remote_code": trust_remote_code}
    try:
        spec = HarvestSpec.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        option = "--" + ".".join(map(str, problem["loc"])).replace("_", "-")
        message = problem["msg"][0].lower() + problem["msg"][1:]
        raise SaescaleError(f"harvest: {option}: {message} (given: {problem['input']!r})") from error
    crew: list[ActorRow] = []
    with display() as shown:
        specs = [spec] if layers is None else each_layer(spec, layers, notify=shown.stage)
        if actors is None and address is None:
            set_threads(usable_cores())
            manifests = harvest_each(specs, shown.harvest)
        else:
            from saescale.cluster.crew.harvest import harvest_on_actors

            wanted = number_of_actors("harvest", actors or "auto")
            manifests, crew = harvest_on_actors(specs, wanted, address, shown.harvest)
    if crew:
        from saescale.cluster.front.display import actor_table

        console.print(actor_table(crew))
    for each, manifest in zip(specs, manifests, strict=True):
        rows, site = sum(s.rows for s in manifest.shards), f"{manifest.site.hook} of layer {manifest.site.layer}"
        say(f"{each.out}: {rows:,} rows of {manifest.subject}, {site}, d_model {manifest.d_model}")
    say(f"Next: {command('inspect', specs[0].out)}")
    if layers is not None:
        say(f"A sweep over all of them has `store: {stores_of_all(out)}`")


def inspect(
    url: Annotated[
        str, typer.Argument(help="An activation store, a run directory, one cell's folder or an SAE's file.")
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte of a store and check it.")] = False,
    architecture_file: ArchitectureFile = None,
) -> None:
    """Says what lies at a URL: a store, a run or a trained SAE.

    Example: [bold]saescale inspect stores/smollm2-135m-l22 --verify[/]
    """
    from saescale.cluster.front.inspection import describe

    use_architectures(architecture_file)
    for name, value in describe(url, verify).items():
        say_marked(f"[bold]{name:<16}[/]{escape(value)}")
