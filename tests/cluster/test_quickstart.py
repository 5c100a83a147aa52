"""The quickstart of Othello as a user runs it, from the shipped weights to a picture of boards."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

from saescale.cluster.front.board_picture import METRICS
from tests.cluster.command import assert_one_line, saescale_here


@pytest.mark.slow
def test_from_shipped_weights_to_a_picture_of_boards(
    three_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = saescale_here("quickstart", "--subject", "othello", "--tiny", "--wandb", "off")
    assert result.returncode == 0, result.stderr
    run = Path("runs") / "quickstart-othello-tiny"
    metric = METRICS[0]
    assert f"{metric}, higher is better; laws are of (1 - {metric}) / {metric}" in result.stdout
    assert f"{run}/figures/boards.png" in result.stdout
    assert (run / "figures" / f"metric_against_k-{metric}.png").exists()
    rows = pq.read_table(run / "evals.parquet").to_pylist()
    recovered = {row["cell_id"]: row["value"] for row in rows if f"{row['evaluation']}.{row['metric']}" == metric}
    assert len(recovered) == 4
    # It is of the best cell, and the same is drawn of any.
    drawn = "subject", "boards", f"{run}/cells/{max(recovered, key=lambda cell: recovered[cell])}"
    again = saescale_here(*drawn, "--out", "again.png")
    assert again.returncode == 0, again.stderr
    first, second = imread(run / "figures" / "boards.png"), imread("again.png")
    assert first.shape == second.shape
    assert first.std() > 0.1
    assert (first != second).mean() < 0.01  # a disc, where another number of threads rounds otherwise
    assert_one_line(saescale_here(*drawn, "--out", "again.gif"), "a picture ends in .png, .svg or .pdf")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    # The run names its store from where it was made.
    assert_one_line(saescale_here(*drawn[:2], f"{tmp_path}/{drawn[2]}"), "stores/othello-l2-tiny")
