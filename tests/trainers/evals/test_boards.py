"""Evaluations of boards: probes and latents that know the board, or nothing, and the two on a trained cell."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from saescale.scaling.figures.boards import draw_boards
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.evals.boards.board_probe import probe, read_boards
from saescale.trainers.evals.boards.board_recovery import BESIDE, properties, reconstruct, recovered
from saescale.trainers.evals.boards.boards import Boards, heldout_boards
from saescale.trainers.evals.boards.detectors import Active, active_of_neurons
from saescale.trainers.evals.boards.picture import boards_of_cell, seen
from saescale.trainers.evals.evaluation import Measurement
from saescale.trainers.evals.run import evaluate_run
from saescale.trainers.evals.streams import streams_of_rows
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.othello.labels import MINE, TILES, YOURS
from saescale.trainers.subjects.othello.othello import Othello
from saescale.trainers.subjects.othello.weights import board_config
from saescale.trainers.subjects.own_model import blank_model
from saescale.trainers.subjects.subject import get_subject
from saescale.trainers.training.train import PackJob, train_pack

ROWS = 2_000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Of the second layer of a random model on 6x6."""
    folder = tmp_path_factory.mktemp("boards")
    blank_model(board_config(6, 2, 24, 3), seed=3).save_pretrained(folder / "six")
    spec = HarvestSpec(
        subject=f"othello:{folder}/six", layer=1, out=str(folder / "store"), tokens=4_096, heldout_tokens=ROWS,
        shard_rows=4_096, row_group_rows=512, compute_dtype="float32",
    )  # fmt: skip
    harvest(spec)
    return ActivationStore.open(spec.out)


@pytest.fixture(scope="module")
def subject(store: ActivationStore) -> Othello:
    found = get_subject(store.subject, dtype="float32")
    assert isinstance(found, Othello)
    return found


@pytest.fixture(scope="module")
def boards(store: ActivationStore, subject: Othello) -> Boards:
    return heldout_boards(store, subject)


def test_halves_are_of_other_games_and_regions_are_the_board(boards: Boards) -> None:
    assert not set(boards.doc[boards.first]) & set(boards.doc[~boards.first])
    assert 0.4 < boards.first.mean() < 0.6
    corner, edge, inside = (part.reshape(6, 6) for part in boards.regions().values())
    assert corner.sum() == 4
    assert corner[0, 0]
    assert edge.sum() == 16
    assert edge[0, 1]
    assert inside[1:5, 1:5].all()
    assert (corner ^ edge ^ inside).all()


def test_streams_of_rows_are_those_that_were_harvested(
    store: ActivationStore, subject: Othello, boards: Boards
) -> None:
    again = streams_of_rows(store, subject, subject, ROWS)
    torch.testing.assert_close(again, boards.act.float(), rtol=2e-3, atol=2e-3)


def test_a_probe_of_the_board_itself_is_right_everywhere_and_one_of_nothing_says_what_is_frequent(
    boards: Boards,
) -> None:
    after = torch.from_numpy(boards.labels["tile_after"]).long()
    exact = probe(boards, torch.nn.functional.one_hot(after, 3).flatten(1).float())
    for at in ("", "corner", "edge", "inside", "changed"):
        assert exact[at].value == pytest.approx(1)
    assert 0.5 < exact["before"].value < 1
    nothing = probe(boards, torch.empty(ROWS, 0))
    right = []
    for square in range(36):
        tiles = boards.labels["tile_after"][:, square]
        frequent = np.bincount(tiles[boards.first], minlength=3).argmax()
        right.append(np.mean(tiles[~boards.first] == frequent))
    assert nothing[""].value == pytest.approx(np.mean(right))
    corner = [right[square] for square in (0, 5, 30, 35)]
    assert nothing["corner"].value == pytest.approx(np.mean(corner))
    noise = probe(boards, torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(0)))
    assert abs(noise[""].value - nothing[""].value) < 0.04  # it fits noise
    assert noise[""].low is not None
    assert nothing["changed"].value < nothing[""].value


