"""`saescale fit --metric` and `saescale plan --metric` on a run whose laws are known."""

import json
from pathlib import Path

import pytest
import yaml

from saescale.scaling.laws.notes import about
from saescale.storage.rundir import RunDirectory
from tests.cluster.command import assert_one_line, saescale_here
from tests.scaling.test_over_metrics import distance, write_run

SPEC = {
    "name": "sim", "store": "stores/none", "out": "runs/sim",
    "grid": {"n_latents": [512, 1024], "k": [8, 16]}, "train": {"tokens": 65536, "batch_tokens": 256},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = write_run(tmp_path_factory.mktemp("run"), noise=0.004)
    run.write_spec(SPEC | {"resolved": {"precision": "fp32"}})
    return run


def test_fit_shows_the_law_of_a_metric(run: RunDirectory, tmp_path: Path) -> None:
    arguments = ("fit", run.url, "--metric", "sim.to_one", "--law", "n_k", "--bootstraps", "60")
    shown = saescale_here(*arguments, "--predict", "n=32768,k=16", "--out", str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert "sim.to_one, higher is better; laws are of 1 - sim.to_one" in shown.stdout
    assert "exponent of n at k = 64" in shown.stdout
    found = json.loads((tmp_path / "fits.json").read_text())
    (row,) = found["predictions"]
    assert row["low"] < 1 - distance(32768, 16) < row["high"]
    assert row["predicts"] == "sim.to_one"
    assert [entry["metric"] for entry in found["metrics"]] == ["sim.to_one"]
    assert [fit["law"] for fit in found["fits"]] == ["n_k"]  # of nmse, as it is without


def test_of_several_metrics_every_line_says_which(run: RunDirectory) -> None:
    names = ("sim.to_one", "sim.falling")
    asked = [word for name in names for word in ("--metric", name)]
    shown = saescale_here("fit", run.url, *asked, "--law", "n_k", "--bootstraps", "0", "--predict", "n=32768,k=16")
    assert shown.returncode == 0, shown.stderr
    said = shown.stdout.splitlines()
    for name in names:
        assert any(line.startswith(f"{name}: n_k ") for line in said)  # of what is predicted
    assert about("a.b", "a.b does not get better") == "a.b does not get better"
    assert about("a.b", "n_k: few points") == "a.b: n_k: few points"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "RUN", "--metric", "falling"), "did you mean sim.falling?"),
        (("fit", "RUN", "--metric", "sim.original", "--law", "n_k"), "no law of sim.original could be fitted: "),
        (("plan", "RUN", "--metric", "sim.fallin", "--reach", "0.1"), "did you mean sim.falling?"),
        (("plan", "RUN", "--metric", "sim.falling", "--within", "1%"), "give --reach"),
        (("plan", "RUN", "--metric", "sim.falling"), "--metric takes what to reach"),
        (("plan", "RUN", "--metric", "sim.to_one", "--within", "1"), "--within 1 is no share"),
        (("plan", "RUN", "--within", "1%"), "--within and --reach are of a metric"),
        (("plan", "RUN", "--metric", "sim.to_one", "--within", "1%", "--reach", "0.9"), "give one of them"),
        (("plan", "--metric", "sim.to_one", "--within", "1%"), "name the run"),
        (("plan", "RUN", "--metric", "sim.falling", "--reach", "1e-9"), "no N up to"),
    ],
)
def test_mistakes_are_one_line(run: RunDirectory, arguments: tuple[str, ...], message: str) -> None:
    named = [run.url if argument == "RUN" else argument for argument in arguments]
    few = ("--bootstraps", "0") if arguments[0] == "fit" else ()
    result = saescale_here(*named, *few)
    assert_one_line(result)
    assert message in result.stderr


def test_plan_says_what_reaches_a_value_for_the_least_compute(run: RunDirectory, tmp_path: Path) -> None:
    arguments = (
        "plan",
        run.url,
        "--metric",
        "sim.to_other",
        "--within",
        "5%",
        "--gpu",
        "cpu",
        "--k",
        "32",
        "--k",
        "64",
    )
    file = tmp_path / "more.yaml"
    shown = saescale_here(*arguments, "--json", "--write", str(file))
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["reach"] == "sim.to_other at most 3.36"  # 1.05 times what its limit, 3.2, says
    there = {way["k"]: way for way in found["ways"]}
    for k in (32, 64):
        n = there[k]["n_latents"]
        assert distance(n, k) == pytest.approx(0.16, rel=0.02)
        assert there[k]["sure"] > n
    assert found["best"] == min(there.values(), key=lambda way: way["flops"])
    grid = yaml.safe_load(file.read_text())["grid"]["cells"]
    assert grid == [{"n_latents": found["surest"]["sure"], "k": found["surest"]["k"], "seed": 0}]
    words = saescale_here(*arguments)
    assert words.returncode == 0
    assert f"Least compute by the law: n = {found['best']['n_latents']:,}, k = {found['best']['k']}" in words.stdout
