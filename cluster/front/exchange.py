"""The commands about trained SAEs in files of other libraries: export and import."""

from typing import Annotated

import typer

from saescale.cluster.front.console import ArchitectureFile, command, say, use_architectures
from saescale.storage.errors import SaescaleError

Format = Annotated[str, typer.Option("--format", help="The format of the other side, such as native.")]


def export(
    sae: Annotated[str, typer.Argument(help="A cell's folder, or an SAE's file.")],
    out: Annotated[str, typer.Option(help="File or folder to write.")],
    format: Format = "native",
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Of native: files of at most this size, such as 5GB, with an index. One file without it."),
    ] = None,
    architecture_file: ArchitectureFile = None,
) -> None:
    """Writes a trained SAE as another library reads it.

    Example: [bold]saescale export runs/quickstart/cells/n512-k8-s0-1a2b3c4d --format native --out sae.safetensors[/]
    """
    from saescale.trainers.exchange import native
    from saescale.trainers.exchange.format import find_format

    use_architectures(architecture_file)
    if max_shard_size is not None and format != "native":
        raise SaescaleError(f"--max-shard-size is of the format native: {format} has files of its own; leave it out")
    most = None if max_shard_size is None else _bytes(max_shard_size)
    native_to_native = format == "native"  # which needs no memory for it
    written = native.copy(sae, out, most) if native_to_native else find_format(format).write(native.read(sae), out)
    say(f"wrote {', '.join(written)}")
    say(f"Next: {command('import', out, '--format', format, '--out', 'sae.safetensors')}")


def _bytes(size: str) -> int:
    from pydantic import TypeAdapter, ValidationError

    from saescale.storage.documents import problem_of
    from saescale.trainers.harvest.live_spec import Bytes

    try:
        return TypeAdapter[int](Bytes).validate_python(size)
    except ValidationError as error:
        raise SaescaleError(f"--max-shard-size: {problem_of(error)}, not {size!r}") from error


def import_(
    path: Annotated[str, typer.Argument(help="The file or folder of an SAE in the other format.")],
    out: Annotated[str, typer.Option(help="The file to write, in saescale's own format.")],
    format: Format = "native",
    architecture_file: ArchitectureFile = None,
) -> None:
    """Reads a trained SAE of another library and writes it as saescale's own.

    Example: [bold]saescale import sae.safetensors --format native --out imported/sae.safetensors[/]
    """
    from saescale.trainers.exchange import native
    from saescale.trainers.exchange.format import find_format

    use_architectures(architecture_file)
    trained = find_format(format).read(path)
    (written,) = native.write(trained, out)
    cell = trained.cell
    say(f"wrote {written}: {cell.n_latents} latents, k {cell.k}, d_model {cell.d_model}")
    say(f"Next: saescale.load({written!r}) in Python")
