"""The subject maze: what it reads, its labels held to slow code, its rollouts, and what is none of its models."""

import json
from collections import Counter
from importlib.resources import files
from itertools import combinations, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.store import ActivationStore
from saescale.trainers.evals.labels import heldout_labels
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.retrace import heldout_places
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.maze.labels import KINDS, LABELS, labels_of_tokens
from saescale.trainers.subjects.maze.lattice import lattice, shortest_paths
from saescale.trainers.subjects.maze.maze import Maze, Settings, blank, load
from saescale.trainers.subjects.maze.mazes import mazes_of_split, random_mazes
from saescale.trainers.subjects.maze.tokens import (
    PAD,
    PATH_END,
    SEMICOLON,
    WORDS,
    answers,
    longest,
    prompts,
    vocabulary,
)
from saescale.trainers.subjects.own_model import blank_model, gpt2_config, llama_config
from saescale.trainers.subjects.subject import NO_TARGET, Generates, Learns, ReadsText, Resumes, get_subject
from tests.trainers.subjects.slow_maze import read, ways, words

SIZE = 4
POSITIONS = ("rotary", "learned")


@pytest.fixture(scope="module", params=POSITIONS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as transformers saves it, with weights large enough that it does not always say the same."""
    where = tmp_path_factory.mktemp("models") / str(request.param)
    model = blank(Settings(grid=SIZE, positions=request.param, n_layers=2, d_model=16, n_heads=2), seed=3).model
    for weight in model.parameters():
        weight.data *= 3
    model.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def subject(folder: Path) -> Maze:
    return load(str(folder), Path(), "float32", print)


# --- mazes


@pytest.mark.parametrize("size", [2, 5, 7])
def test_mazes_are_trees_with_the_only_path_from_origin_to_target(size: int) -> None:
    mazes, grid = random_mazes(size, 7, torch.arange(300)), lattice(size)
    for maze in range(300):
        edges = [tuple(ends) for ends in grid.ends[mazes.present[maze]].tolist()]
        joined = list(range(size * size))  # union-find

        def root(cell: int) -> int:
            while joined[cell] != cell:  # noqa: B023
                cell = joined[cell]  # noqa: B023
            return cell

        for a, b in edges:
            assert abs(a // size - b // size) + abs(a % size - b % size) == 1
            assert root(a) != root(b), "a cycle"
            joined[root(a)] = root(b)
        assert len({root(cell) for cell in range(size * size)}) == 1
        assert Counter(tuple(sorted(pair)) for pair in mazes.listed[maze].tolist()) == Counter(edges)
        path = [cell for cell in mazes.path[maze].tolist() if cell >= 0]
        assert ways(size, edges, int(mazes.origin[maze]), int(mazes.target[maze])) == [path]
        assert len(path) > 1


def test_paths_through_mazes_with_cycles_are_shortest_and_cells_may_have_none() -> None:
    grid, draw = lattice(4), torch.Generator().manual_seed(0)
    present = torch.rand(120, grid.n_edges, generator=draw) < 0.6
    origin, target = torch.randint(16, (2, 120), generator=draw)
    found = shortest_paths(grid, present, origin, target)
    without = 0
    for maze in range(120):
        edges = [tuple(ends) for ends in grid.ends[present[maze]].tolist()]
        shortest = ways(4, edges, int(origin[maze]), int(target[maze]))
        path = [cell for cell in found[maze].tolist() if cell >= 0]
        assert path in shortest if shortest else not path
        without += not shortest
    assert 5 < without < 100


def searchable(size: int) -> set[tuple[bool, ...]]:
    """The trees that a depth-first search can find: from some root, of two neighbouring cells one lies on the way to
    the other, or the search would have gone from the first that it came to into the other."""
    ends = [tuple(pair) for pair in lattice(size).ends.tolist()]
    found = set()
    for chosen in combinations(range(len(ends)), size * size - 1):
        edges = [ends[edge] for edge in chosen]
        for root in range(size * size):
            to = [ways(size, edges, root, cell) for cell in range(size * size)]
            if all(to) and all(a in to[b][0] or b in to[a][0] for a, b in ends):
                found.add(tuple(edge in chosen for edge in range(len(ends))))
                break
            if not all(to):
                break
    return found


def test_everything_that_is_drawn_is_uniform_and_a_maze_is_the_same_in_any_company() -> None:
    mazes = random_mazes(3, 1, torch.arange(9_000))
    for cells in (mazes.origin, mazes.target, mazes.listed[:, 0, 0] * 0 + (mazes.target - mazes.origin) % 9):
        seen = np.bincount(cells.numpy(), minlength=9)
        seen = seen[seen > 0]
        assert (abs(seen - 9_000 / len(seen)) < 5 * np.sqrt(9_000 / len(seen))).all()
    assert not (mazes.origin == mazes.target).any()
    first = (mazes.listed[:, 0, 0] < mazes.listed[:, 0, 1]).float().mean()
    assert 0.47 < float(first) < 0.53
    assert {tuple(tree) for tree in mazes.present.tolist()} == searchable(3)
    some = random_mazes(3, 1, torch.tensor([8_000, 17]))
    for part, whole in zip(some, mazes, strict=True):
        assert torch.equal(part, whole[torch.tensor([8_000, 17])])
    other = random_mazes(3, 2, torch.arange(9_000))
    assert not torch.equal(other.present, mazes.present)


def test_no_maze_is_in_both_splits_whatever_the_seeds() -> None:
    trees: dict[str, set[tuple[bool, ...]]] = {"train": set(), "heldout": set()}
    for split in ("train", "heldout"):
        for seed in (1, 2):
            for drawn in islice(mazes_of_split(3, split, seed), 3):  # type: ignore[arg-type]
                trees[split] |= {tuple(tree) for tree in drawn.things.present.tolist()}
    assert not trees["train"] & trees["heldout"]
    assert 0.1 < len(trees["heldout"]) / len(trees["train"] | trees["heldout"]) < 0.4


# --- tokens and labels


def test_tokens_are_those_of_slow_code_and_labels_what_it_reads_from_them() -> None:
    mazes = random_mazes(SIZE, 5, torch.arange(60))
    tokens = torch.cat([prompts(mazes), answers(mazes)], dim=1)
    assert int(tokens.max()) < vocabulary(SIZE)
    assert tokens.shape[1] == longest(SIZE)
    for maze in range(60):
        listed = [tuple(divmod(cell, SIZE) for cell in pair) for pair in mazes.listed[maze].tolist()]
        path = [divmod(cell, SIZE) for cell in mazes.path[maze].tolist() if cell >= 0]
        ends = divmod(int(mazes.origin[maze]), SIZE), divmod(int(mazes.target[maze]), SIZE)
        text = words(listed, *ends, path)
        there = [*WORDS, *(f"({cell // SIZE},{cell % SIZE})" for cell in range(SIZE * SIZE))]
        assert [there[token] for token in tokens[maze] if token != PAD] == text
        found = labels_of_tokens(SIZE, tokens[maze : maze + 1, : len(text)].numpy())
        assert tuple(found) == LABELS
        for place, slow in enumerate(read(SIZE, text)):
            assert set(np.flatnonzero(found["told"][0, place])) == slow.told
            assert set(np.flatnonzero(found["listed"][0, place])) == slow.listed
            assert (found["origin"][0, place], found["target"][0, place]) == (slow.origin, slow.target)
            assert KINDS[found["kind"][0, place]] == slow.kind


def test_what_is_no_maze_has_no_labels() -> None:
    ids = next(iter(prompts(random_mazes(4, 0, torch.arange(1))).numpy()))
    with pytest.raises(SaescaleError, match=r"are not all of mazes of 3x3, which are below 20"):
        labels_of_tokens(3, ids[None])
    broken = ids.copy()
    broken[3] = broken[1]
    with pytest.raises(SaescaleError, match=r"maze 0 is none of 4x4: the `;` at position 4 ends no connection"):
        labels_of_tokens(4, broken[None])


# --- lessons


@pytest.mark.parametrize("positions", POSITIONS)
def test_several_paths_of_a_maze_are_learned_as_if_each_stood_alone(positions: str) -> None:
    shape = {"grid": 3, "positions": positions, "n_layers": 2, "d_model": 16, "n_heads": 2}
    subject = blank(Settings.model_validate(shape | {"paths": 5}), seed=0)
    lessons = list(islice(subject.lessons(seed=4, batch=6, first=0), 2))
    (again,) = islice(subject.lessons(seed=4, batch=6, first=lessons[0].next), 1)
    assert all(torch.equal(one, other) for one, other in zip(lessons[1][:2], again[:2], strict=True))
    (alone,) = islice(blank(Settings.model_validate(shape), seed=0).lessons(seed=4, batch=6, first=0), 1)
    lesson, listed = lessons[0], 4 * 8 + 2
    with torch.no_grad():
        logits = subject.model(**lesson.inputs()).logits
    assert lesson.branch is not None
    ends = set()
    for row, branch in enumerate(lesson.branch):
        edges = {frozenset(pair) for pair in lesson.ids[row, 1 : listed - 1].view(8, 4)[:, ::2].tolist()}
        for number in range(1, 6):
            mine = branch == number
            tail, wanted = lesson.ids[row, mine], lesson.targets[row, mine]
            path = [int(tail[7]), *wanted[7:].tolist()] if len(tail) > 7 else []
            assert tail[7:].tolist() == wanted[6:-1].tolist(), "each token is the target of that before it"
            assert (wanted[:6] == NO_TARGET).all()
            assert (path[0], path[-2], path[-1]) == (int(tail[1]), int(tail[4]), PATH_END)
            assert all(frozenset(step) in edges for step in pairwise(path[:-1]))
            assert len({*path}) == len(path)
            ends.add((row, path[0], path[-2]))
            with torch.no_grad():
                single = subject.model(input_ids=torch.cat([lesson.ids[row, :listed], tail])[None]).logits[0, listed:]
            torch.testing.assert_close(logits[row, mine], single, atol=1e-5, rtol=1e-5)
            if number == 1:
                assert (
                    tail.tolist() == [token for token in alone.ids[row, listed:].tolist() if token != PAD][: len(tail)]
                )
    assert len(ends) > 20
    counted = (lesson.targets != NO_TARGET).sum()
    assert counted == (lesson.targets[lesson.branch > 0] != NO_TARGET).sum()


# --- the model


def test_it_is_what_the_door_asks_for(subject: Maze) -> None:
    for what in (Generates, Resumes, Learns):
        assert isinstance(subject, what)
    assert not isinstance(subject, ReadsText)
    assert (subject.size, subject.n_layers, subject.d_model) == (SIZE, 2, 16)
    ids = torch.from_numpy(np.stack([s.ids[:69] for s in islice(subject.sequences("train", 0), 6)]))
    run = subject.run(ids, [Site(layer=0, positions="all")], logits=True)
    assert run.logits is not None
    assert torch.equal(subject.resume(ids, Site(layer=0, positions="all"), run.resid[0]), run.logits)
    with pytest.raises(SaescaleError, match="has no layer 2: its 2 layers are 0 to 1"):
        subject.run(ids, [Site(layer=2, positions="all")])


def test_rows_are_where_connections_are_told_and_sequences_end_with_the_path(subject: Maze) -> None:
    drawn = next(mazes_of_split(SIZE, "heldout", 4)).things
    for (ids, keep), path in zip(islice(subject.sequences("heldout", 4), 50), drawn.path.tolist(), strict=False):
        assert np.flatnonzero(keep).tolist() == [place for end in range(4, 61, 4) for place in (end - 1, end)]
        assert (ids[keep][1::2] == SEMICOLON).all()
        cells = [cell for cell in path if cell >= 0]
        assert (ids[-len(cells) :] - len(WORDS)).tolist() == cells


def test_rollouts_and_scores_are_those_of_whole_passes(subject: Maze) -> None:
    mazes = subject.heldout_mazes(40, 0)
    ids, wanted = prompts(mazes), answers(mazes)
    site, turned = Site(layer=0, positions="all"), torch.randn(16, generator=torch.Generator().manual_seed(1))

    def patch(stream: torch.Tensor) -> torch.Tensor:
        return stream + (torch.arange(stream.shape[1]) == 20)[None, :, None] * 30 * turned

    for by in ({}, {site: patch}):
        found, slow = subject.rollout(ids, by), ids
        for _ in range(SIZE * SIZE + 1):
            logits = subject.run(slow, [], by, logits=True).logits
            assert logits is not None
            slow = torch.cat([slow, logits[:, -1:].argmax(dim=2)], dim=1)
        for ours, theirs in zip(found.tolist(), slow[:, ids.shape[1] :].tolist(), strict=True):
            end = theirs.index(PATH_END) + 1 if PATH_END in theirs else len(theirs)
            assert ours == theirs[:end] + [PAD] * (len(theirs) - end)
    assert not torch.equal(found, subject.rollout(ids))
    solved = (subject.rollout(ids) == wanted).all(dim=1).float().mean()
    assert subject.score(40)["solved"] == pytest.approx(float(solved))


def test_labels_of_a_store_are_recomputed(folder: Path, tmp_path: Path) -> None:
    spec = HarvestSpec(
        subject=f"maze:{folder}", layer=0, out=str(tmp_path / "store"), tokens=1_500, heldout_tokens=450,
        shard_rows=900, row_group_rows=256, compute_dtype="float32",
    )  # fmt: skip
    harvest(spec)
    store, subject = ActivationStore.open(spec.out), get_subject(f"maze:{folder}", dtype="float32")
    labels, places = heldout_labels(store, subject), heldout_places(store, subject)
    there = [*WORDS, *(f"({cell // SIZE},{cell % SIZE})" for cell in range(SIZE * SIZE))]
    for row in range(0, 450, 29):
        text = [there[token] for token in places.contexts[places.context[row]]]
        slow = read(SIZE, text)[places.pos[row]]
        assert np.flatnonzero(labels["told"][row]).tolist() == [*slow.told]
        assert KINDS[labels["kind"][row]] == slow.kind in ("second", "semicolon")


def test_a_random_one_is_of_the_same_shape_and_always_the_same(folder: Path, subject: Maze) -> None:
    first, second = (get_subject(f"maze-random:{folder}", dtype="float32") for _ in range(2))
    assert first.fingerprint == second.fingerprint != subject.fingerprint
    assert (first.n_layers, first.d_model) == (subject.n_layers, subject.d_model)


def test_the_shipped_one_is_the_one_whose_training_is_noted_and_solves_mazes() -> None:
    shipped = files("saescale.shipped") / "maze-5x5"
    record = json.loads((shipped / "training.json").read_text())
    assert (shipped / "model.safetensors").stat().st_size < 2_000_000  # type: ignore[attr-defined]
    subject = get_subject("maze", dtype="float32")
    assert isinstance(subject, Maze)
    assert (subject.fingerprint, subject.size) == (record["fingerprint"], record["settings"]["grid"])
    found = subject.score(200)["solved"]
    assert found == pytest.approx(record["score"]["solved"], abs=0.12)
    assert found > 0.7
    mazes = subject.heldout_mazes(64, 0)
    rollouts = (subject.rollout(prompts(mazes)) == answers(mazes)).all(dim=1)
    assert float(rollouts.float().mean()) == pytest.approx(subject.score(64)["solved"])
    assert get_subject("maze-random", dtype="float32").score(64)["solved"] == 0  # type: ignore[attr-defined]


def test_what_is_no_model_of_mazes_is_one_line(tmp_path: Path) -> None:
    def said(config: object) -> str:
        where = tmp_path / "model"
        blank_model(config, 0).save_pretrained(where)  # type: ignore[arg-type]
        with pytest.raises(SaescaleError) as error:
            get_subject(f"maze:{where}")
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "has a vocabulary of 33 tokens; mazes have 20 (3x3), 27 (4x4), 36 (5x5)" in said(
        llama_config(33, 99, 1, 8, 2)
    )
    assert "reads at most 77 tokens, and mazes of 5x5 have up to 130" in said(gpt2_config(36, 77, 1, 8, 2))
    with pytest.raises(SaescaleError, match="there is no folder"):
        get_subject(f"maze:{tmp_path}/nowhere")
    with pytest.raises(SaescaleError, match="d_model 6 gives each of 2 heads 3 dimensions"):
        blank(Settings(d_model=6, n_heads=2), 0)
    with pytest.raises(SaescaleError, match="d_model 7 cannot be shared by 2 heads"):
        blank(Settings(d_model=7, n_heads=2, positions="learned"), 0)