def planted(truth: np.ndarray) -> Active:
    """Latents that are active, with any value, where a truth holds: bool [rows, latents]."""
    latent, row = np.nonzero(truth.T)
    value = np.random.default_rng(0).random(len(row)).astype(np.float32) / 100 + 1
    order = np.lexsort((value, latent))
    return Active(latent[order], row[order], value[order], truth.shape[1], len(truth))


def values(found: list[Measurement]) -> dict[tuple[str, str], float]:
    return {(each.metric, each.at): each.value for each in found}


def test_latents_that_are_the_board_recover_it_all(boards: Boards) -> None:
    after = [boards.labels["tile_after"] == tile for tile in (MINE, YOURS)]
    found = values(list(recovered(boards, planted(np.concatenate(after, axis=1)))))
    assert found["coverage", ""] == pytest.approx(1)
    assert found["reconstruction", ""] == pytest.approx(1)
    assert found["reconstruction_signs", ""] >= 72
    before = [boards.labels["tile_before"] == tile for tile in range(3)]
    found = values(list(recovered(boards, planted(np.concatenate(before, axis=1)))))
    assert found["tiles_told", ""] == 1
    assert found["tile_pairs", ""] >= 32 * 3
    assert found["tile_pairs", ""] == sum(found["tile_pairs", name] for name in TILES)
    stable = boards.labels["stable_strict_before"]
    found = values(list(recovered(boards, planted(stable))))
    assert found["stable_pairs", "strict"] >= stable.any(axis=0).sum() > 4


def test_half_of_the_board_is_recovered_by_latents_of_half_of_it(boards: Boards) -> None:
    """Only squares of "mine": every prediction is right, and as many are missed as are "yours"."""
    mine, yours = (boards.labels["tile_after"] == tile for tile in (MINE, YOURS))
    found = values(list(recovered(boards, planted(mine))))
    second = ~boards.first
    assert found["reconstruction", ""] == pytest.approx(
        2 * mine[second].sum() / (2 * mine[second].sum() + yours[second].sum()), rel=0.02
    )
    assert 0.5 < found["coverage", ""] < 1


def test_nothing_of_a_reconstruction_is_chosen_where_it_is_measured(boards: Boards) -> None:
    """A latent for each property: large half of the time that it holds, else small. On the second half it is small as
    well where it does not hold: a threshold would be better there, and is worse on the first half."""
    holds = properties(boards)
    large = np.random.default_rng(0).random(holds.shape) < 0.5
    dense = np.where(holds, np.where(large, 1.0, 0.05), np.where(boards.first[:, None], 0, 0.05))
    found = reconstruct(boards, active_of_neurons(torch.from_numpy(dense)))
    assert found.tau == 0
    assert found.said.all()
    assert len(found.said) == (~boards.first).sum()


def test_latents_that_know_nothing_recover_little(boards: Boards) -> None:
    noise = np.random.default_rng(1).random((ROWS, 40)) < 0.1
    found = values(list(recovered(boards, planted(noise))))
    assert found["tiles_told", ""] < 0.1
    assert found["coverage", ""] < 0.35


