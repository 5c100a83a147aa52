"""Which attention heads of a maze solver read the list of connections (Spies et al. 2024): from the `;` that ends a
connection back to its two cells, 1 and 3 tokens before. It is of the subject, and the same for all cells.

| metric | `at` a head, `layer.head` |
|---|---|
| `score` | attention of the `;` on both cells, mean over all `;` of held-out mazes |
| `one_back`, `three_back` | on either of them |
| `score_untrained` | of the same subject with random weights |

Without `at`, `score` and `score_untrained` are the largest of any head in the blocks up to the site.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from saescale.storage.source import Source
from saescale.trainers.evals.evaluation import Measurement, Need
from saescale.trainers.evals.intervals import SEED, Estimate, mean_of
from saescale.trainers.evals.mazes.connections import maze_of
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.subjects.drawn import parts_of
from saescale.trainers.subjects.maze.maze import Maze
from saescale.trainers.subjects.maze.tokens import SEMICOLON, prompts
from saescale.trainers.subjects.subject import Subject

needs: frozenset[Need] = frozenset({"labels"})

MAZES, AT_A_TIME = 128, 32
BACK = {"one_back": 1, "three_back": 3}


def prepare(source: Source, subject: Subject | None) -> list[Measurement]:
    """All of it."""
    maze = maze_of(subject)
    found: list[Measurement] = []
    for name, model in (("", maze), ("_untrained", maze.untrained())):
        seen = attention_to_cells(model)
        both: dict[str, Estimate] = {}
        for layer, head in np.ndindex(next(iter(seen.values())).shape[1:]):
            at = f"{layer}.{head}"
            both[at] = mean_of(np.sum([each[:, layer, head] for each in seen.values()], axis=0))
            found.append(Measurement(f"score{name}", *both[at], at=at, n=MAZES, seed=SEED))
            if not name:
                parts = {way: mean_of(each[:, layer, head]) for way, each in seen.items()}
                found += [Measurement(way, *part, at=at, n=MAZES, seed=SEED) for way, part in parts.items()]
        best = max((at for at in both if int(at.split(".")[0]) <= source.site.layer), key=lambda at: both[at].value)
        found.append(Measurement(f"score{name}", *both[best], n=MAZES, seed=SEED))
    return found


def measure(
    trained: Trained, source: Source, subject: Subject | None, prepared: list[Measurement]
) -> Iterator[Measurement]:
    yield from prepared


def attention_to_cells(maze: Maze) -> dict[str, np.ndarray]:
    """The attention of a `;` on the token so far back, mean over those of a maze, float64 [mazes, layers, heads]."""
    found: dict[str, list[Tensor]] = {way: [] for way in BACK}
    for mazes in parts_of(maze.heldout_mazes(MAZES, SEED), AT_A_TIME):
        ids = prompts(mazes)
        ends = torch.nonzero(ids[0] == SEMICOLON)[:, 0]  # the same in all of them
        attention = maze.attention(ids).transpose(0, 1).cpu()  # [mazes, layers, heads, ...]
        for way, back in BACK.items():
            found[way].append(attention[..., ends, ends - back].mean(dim=-1))
    return {way: torch.cat(parts).double().numpy() for way, parts in found.items()}
