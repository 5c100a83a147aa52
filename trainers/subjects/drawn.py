"""What is drawn by its number and never ends (mazes, games, repeated tokens): that of one split, and its first few."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from saescale.storage.manifest import Split
from saescale.trainers.subjects.hashed import in_split

# Some things of a kind: a NamedTuple of tensors [things, ...].
Things = TypeVar("Things", bound=tuple[Tensor, ...])


class Drawn(NamedTuple, Generic[Things]):
    """Things of one split, and their numbers, int64 [things], ascending."""

    numbers: Tensor
    things: Things


def those(things: Things, which: Tensor) -> Things:
    """Some of them, by their places or bool [things]."""
    kind: Any = type(things)
    some: Things = kind(*(part[which] for part in things))
    return some


def draw_split(
    draw: Callable[[Tensor], Things],
    decides: Callable[[Things], Tensor],
    split: Split,
    first: int,
    device: torch.device | str,
    at_a_time: Mapping[str, int],
) -> Iterator[Drawn[Things]]:
    """The things of a split from number `first` on, without end.

    `draw` makes those of the numbers int64 [things]; what `decides` gives of them, integers [things, columns], says in
    which split each is. `at_a_time`: how many numbers are drawn at once, by the kind of device.
    """
    step = at_a_time.get(torch.device(device).type, at_a_time["cpu"])
    while True:
        numbers = torch.arange(first, first + step, device=device)
        things = draw(numbers)
        wanted = in_split(decides(things), split)
        yield Drawn(numbers[wanted], those(things, wanted))
        first += step


def parts_of(things: Things, at_a_time: int) -> Iterator[Things]:
    """All of them, so many at a time."""
    return (those(things, some) for some in torch.arange(len(things[0])).split(at_a_time))


def first_of(drawn: Iterator[Drawn[Things]], number: int) -> Things:
    """The first `number` of what is drawn."""
    found: list[Things] = []
    while sum(len(each[0]) for each in found) < number:
        found.append(next(drawn).things)
    kind: Any = type(found[0])
    everything: Things = kind(*map(torch.cat, zip(*found, strict=True)))
    return those(everything, torch.arange(number))
