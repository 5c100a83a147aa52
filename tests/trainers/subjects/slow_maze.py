"""Mazes as one would explain them: words one after the other, ways found by walking, nothing at once."""

from dataclasses import dataclass, field

Cell = tuple[int, int]


def words(connections: list[tuple[Cell, Cell]], origin: Cell, target: Cell, path: list[Cell]) -> list[str]:
    """The whole text of a maze (Spies et al. 2024)."""

    def named(cell: Cell) -> str:
        return f"({cell[0]},{cell[1]})"

    text = ["<ADJLIST_START>"]
    for first, second in connections:
        text += [named(first), "<-->", named(second), ";"]
    text += ["<ADJLIST_END>", "<ORIGIN_START>", named(origin), "<ORIGIN_END>"]
    text += ["<TARGET_START>", named(target), "<TARGET_END>", "<PATH_START>"]
    return [*text, *map(named, path), "<PATH_END>"]


def ways(size: int, edges: list[tuple[int, int]], origin: int, target: int) -> list[list[int]]:
    """All shortest ways from origin to target, by walking one step further at a time."""
    walks, seen = [[origin]], {origin}
    while walks and not any(walk[-1] == target for walk in walks):
        longer = []
        for walk in walks:
            for a, b in edges:
                for here, there in ((a, b), (b, a)):
                    if here == walk[-1] and there not in seen:
                        longer.append([*walk, there])
        walks, seen = longer, seen | {walk[-1] for walk in longer}
    return [walk for walk in walks if walk[-1] == target]


@dataclass
class Read:
    """What is known at a word."""

    kind: str
    told: set[int] = field(default_factory=set)
    listed: set[int] = field(default_factory=set)
    origin: int = -1
    target: int = -1


def read(size: int, text: list[str]) -> list[Read]:
    """Word after word; edges are numbered by the first of their cells, that to the right before that below."""
    numbers: dict[frozenset[int], int] = {}
    for row in range(size):
        for column in range(size):
            if column + 1 < size:
                numbers[frozenset({row * size + column, row * size + column + 1})] = len(numbers)
            if row + 1 < size:
                numbers[frozenset({row * size + column, (row + 1) * size + column})] = len(numbers)
    found: list[Read] = []
    listed: set[int] = set()
    origin = target = -1
    part = "connections"
    for place, word in enumerate(text):
        told: set[int] = set()
        kind = "marker"
        cell = int(word[1]) * size + int(word[3]) if word[0] == "(" else -1
        if part == "connections" and text[place - 1] == "<-->":
            pair = (text[place - 2], word)
            told = {numbers[frozenset(int(w[1]) * size + int(w[3]) for w in pair)]}
            listed = listed | told
        if word == "<-->":
            kind = "connector"
        elif word == ";":
            kind, told = "semicolon", found[-1].told
        elif cell >= 0 and part == "origin":
            kind, origin = "origin", cell
        elif cell >= 0 and part == "target":
            kind, target = "target", cell
        elif cell >= 0 and part == "path":
            kind = "path"
        elif cell >= 0:
            kind = "second" if text[place - 1] == "<-->" else "first"
        part = {"<ORIGIN_START>": "origin", "<TARGET_START>": "target", "<PATH_START>": "path"}.get(word, part)
        found.append(Read(kind, told, set(listed), origin, target))
    return found
