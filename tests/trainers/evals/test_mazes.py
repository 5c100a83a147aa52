"""Evaluations of mazes: latents that are connections, or nothing; edits held to slow code; and all of it on a cell."""

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.architecture import Shape
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.evals.mazes import maze_edits, maze_features
from saescale.trainers.evals.mazes.changes import (
    edits_to_add,
    edits_to_remove,
    few_of_each_edge,
    succeeded,
    told_as_tokens,
)
from saescale.trainers.evals.mazes.connections import PLACES, Told, heldout_connections
from saescale.trainers.evals.mazes.maze_edits import EdgeLatents
from saescale.trainers.evals.mazes.maze_features import at_places, probed
from saescale.trainers.evals.mazes.maze_heads import attention_to_cells
from saescale.trainers.evals.run import evaluate_run
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.maze.lattice import lattice
from saescale.trainers.subjects.maze.maze import Maze, Settings, blank
from saescale.trainers.subjects.maze.mazes import random_mazes
from saescale.trainers.subjects.maze.tokens import FIRST_CELL, PAD, PATH_END, prompts
from saescale.trainers.subjects.own_model import frozen
from saescale.trainers.subjects.subject import get_subject
from saescale.trainers.training.train import PackJob, train_pack
from tests.trainers.subjects.slow_maze import ways

EDGES = lattice(3).n_edges


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Of the first layer of a random model on 3x3."""
    folder = tmp_path_factory.mktemp("mazes")
    blank(Settings(grid=3, n_layers=2, d_model=16, n_heads=2), seed=3).model.save_pretrained(folder / "three")
    spec = HarvestSpec(
        subject=f"maze:{folder}/three", layer=0, out=str(folder / "store"), tokens=2_048, heldout_tokens=1_600,
        shard_rows=2_048, row_group_rows=512, compute_dtype="float32",
    )  # fmt: skip
    harvest(spec)
    return ActivationStore.open(spec.out)


@pytest.fixture(scope="module")
def told(store: ActivationStore) -> dict[str, Told]:
    return heldout_connections(store, get_subject(store.subject, dtype="float32"))


# --- features


def found(told: dict[str, Told], columns: dict[str, np.ndarray]) -> dict[tuple[str, str], float]:
    return {(each.metric, each.at): each.value for each in at_places(told, columns)}


def test_rows_are_of_both_places_and_halves_of_other_mazes(told: dict[str, Told]) -> None:
    second, semicolon = (told[place] for place in PLACES)
    assert len(second.rows) == len(semicolon.rows) == 800
    assert not set(second.rows) & set(semicolon.rows)
    assert (second.edge.sum(axis=1) == 1).all()
    assert not set(second.doc[second.first]) & set(second.doc[~second.first])


def test_latents_that_are_edges_are_found_alone_and_those_that_are_cells_together(told: dict[str, Told]) -> None:
    rng, grid = np.random.default_rng(0), lattice(3)

    def noisy(truth: np.ndarray) -> np.ndarray:
        return np.where(truth, 1 + 0.1 * rng.random(truth.shape), 0).astype(np.float32)

    edges = {place: noisy(each.edge) for place, each in told.items()}
    ends = np.zeros((EDGES, 9), bool)
    ends[np.arange(EDGES)[:, None], grid.ends.numpy()] = True
    cells = {place: noisy(each.edge @ ends) for place, each in told.items()}
    nothing = {place: noisy(rng.random((800, 40)) < 0.1) for place in told}
    of_edges, of_cells, of_nothing = (found(told, columns) for columns in (edges, cells, nothing))
    assert of_edges["edges_found", ""] == of_edges["edges_single", ""] == of_edges["signs", ""] == 1
    assert of_edges["single", "second:(0,0)-(0,1)"] == 1
    assert of_cells["edges_found", ""] == 1
    assert of_cells["edges_single", ""] == 0
    assert 1 < of_cells["signs", ""] <= 2  # of a corner and its neighbour, "this cell and not the other one" is as good
    assert 0.4 < of_cells["single", ""] < 0.9
    assert of_nothing["edges_found", ""] == of_nothing["edges_single", ""] == 0
    assert of_nothing["tree", ""] < 0.3


def test_linear_probes_read_edges_that_directions_have(told: dict[str, Told]) -> None:
    """Twelve directions in sixteen dimensions, so that no coordinate is an edge's, with noise."""
    rng = np.random.default_rng(3)
    mixed = np.linalg.qr(rng.standard_normal((16, 16)))[0][:EDGES]
    x = {place: each.edge @ mixed + 0.15 * rng.standard_normal((len(each.edge), 16)) for place, each in told.items()}
    rows = found(told, {place: probed(told[place], columns) for place, columns in x.items()})
    assert rows["edges_single", ""] == 1
    assert found(told, x)["edges_single", ""] < 0.3
    noise = {place: rng.standard_normal((len(each.edge), 16)) for place, each in told.items()}
    rows = found(told, {place: probed(told[place], columns) for place, columns in noise.items()})
    assert rows["edges_single", ""] == 0


