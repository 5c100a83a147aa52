"""The quickstart of Othello as a user runs it, from the shipped weights to a picture of boards."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

from saescale.cluster.front.board_picture import METRICS
from saescale.storage.rundir import RunDirectory
from tests.cluster.command import saescale, saescale_here


@pytest.mark.slow
def test_from_shipped_weights_to_a_picture_of_boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = saescale("quickstart", "--subject", "othello", "--tiny", "--wandb", "off", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "quickstart-othello-tiny"
    metric = METRICS[0]
    assert f"{metric}, higher is better; laws are of (1 - {metric}) / {metric}" in result.stdout
    assert "runs/quickstart-othello-tiny/figures/boards.png" in result.stdout
    picture = (run / "figures" / "boards.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    rows = pq.read_table(run / "evals.parquet").to_pylist()
    assert len({row["cell_id"] for row in rows if f"{row['evaluation']}.{row['metric']}" == metric}) == 4
    assert (run / "figures" / f"metric_against_k-{metric}.png").exists()
    # The picture stays when the report is made again, and the same is drawn of any cell.
    best = max((row for row in rows if row["metric"] == "reconstruction"), key=lambda row: row["value"])["cell_id"]
    drawn = "subject", "boards", RunDirectory(str(run)).cell_url(best), "--out", str(tmp_path / "a.png")
    elsewhere = saescale_here(*drawn)
    assert elsewhere.returncode == 2
    assert "stores/othello-l2-tiny" in elsewhere.stderr  # which the run names from where it was made
    monkeypatch.chdir(tmp_path)
    assert saescale_here("report", str(run), "--bootstraps", "0").returncode == 0
    assert (run / "figures" / "boards.png").read_bytes() == picture
    again = saescale_here(*drawn)
    assert again.returncode == 0, again.stderr
    # A disc may differ where another number of threads rounds otherwise.
    ours, theirs = imread(tmp_path / "a.png"), imread(run / "figures" / "boards.png")
    assert ours.shape == theirs.shape
    assert (ours != theirs).mean() < 0.01
    other = saescale_here(*drawn[:-1], "a.gif")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "a picture ends in .png, .svg or .pdf" in other.stderr
