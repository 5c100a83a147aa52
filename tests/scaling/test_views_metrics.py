"""Which metrics have figures, and what these show."""

from pathlib import Path

import numpy as np

from saescale.scaling.figures import paper
from saescale.scaling.figures.interactive import plot
from saescale.scaling.figures.views import Points
from saescale.scaling.figures.views_metrics import leading, metric_against_n, metric_against_nmse
from saescale.scaling.laws.fit import fit_laws
from saescale.scaling.laws.over_metrics import fit_metrics
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.metrics import Metric, document
from saescale.scaling.sources import load_sources
from tests.scaling.test_over_metrics import write_run


def test_of_each_evaluation_the_first_metric_and_the_downstream_loss_first(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for row in run.read_results().to_pylist():
        for name in ("downstream_loss", "absorption"):
            own = [{"metric": metric, "value": row["nmse"] * 2} for metric in ("kl", "ce")]
            run.write_evals(row["cell_id"], name, own, document(name, {"kl": Metric("lower"), "ce": Metric("lower")}))
    results, _ = load_sources([run.url])
    few = FitSettings(0, laws=("n_k",))
    names = ["absorption.kl", "absorption.ce", "downstream_loss.kl", "sim.falling", "sim.share"]
    metrics = fit_metrics(fit_laws(results, None, few), run.read_evals(), names, few)
    shown = leading(metrics)
    assert [laws.name for laws in shown] == ["downstream_loss.kl", "absorption.kl", "sim.falling"]

    share = metrics[-1]
    of_n, of_nmse = metric_against_n(share), metric_against_nmse(share)
    assert (of_n.name, of_nmse.name) == ("metric_against_n-sim.share", "metric_against_nmse-sim.share")
    assert of_n.y.label == of_nmse.y.label == "(1 - sim.share) / sim.share"
    nmse = dict(zip(results["cell_id"].tolist(), results["nmse"].tolist(), strict=True))
    points = [layer for layer in of_nmse.layers if isinstance(layer, Points)]
    assert [layer.level for layer in points] == [8, 16, 32, 64]
    np.testing.assert_allclose(points[1].x, sorted(nmse[cell] for cell in nmse if cell.endswith("x16")))
    assert points[0].texts[0].startswith("N = 16,384, k = 8<br>nmse 0.")
    assert "sim.share 0." in points[0].texts[0]
    for view in (of_n, of_nmse):
        assert paper.draw(view)["png"][:4] == b"\x89PNG"
        assert plot(view)["data"]