def test_the_place_where_connections_are_told_better_is_that_of_the_cell(told: dict[str, Told]) -> None:
    """Half of the edges have a latent at the semicolon, none at the second cell."""
    truth = told["semicolon"].edge.astype(np.float32)[:, : EDGES // 2]
    rows = found(told, {"second": np.zeros_like(truth), "semicolon": truth})
    assert rows["edges_found", ""] == rows["edges_found", "semicolon"] == 0.5
    assert rows["edges_found", "second"] == 0


def test_an_edge_on_no_row_is_one_line(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saescale.trainers.evals.mazes.connections.ROWS", 40)
    with pytest.raises(SaescaleError, match=r"connections, \(\d,\d\)-\(\d,\d\) the first, are on no held-out row"):
        heldout_connections(store, get_subject(store.subject))

    class Other:
        name = "toy"

    with pytest.raises(SaescaleError, match="measured of the subject maze; toy has none"):
        heldout_connections(store, Other())  # type: ignore[arg-type]


# --- edits


def test_edits_are_those_of_slow_code() -> None:
    mazes, grid = random_mazes(3, 2, torch.arange(40)), lattice(3)
    add, remove = edits_to_add(3, mazes), edits_to_remove(3, mazes)
    expected_add, expected_remove = {}, set()
    for maze in range(40):
        ends = (int(mazes.origin[maze]), int(mazes.target[maze]))
        present = [edge for edge in range(EDGES) if mazes.present[maze, edge]]
        (way,) = ways(3, [tuple(grid.ends[edge].tolist()) for edge in present], *ends)  # type: ignore[misc]
        for edge in set(range(EDGES)) - set(present):
            shorter = ways(3, [tuple(grid.ends[each].tolist()) for each in [*present, edge]], *ends)  # type: ignore[misc]
            if len(shorter[0]) < len(way):
                assert len(shorter) == 1
                expected_add[maze, edge] = shorter[0]
        crossed = {tuple(sorted(step)) for step in pairwise(way)}
        expected_remove |= {(maze, edge) for edge in present if tuple(grid.ends[edge].tolist()) in crossed}
    tokens = {
        (maze, edge): [token - FIRST_CELL for token in wanted if token not in (PAD, PATH_END)]
        for maze, edge, wanted in zip(add.maze.tolist(), add.edge.tolist(), add.wanted.tolist(), strict=True)
    }
    assert tokens == expected_add
    assert set(zip(remove.maze.tolist(), remove.edge.tolist(), strict=True)) == expected_remove
    for maze, edge, place in zip(remove.maze.tolist(), remove.edge.tolist(), remove.place.tolist(), strict=True):
        assert sorted(mazes.listed[maze, place].tolist()) == grid.ends[edge].tolist()
    few = few_of_each_edge(remove, 2)
    assert (
        np.bincount(few.edge, minlength=EDGES).tolist()
        == np.bincount(remove.edge, minlength=EDGES).clip(max=2).tolist()
    )


class Walker(Maze):
    """A model that says nothing but a path that the test gives it."""

    def __init__(self, said: torch.Tensor) -> None:
        self.size, self.said, self.max_positions = 3, said, None
        self.prompts: list[torch.Tensor] = []
        self.streams: list[torch.Tensor] = []

    def rollout(self, prompt: torch.Tensor, patch: object = None) -> torch.Tensor:
        self.prompts.append(prompt)
        if patch:
            (by,) = patch.values()  # type: ignore[attr-defined]
            self.streams.append(by(torch.zeros(*prompt.shape, 4)))
        return self.said


@pytest.mark.parametrize("semicolon", [True, False])
def test_a_success_is_the_wanted_way_or_one_that_never_crosses_the_edge(semicolon: bool) -> None:
    mazes, site = random_mazes(3, 2, torch.arange(60)), Site(layer=0, positions="all")
    add, remove = edits_to_add(3, mazes), edits_to_remove(3, mazes)
    draw = torch.rand(len(add.maze), generator=torch.Generator().manual_seed(0)) < 0.5
    other = add.wanted.clone()
    other[:, 1] = PATH_END
    walker = Walker(torch.where(draw[:, None], add.wanted, other))
    done = succeeded(walker, mazes, site, "add", add, lambda x: x + 1, semicolon)
    assert torch.equal(done, draw)
    changed = walker.streams[0].abs().sum(dim=2).nonzero().tolist()
    assert changed == [[line, 4 * place + (4 if semicolon else 3)] for line, place in enumerate(add.place.tolist())]
    walker = Walker(remove.wanted)  # which crosses it
    assert not succeeded(walker, mazes, site, "remove", remove, lambda x: x, semicolon).any()
    walker = Walker(remove.wanted.roll(1, dims=0))
    done = succeeded(walker, mazes, site, "remove", remove, lambda x: x, semicolon)
    for line, success in enumerate(done.tolist()):
        cells = [token - FIRST_CELL for token in walker.said[line].tolist() if token >= FIRST_CELL]
        ends = lattice(3).ends[remove.edge[line]].tolist()
        assert success == (ends not in [sorted(step) for step in pairwise(cells)])
    assert 0 < done.float().mean() < 1


def test_a_connection_told_as_one_more_stands_behind_that_at_its_place() -> None:
    mazes = random_mazes(3, 2, torch.arange(60))
    add = edits_to_add(3, mazes)
    walker = Walker(add.wanted)
    assert told_as_tokens(walker, mazes, add).all()
    for line, ids in enumerate(walker.prompts[0].tolist()):
        listed = [[ids[place] - FIRST_CELL, ids[place + 2] - FIRST_CELL] for place in range(1, 37, 4)]
        before = mazes.listed[add.maze[line]].tolist()
        at = int(add.place[line]) + 1
        assert listed == [*before[:at], lattice(3).ends[add.edge[line]].tolist(), *before[at:]]


def test_changes_set_latents_of_the_edge_and_random_ones_go_as_far(told: dict[str, Told]) -> None:
    """One latent for each edge whose direction is the mean of the rows that tell it."""
    d_model, n = 16, 2 * EDGES
    draw = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(d_model, d_model, generator=draw))[0]
    directions = torch.nn.functional.normalize(directions - directions.mean(dim=1, keepdim=True), dim=1)[:EDGES]
    W = torch.cat([directions, -directions])
    cell = Cell(store="s", d_model=d_model, n_latents=n, k=1, tokens=64, batch_tokens=64, lr=1e-3, dead_after_tokens=64)
    params = {"W_enc": W, "b_enc": torch.full((n,), -0.01), "W_dec": W.clone(), "b_pre": torch.zeros(d_model)}
    trained = Trained(SAE("topk", Shape(d_model, n), cell.whole_settings, params), cell)
    rows = {
        place: each._replace(act=torch.from_numpy(each.edge).float() @ directions * 7) for place, each in told.items()
    }
    latents = EdgeLatents(trained, rows)
    mazes = random_mazes(3, 2, torch.arange(60))
    add, remove = edits_to_add(3, mazes), edits_to_remove(3, mazes)
    own = lattice(3).edge[mazes.listed[..., 0], mazes.listed[..., 1]]
    x = directions[own[add.maze, add.place]] * 5
    moved = latents.change("add", add)(x)
    mean = trained.encode(directions[:1] * 7).max()
    expected = 5 * mean * directions[add.edge]
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-3)
    x = directions[remove.edge] * 5
    taken = latents.change("remove", remove)(x)
    torch.testing.assert_close(taken, -5 * mean * directions[remove.edge], rtol=1e-3, atol=1e-3)
    random = latents.random_change("remove", remove)(x)
    torch.testing.assert_close(random.norm(dim=1), taken.norm(dim=1))
    assert (torch.nn.functional.cosine_similarity(random, taken).abs() < 0.9).all()


