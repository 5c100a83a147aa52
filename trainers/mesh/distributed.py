"""The mesh of several processes, on torch.distributed: gloo on CPUs and for processes that share a GPU, NCCL where each
has a GPU of its own.

    processes = join(Layout(2, 2), rank, "tcp://10.0.0.1:29500", "gloo")
    mesh = processes.mesh(n_latents)       # one for each cell
    ...
    processes.leave()
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from saescale.storage.errors import one_line
from saescale.trainers.kernels.interface import Selected
from saescale.trainers.mesh import gathered, radix
from saescale.trainers.mesh.channel import Channel, Lost, Traffic, close, collective
from saescale.trainers.mesh.keys import NONE, candidates, kept
from saescale.trainers.mesh.layout import Layout, MeshBroken
from saescale.trainers.mesh.network import by_the_way_to, meeting_options
from saescale.trainers.mesh.sums import sum_in_order
from saescale.trainers.mesh.traffic import BITS_OF_ALL, KEYS
from saescale.trainers.mesh.watch import Watch

Backend = Literal["gloo", "nccl"]
MEET_S = 120.0  # that processes may take to come up, one after another
DEADLINE_S = 300.0  # that a process may keep the others waiting


class Processes:
    """This process in the group that it has joined, and how to speak to the others."""

    def __init__(self, layout: Layout, rank: int, device: torch.device, watch: Watch, groups: Sequence[Any]) -> None:
        self.layout, self.rank, self.device, self.watch = layout, rank, device, watch
        self.shard, self.replica = layout.place(rank)
        self.traffic = Traffic()
        self._everyone = groups[0]
        self._whole, self._shards, self._replicas = (
            Channel(group, rank, size, self.traffic, watch.entered)
            for group, rank, size in zip(
                groups,
                (rank, self.shard, self.replica),
                (layout.ranks, layout.shards, layout.replicas),
                strict=True,
            )
        )

    def mesh(self, n_latents: int) -> "ProcessMesh":
        return ProcessMesh(self, n_latents, self._shards, self._replicas, self._whole)

    def tell(self, said: Any) -> list[Any]:
        """What every process says, in the order of the ranks; small things, as Python has them."""
        answers: list[Any] = [None] * self.layout.ranks
        self.watch.entered("tell")
        with collective():
            dist.all_gather_object(answers, said, group=self._everyone)
        return answers

    def tell_first(self, said: Any) -> Any:
        """What rank 0 says."""
        return self.tell(said if self.rank == 0 else None)[0]

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """As `tell_first`, of what is asked at every step."""
        mine = torch.tensor(list(flags), dtype=torch.uint8, device=self.device)
        return [bool(flag) for flag in self._whole.gather(mine, "agree")[0].tolist()]

    def all(self, flag: bool) -> bool:
        """Whether every process says so."""
        mine = torch.tensor([flag], dtype=torch.uint8, device=self.device)
        return bool(self._whole.gather(mine, "all").all())

    def blame(self, error: BaseException) -> MeshBroken:
        """What to say of a collective that failed: which process kept the others waiting, as far as that is known."""
        return MeshBroken(f"the mesh of {self.layout} broke: {self.watch.suspects() or one_line(error)[:300]}")

    def leave(self, broken: bool = False) -> None:
        self.watch.close()
        close(broken)


def join(
    layout: Layout,
    rank: int,
    meeting: str,
    backend: Backend = "gloo",
    device: torch.device | str = "cpu",
    deadline_s: float = DEADLINE_S,
) -> Processes:
    """Joins the group that meets at `meeting` (tcp://HOST:PORT, where rank 0 listens, or file:///...).

    `device`: that of what the processes will say; of GPUs the current one where it has no number. Raises MeshBroken
    where not all come in time.
    """
    wait, come = timedelta(seconds=deadline_s), timedelta(seconds=max(deadline_s, MEET_S))
    own = numbered(torch.device(device))
    options: dict[str, Any] = {"device_id": own} if backend == "nccl" else {}
    try:
        with by_the_way_to(meeting):
            options |= meeting_options(meeting, rank, layout.ranks, come)
            dist.init_process_group(backend, rank=rank, world_size=layout.ranks, timeout=come, **options)
            everyone, shards, replicas = _groups(layout, *layout.place(rank), wait)
        watch = Watch(layout, rank, deadline_s)
    except RuntimeError as error:
        close(broken=True)
        raise MeshBroken(
            f"rank {rank} of a mesh of {layout} did not meet the others at {meeting} within {come.seconds} s: "
            f"{one_line(error)[:300]}"
        ) from error
    return Processes(layout, rank, own, watch, (everyone, shards, replicas))


def _groups(layout: Layout, shard: int, replica: int, wait: timedelta) -> tuple[Any, Any, Any]:
    """Of all, of the shards of this replica, and of the replicas of this shard."""
    everyone = dist.new_group(timeout=wait)

    def group(ranks: list[int]) -> Any:
        # No more than there have to be: each has its connections, and under NCCL memory of the GPU.
        return dist.new_group(ranks, timeout=wait) if 1 < len(ranks) < layout.ranks else everyone

    # Every process makes every group, in one order, as torch wants it.
    shards = [group([layout.rank(s, r) for s in range(layout.shards)]) for r in range(layout.replicas)]
    replicas = [group([layout.rank(s, r) for r in range(layout.replicas)]) for s in range(layout.shards)]
    return everyone, shards[replica], replicas[shard]


def numbered(device: torch.device) -> torch.device:
    """The same with its index, which NCCL wants to know: "cuda" alone is the current GPU."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@contextmanager
def joined(
    layout: Layout, rank: int, meeting: str, backend: Backend, device: torch.device, deadline_s: float
) -> Iterator[Processes]:
    """As `join`, and leaves at the end. Raises MeshBroken, with who is to blame, where a collective failed."""
    group = join(layout, rank, meeting, backend, device, deadline_s)
    broken = True
    try:
        yield group
        broken = False
    except Lost as error:
        close(broken=True)  # or those who wait for this one would hear of it when it has found out who is to blame
        raise group.blame(error) from error
    finally:
        group.leave(broken)


class ProcessMesh:
    """Mesh of one cell of `n_latents`."""

    def __init__(
        self, processes: Processes, n_latents: int, shards: Channel, replicas: Channel, everyone: Channel
    ) -> None:
        layout = processes.layout
        self.shard, self.shards = processes.shard, layout.shards
        self.replica, self.replicas = processes.replica, layout.replicas
        self.first, self.size = layout.share(n_latents, self.shard)
        self.traffic = processes.traffic
        self._layout, self._n_latents = layout, n_latents
        self._of_shards, self._of_replicas, self._of_all = shards, replicas, everyone

    @property
    def alone(self) -> bool:
        return self.shards == self.replicas == 1

    def whole(self, latents: int) -> int:
        return self._n_latents

    def here(self, latents: int) -> int:
        return self.size

    def rows(self, rows: int) -> slice:
        return self._layout.rows(rows, self.replica)

    def select(self, local: Selected, k: int) -> Selected:
        if self.shards == 1:
            return local
        keys = candidates(local, self.first)
        return kept(local, keys, self.kth_of_rows(keys, k))

    def kth_of_rows(self, keys: Tensor, k: int) -> Tensor:
        # What every shard knows decides, so that all go the same way: the first share is the largest.
        width = min(k, self._layout.share(self._n_latents, 0).size)
        if self.shards * width > KEYS:
            return radix.kth_of_all(self._of_shards, keys, k)
        most = keys if keys.shape[1] <= width else keys.topk(width, dim=1).values
        padded = torch.nn.functional.pad(most, (0, width - most.shape[1]), value=NONE)
        return gathered.kth_of_all(self._of_shards, padded, k)

    def kth_largest(self, keys: Tensor, k: int) -> Tensor:
        return radix.kth_of_all(self._of_all, keys[None], k, BITS_OF_ALL)[0]

    def gather_all(self, t: Tensor) -> Tensor:
        return self._of_all.gather(t, "gather_all")

    def sum_shards(self, t: Tensor) -> Tensor:
        return sum_in_order(self._of_shards, t, "sum_shards")

    def sum_replicas(self, t: Tensor) -> Tensor:
        return sum_in_order(self._of_replicas, t, "sum_replicas")

    def gather_replicas(self, t: Tensor) -> Tensor:
        return t if self.replicas == 1 else self._of_replicas.gather(t, "gather_replicas").flatten(0, 1)
