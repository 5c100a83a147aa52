"""The weights of a finished cell: one file, or of each shard of a mesh its own, with an index."""

from collections.abc import Callable, Set

import xxhash

from saescale.storage import files, sharded
from saescale.storage.rundir import WEIGHTS
from saescale.storage.tensors import cut_name, write_tensors
from saescale.trainers.exchange import native
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.mesh.mesh import Group


def write_weights(
    trained: Trained, folder: str, now: Callable[[str], str], common: Set[str], group: Group
) -> dict[str, str] | None:
    """Writes the SAE to `folder`; native.read finds it when each file, which `now` calls another way, has its name.

    Of a mesh `trained` is this shard's, and `common` names what all shards have. Each shard writes what it has, and the
    first process the index, so no machine ever has all of it. The XXH3-64 of each file by its name; None of one file
    alone.
    """
    mesh, params = trained.sae.mesh, trained.sae.params
    if mesh.shards == 1:
        if group.rank == 0:
            native.write(trained, files.join(folder, now(WEIGHTS)))
        return None
    told = None
    if mesh.replica == 0:
        last = mesh.first + mesh.here(trained.cell.n_latents)
        name = sharded.shard_name(WEIGHTS, mesh.shard, mesh.shards)
        own = {
            key if key in common else cut_name(key, mesh.first, last): t.cpu().numpy()
            for key, t in params.items()
            if mesh.shard == 0 or key not in common
        }
        part = write_tensors(folder, now(name), own, {"format": "pt"})
        told = part.model_copy(update={"file": name}), list(own), sum(t.nbytes for t in own.values())
    parts, keys, sizes = zip(*(said for said in group.tell(told) if said is not None), strict=True)
    name = sharded.index_name(WEIGHTS)
    content = sharded.Index.of(parts, keys, {"total_size": sum(sizes), **native.metadata(trained.cell)}).content()
    if group.rank == 0:
        files.write_atomic(files.join(folder, now(name)), content)
    return {part.file: part.xxh3 for part in parts} | {name: xxhash.xxh3_64_hexdigest(content)}