# --- heads, and a cell


def test_heads_that_read_the_list_are_told_by_their_attention(store: ActivationStore) -> None:
    """Of slow code: attention computed from the weights of a model with learned positions."""
    maze = blank(Settings(grid=3, positions="learned", n_layers=1, d_model=16, n_heads=2), seed=1)
    frozen(maze.model)
    seen = attention_to_cells(maze)
    assert seen["one_back"].shape == (128, 1, 2)
    mazes = maze.heldout_mazes(4, 0)
    ids = prompts(mazes)
    block = maze.model.transformer.h[0]
    x = block.ln_1(maze.model.transformer.wte(ids) + maze.model.transformer.wpe(torch.arange(ids.shape[1])))
    q, k, _ = (x @ block.attn.c_attn.weight + block.attn.c_attn.bias).split(16, dim=2)
    for line, head, (way, back) in product(range(4), range(2), {"one_back": 1, "three_back": 3}.items()):
        part = slice(8 * head, 8 * head + 8)
        total = 0.0
        for end in range(4, 33, 4):
            scores = (q[line, end, part] @ k[line, : end + 1, part].T / 8**0.5).softmax(dim=0)
            total += float(scores[end - back]) / 8
        assert seen[way][line, 0, head] == pytest.approx(total, rel=1e-4)


