"""What processes of a group say to each other: three collectives over torch.distributed, each of them counted.

Nothing is added up in here, nor by the library, whose order would be its own: whoever sums does it in the order of the
ranks (sums.py), so that every process has the same bits.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from saescale.storage.errors import one_line
from saescale.trainers.device import spoils_the_process


class Lost(RuntimeError):
    """A collective failed: some process of the group is gone, or kept the others waiting for too long."""


class Traffic:
    """What this process sent to others of its mesh, by kind; counted where it is sent."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        # In collectives, those of others included that it waited for.
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def clear(self) -> None:
        self.bytes.clear()
        self.calls.clear()
        self.seconds.clear()


class Channel:
    """One group of processes; `rank` of `size` is this one's place in it.

    `group` None is a group of one process, in which nothing is said. Where the group speaks through the hosts' memory
    (gloo), tensors of a GPU go through it too.
    """

    def __init__(self, group: Any, rank: int, size: int, traffic: Traffic, entered: Callable[[str], None]) -> None:
        self._group, self.rank, self.size, self.traffic, self._entered = group, rank, size, traffic, entered
        self._host = group is not None and dist.get_backend(group) == "gloo"

    def gather(self, t: Tensor, kind: str) -> Tensor:
        """[size, *t.shape]: of every process, in the order of the ranks."""
        if self.size == 1:
            return t[None]
        flat = self._there(t.contiguous().view(-1))
        out = flat.new_empty(self.size * flat.numel())
        self._say(kind, (self.size - 1) * _bytes(flat), lambda: _all_gather(out, flat, group=self._group))
        return out.to(t.device).view(self.size, *t.shape)

    def exchange(self, t: Tensor, kind: str) -> Tensor:
        """t[r] goes to process r: [size, ...] -> [size, ...], row r from process r."""
        if self.size == 1:
            return t
        given = self._there(t.contiguous())
        out = torch.empty_like(given)
        sent = (self.size - 1) * _bytes(given) // self.size
        self._say(kind, sent, lambda: dist.all_to_all_single(out, given, group=self._group))
        return out.to(t.device)

    def _there(self, t: Tensor) -> Tensor:
        return t.cpu() if self._host else t

    def _say(self, kind: str, sent: int, call: Callable[[], object]) -> None:
        self._entered(kind)
        began = time.perf_counter()
        with collective():
            call()
        self.traffic.seconds[kind] += time.perf_counter() - began
        self.traffic.bytes[kind] += sent
        self.traffic.calls[kind] += 1


@contextmanager
def collective() -> Iterator[None]:
    """Around one. Raises Lost where other processes are the reason, and errors of this one's own GPU as they are."""
    try:
        yield
    except RuntimeError as error:  # which is what torch.distributed raises
        if spoils_the_process(error):
            raise
        raise Lost(one_line(error)) from error


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _all_gather(out: Tensor, t: Tensor, group: Any) -> None:
    # The name that torch 2.13 calls it by; earlier ones have the other alone.
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, t, group=group)


def close(broken: bool = False) -> None:
    """Leaves the group of processes that this one has joined; `broken`: without a word to those who may be gone."""
    with suppress(Exception):  # whatever is left of it goes with the process
        if broken and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
