"""The tokens in which a model reads mazes, as in Spies et al. (2024):

    <ADJLIST_START> (0,0) <--> (0,1) ; (1,1) <--> (0,1) ; ... <ADJLIST_END> <ORIGIN_START> (0,0) <ORIGIN_END>
    <TARGET_START> (1,1) <TARGET_END> <PATH_START> (0,0) (0,1) (1,1) <PATH_END>

The vocabulary is that of maze-dataset: what is no cell comes first, then the cells row by row.
"""

import torch
from torch import Tensor

from saescale.trainers.subjects.maze.mazes import Mazes

WORDS = (
    "<ADJLIST_START>", "<ADJLIST_END>", "<TARGET_START>", "<TARGET_END>", "<ORIGIN_START>", "<ORIGIN_END>",
    "<PATH_START>", "<PATH_END>", "<-->", ";", "<PADDING>",
)  # fmt: skip
(
    ADJLIST_START, ADJLIST_END, TARGET_START, TARGET_END, ORIGIN_START, ORIGIN_END, PATH_START, PATH_END, CONNECTOR,
    SEMICOLON, PAD,
) = range(len(WORDS))  # fmt: skip
FIRST_CELL = len(WORDS)
PER_CONNECTION = 4


def vocabulary(size: int) -> int:
    return FIRST_CELL + size * size


def prompt_length(connections: int) -> int:
    """Tokens up to <PATH_START>, which is one of them."""
    return PER_CONNECTION * connections + 9


def longest(size: int) -> int:
    """Tokens of a maze that is a tree, with a path through all cells and <PATH_END>."""
    return prompt_length(size * size - 1) + size * size + 1


def prompts(mazes: Mazes) -> Tensor:
    """Everything before the path, int64 [mazes, prompt_length]."""
    number, connections = mazes.listed.shape[:2]
    cells = mazes.listed + FIRST_CELL

    def word(token: int, *more: int) -> Tensor:
        return torch.full((number, *(more or (1,))), token, device=cells.device)

    between = word(CONNECTOR, connections, 1), word(SEMICOLON, connections, 1)
    listed = torch.cat([cells[:, :, :1], between[0], cells[:, :, 1:], between[1]], dim=2).flatten(1)
    origin, target = (cell[:, None] + FIRST_CELL for cell in (mazes.origin, mazes.target))
    return torch.cat(
        [word(ADJLIST_START), listed, word(ADJLIST_END), word(ORIGIN_START), origin, word(ORIGIN_END),
         word(TARGET_START), target, word(TARGET_END), word(PATH_START)], dim=1,
    )  # fmt: skip


def answers(mazes: Mazes) -> Tensor:
    """The path and <PATH_END>, int64 [mazes, cells + 1], PAD behind it."""
    path = torch.nn.functional.pad(mazes.path, (0, 1), value=-1)
    length = (path >= 0).sum(dim=1)
    tokens = torch.where(path >= 0, path + FIRST_CELL, PAD)
    return tokens.scatter(1, length[:, None], PATH_END)