def test_a_trained_cell_is_measured_beside_what_needs_no_sae(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(store=store.identity, d_model=16, n_latents=32, k=4, tokens=2_048, batch_tokens=256, lr=3e-3,
                dead_after_tokens=2_048, ema=0.9, settings={"k_aux": 8})  # fmt: skip
    run = RunDirectory(str(tmp_path / "run"))
    run.write_spec({"name": "mazes", "store": store.url, "resolved": {}})
    spec = EvalSpec(tokens=512, every_tokens=2_048)
    run.write_results(train_pack(PackJob(cells=[cell], store=store.url, run=run.url, sweep="mazes", eval=spec)).results)
    monkeypatch.setattr("saescale.trainers.evals.mazes.maze_edits.MAZES", 96)
    done = evaluate_run(run.url, ["maze_features", "maze_heads", "maze_edits"])
    assert any("solves none of 96 mazes" in line for line in done.why)
    rows = pq.read_table(tmp_path / "run" / "evals.parquet").to_pylist()
    values = {(row["metric"], row["at"]): row for row in rows}
    features = {name for each, of in maze_features.metrics.items() for name in (each, *of.beside)}
    assert {"tree_probe_untrained", "edges_found_channels", "single_always"} <= features
    for name in [*features, "score", "score_untrained"]:
        assert 0 <= values[name, ""]["value"] <= 1
    assert values["tree", ""]["low"] <= values["tree", ""]["value"] <= values["tree", ""]["high"]
    assert len([at for metric, at in values if metric == "tree" and ":" in at]) == 2 * EDGES
    monkeypatch.setattr(Maze, "rollout", lambda self, prompt, patch=None: _right(prompt))
    assert not evaluate_run(run.url, ["maze_edits"]).why
    rows = pq.read_table(tmp_path / "run" / "evals.parquet").to_pylist()
    edits = {(row["metric"], row["at"]): row["value"] for row in rows if row["evaluation"] == "maze_edits"}
    assert edits["solved", ""] == edits["solved_x_hat", ""] == 1
    for name in ("add", "remove", "add_random", "remove_means", "add_gain", "remove_gain", "asymmetry"):
        assert edits[name, ""] == 0, "nothing that is done to its stream changes where this model goes"
    assert edits["add_tokens", ""] == 1
    assert {(name, "") for of in maze_edits.metrics.values() for name in of.beside} <= edits.keys()
    assert len([at for metric, at in edits if metric == "remove"]) == EDGES + 1


def _right(prompt: torch.Tensor) -> torch.Tensor:
    """The shortest paths of the mazes that the prompts tell."""
    said = torch.full((len(prompt), 10), PAD)
    for line, ids in enumerate(prompt.tolist()):
        text = ids[1 : ids.index(1)]
        edges = [(text[i] - FIRST_CELL, text[i + 2] - FIRST_CELL) for i in range(0, len(text), 4)]
        way = ways(3, edges, ids[-6] - FIRST_CELL, ids[-3] - FIRST_CELL)[0]
        said[line, : len(way) + 1] = torch.tensor([*(cell + FIRST_CELL for cell in way), PATH_END])
    return said