def test_a_trained_cell_is_measured_beside_what_needs_no_sae(store: ActivationStore, tmp_path: Path) -> None:
    cells = [
        Cell(store=store.identity, d_model=24, n_latents=n, k=4, tokens=4_096, batch_tokens=256, lr=3e-3,
             dead_after_tokens=2_048, ema=0.9, settings={"k_aux": 8}) for n in (32, 96)
    ]  # fmt: skip
    run = RunDirectory(str(tmp_path / "run"))
    run.write_spec({"name": "boards", "store": store.url, "resolved": {}})
    spec = EvalSpec(tokens=512, every_tokens=2_048)
    done = train_pack(PackJob(cells=cells, store=store.url, run=run.url, sweep="boards", eval=spec))
    run.write_results(done.results)
    evaluate_run(run.url, ["board_probe", "board_recovery"])
    rows = pq.read_table(tmp_path / "run" / "evals.parquet").to_pylist()
    found = {(row["cell_id"], row["metric"], row["at"]): row for row in rows}
    first, second = (cell.cell_id for cell in cells)
    for metric in ("accuracy", "accuracy_untrained", "majority"):  # the same for all cells
        assert found[first, metric, ""]["value"] == found[second, metric, ""]["value"]
    for cell in (first, second):
        shares = [found[cell, name, ""] for name in ("accuracy", "accuracy_x_hat", "tiles_told", "coverage")]
        beside = [f"{name}_{other}" for name in ("coverage", "reconstruction", "tiles_told") for other in BESIDE]
        shares += [found[cell, name, ""] for name in beside]
        assert all(0 <= row["value"] <= 1 and row["n"] > 500 for row in shares)
        majority, x_hat, x = (found[cell, name, ""]["value"] for name in ("majority", "accuracy_x_hat", "accuracy"))
        assert majority - 0.05 < x_hat < x + 0.02
        assert found[cell, "coverage", ""]["value"] > 0.1
        low, value, high = (found[cell, "reconstruction", ""][name] for name in ("low", "value", "high"))
        assert all(one <= other for one, other in pairwise((low, value, high)))
    picture = boards_of_cell(run.cell_url(second), 4)
    assert picture.true.shape == (4, 36)
    with pytest.raises(SaescaleError, match=r"is no cell of a run; give RUN/cells/CELL"):
        boards_of_cell(run.url, 4)
    with pytest.raises(SaescaleError, match=f"has no finished cell {second[:-2]}; did you mean {second}"):
        boards_of_cell(run.cell_url(second[:-2]), 4)
    always = found[first, "coverage_always", ""]["value"]
    boards = heldout_boards(store, get_subject(store.subject))
    constant = values(list(recovered(boards, planted(np.ones((ROWS, 1), bool)))))
    assert always == pytest.approx(constant["coverage", ""])


def test_a_subject_without_boards_is_one_line(store: ActivationStore) -> None:
    class Other:
        name = "toy"

    with pytest.raises(SaescaleError, match="measured of the subject othello; toy has none"):
        heldout_boards(store, Other())  # type: ignore[arg-type]


def test_boards_are_seen_as_latents_say(boards: Boards) -> None:
    mine, yours = (boards.labels["tile_after"] == tile for tile in (MINE, YOURS))
    after = torch.from_numpy(boards.labels["tile_after"]).long()
    probed = read_boards(boards, torch.nn.functional.one_hot(after, 3).flatten(1).float())["after"]
    found = seen(boards, probed, reconstruct(boards, planted(np.concatenate([mine, yours], axis=1))), 5)
    assert found.size == 6
    assert np.array_equal(found.mine, found.true == MINE)
    assert np.array_equal(found.yours, found.true == YOURS)
    assert np.array_equal(found.probed, found.true)
    assert list(found.moves) == sorted(set(found.moves))
    assert np.array_equal(found.moves, (found.true != 0).sum(axis=1) - 4)
    # No two of a game, and none of those in which signs were looked for.
    second = boards.labels["tile_after"][~boards.first]
    games = [boards.doc[~boards.first][(second == board).all(axis=1)][0] for board in found.true]
    assert len(set(games)) == 5


def test_wrong_discs_are_ringed_and_missing_ones_are_dots() -> None:
    nothing = np.zeros((1, 36), bool)
    board = nothing.copy()
    board[0, [7, 8]] = True

    def drawn(said: np.ndarray) -> str:
        return draw_boards(6, [(board, nothing), (said, nothing)], ["one"], "key")["svg"].decode()

    ring, right, wrong = "#c44e00", drawn(board), drawn(np.arange(36)[None] == 0)
    assert ring not in right
    assert wrong.count(ring) == 1
    # Two discs on either board, against two, one and two dots for what is missing.
    assert right.count("fill: #1c2024") + 1 == wrong.count("fill: #1c2024")
