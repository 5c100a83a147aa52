"""The weights of a finished cell as one file, also where no process has all of them."""

from collections.abc import Set

from saescale.storage import checkpoint
from saescale.trainers.exchange import native
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.mesh.mesh import Group


def write_weights(trained: Trained, url: str, common: Set[str], group: Group) -> None:
    """Writes the SAE to the file `url` as exchange/native.py does.

    Of a mesh `trained` is this shard's, and `common` names what all shards have. Each writes its part beside the file,
    and the first process puts them together.
    """
    mesh, params = trained.sae.mesh, trained.sae.params
    if mesh.alone:
        native.write(trained, url)
        return
    folder, _, name = url.rpartition("/")
    part = None
    if mesh.replica == 0:
        own = {key: t.cpu().numpy() for key, t in params.items() if mesh.shard == 0 or key not in common}
        of_shard = f"{name.removesuffix('.safetensors')}-shard-{mesh.shard:05d}-of-{mesh.shards:05d}.safetensors"
        part = checkpoint.write_tensors(folder, of_shard, own)
    parts = [part for part in group.tell(part) if part is not None]
    if group.rank == 0:
        checkpoint.join(folder, parts, name, native.metadata(trained.cell))
