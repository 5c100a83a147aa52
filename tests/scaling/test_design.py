"""Plans keep their budget and narrow what they promise, in simulated sweeps as in their own figures."""

import numpy as np
import pytest
from scipy.stats import t

from saescale.scaling.compute import topk_flops
from saescale.scaling.laws.estimate import fit_law
from saescale.scaling.laws.forms.n_k import GPT4, N_K
from saescale.scaling.laws.settings import FitSettings
from saescale.scaling.planning.design import Candidates, Design, best_rectangle, candidates, expected, propose, wanted
from saescale.scaling.planning.devices import Work, as_measured, find_device
from saescale.scaling.tables import Table
from saescale.storage.errors import SaescaleError

NOISE = 0.005
KS = [8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
NONE = {"n_latents": np.empty(0), "k": np.empty(0)}
RAW = N_K.to_raw(GPT4)


@pytest.fixture(scope="module")
def cells() -> Candidates:
    """n from 1,024 to 262,144 at d_model 768 on an H100, with tokens that grow as n^0.6."""
    n, k = (v.ravel() for v in np.meshgrid(2.0 ** np.arange(10, 19), np.array(KS), indexing="ij"))
    tokens = 1e9 * (n / 32768) ** 0.6
    device = find_device("h100", 2e14)
    hours = [
        device.seconds(Work(topk_flops(768, int(a), tokens=1, selected=int(b) + 256).sparse * d)) / 3600
        for a, b, d in zip(n, k, tokens, strict=True)
    ]
    return candidates(N_K, RAW[None], n, k, np.array(hours), NOISE)


def simulated_errors(cells: Candidates, design: Design, sweeps: int) -> tuple[np.ndarray, np.ndarray]:
    """(errors, interval widths) of the exponents of n at each k [sweeps, ks] over simulated sweeps of a design."""
    own = np.repeat(np.arange(len(design.counts)), design.counts)
    columns = {"n_latents": cells.n_latents[own], "k": cells.k[own]}
    truth = N_K.log_value(RAW, columns)
    errors, widths = [], []
    for seed in range(sweeps):
        nmse = np.exp(truth + NOISE * np.random.default_rng(seed).standard_normal(len(own)))
        fit = fit_law(N_K, columns, nmse, FitSettings(200, seed=seed), agree=False)
        found = [fit.exponent("n_latents", {"k": k}) for k in KS]
        errors.append(
            [f["value"] - N_K.exponent_of(RAW, "n_latents", {"k": k}) for f, k in zip(found, KS, strict=True)]
        )
        widths.append([f["high"] - f["low"] for f in found])
    return np.array(errors), np.array(widths)


def test_narrower_than_the_best_full_grid_of_the_same_cost(cells: Candidates) -> None:
    goal = wanted("exponent", N_K, cells.raw, KS, {})
    plan, grid = propose(cells, goal, 0.5, NONE), best_rectangle(cells, goal, 0.5, NONE)
    assert grid is not None
    assert 0.9 * plan.hours <= grid.hours <= 0.5
    errors, widths = simulated_errors(cells, plan, 16)
    grid_errors, grid_widths = simulated_errors(cells, grid, 16)
    assert np.median(widths) < 0.9 * np.median(grid_widths)
    assert np.sqrt(np.mean(errors**2)) < np.sqrt(np.mean(grid_errors**2))
    # What the plan promises is what its sweeps have.
    np.testing.assert_allclose(np.median(widths, axis=0) / 2, plan.half_width, rtol=0.35)


@pytest.mark.parametrize("target", ["exponent", "floor", "prediction", "coefficients"])
def test_every_target_gains_over_the_full_grid_within_the_budget(cells: Candidates, target: str) -> None:
    at = {"n_latents": 2.0**20, "k": 64.0} if target == "prediction" else {}
    goal = wanted(target, N_K, cells.raw, KS, at)  # type: ignore[arg-type]
    plan, grid = propose(cells, goal, 1.0, NONE), best_rectangle(cells, goal, 1.0, NONE)
    assert grid is not None
    assert plan.hours <= 1.0
    assert plan.counts.max() <= 3
    assert plan.objective < grid.objective
    assert len({*cells.n_latents[plan.counts > 0]}) >= 3
    assert len({*cells.k[plan.counts > 0]}) >= 3


def test_cells_that_are_there_count(cells: Candidates) -> None:
    n, k = (v.ravel() for v in np.meshgrid(2.0 ** np.arange(10, 14), np.array(KS), indexing="ij"))
    goal = wanted("exponent", N_K, cells.raw, KS, {"k": 8.0})
    there = {"n_latents": np.tile(n, 3), "k": np.tile(k, 3)}
    beside, alone = propose(cells, goal, 0.3, there), propose(cells, goal, 0.3, NONE)
    assert beside.half_width[0] < alone.half_width[0]
    # Small cells are there already: the budget goes to larger ones.
    large = cells.n_latents >= 2**14
    assert beside.counts[large] @ cells.hours[large] > 0.8 * beside.hours


def test_more_budget_narrows_more(cells: Candidates) -> None:
    goal = wanted("floor", N_K, cells.raw, KS, {})
    objectives = [propose(cells, goal, hours, NONE).objective for hours in (0.1, 0.5, 2.0)]
    assert objectives == sorted(objectives, reverse=True)


def test_what_cannot_be_planned(cells: Candidates) -> None:
    goal = wanted("exponent", N_K, cells.raw, KS, {})
    with pytest.raises(SaescaleError, match=r"0\.001 hours are too few for a law: it takes 8 cells"):
        propose(cells, goal, 0.001, NONE)
    with pytest.raises(SaescaleError, match="add --at n=65536,k=64"):
        wanted("prediction", N_K, cells.raw, KS, {"k": 8.0})
    with pytest.raises(SaescaleError, match="unknown device h10; did you mean h100"):
        find_device("h10")
    with pytest.raises(SaescaleError, match="must be positive"):
        find_device("cpu", -1.0)
    assert find_device("H100", 1e12).seconds(Work(3e15, 6e14)) == 3600.0


def test_the_value_of_a_target_is_the_laws(cells: Candidates) -> None:
    at = {"n_latents": 65_536.0, "k": 64.0}
    goal = wanted("prediction", N_K, cells.raw, KS, at)
    truth = N_K.log_value(RAW, {name: np.array([value]) for name, value in at.items()})
    np.testing.assert_allclose(propose(cells, goal, 0.5, NONE).value, truth, rtol=1e-12)
    # Its rows are its derivatives.
    steps = 1e-6 * np.eye(len(RAW))
    moved = [N_K.log_value(RAW + step, {name: np.array([v]) for name, v in at.items()}) for step in steps]
    np.testing.assert_allclose((np.ravel(moved) - truth) / 1e-6, goal.rows[0], rtol=1e-4)

    exponents = propose(cells, wanted("exponent", N_K, cells.raw, KS, {}), 0.5, NONE).value
    np.testing.assert_allclose(exponents, [N_K.exponent_of(RAW, "n_latents", {"k": k}) for k in KS], rtol=1e-12)
    floor = propose(cells, wanted("floor", N_K, cells.raw, KS, {"k": 32.0}), 0.5, NONE).value
    np.testing.assert_allclose(floor, N_K.log_value(RAW, {"n_latents": np.array([1e60]), "k": np.array([32.0])}))
    np.testing.assert_array_equal(propose(cells, wanted("coefficients", N_K, cells.raw, KS, {}), 0.5, NONE).value, RAW)


def test_an_interval_is_that_of_the_cells_alone(cells: Candidates) -> None:
    """Without any other information than the cells': on few cells that say little of small k above all."""
    n, k = (v.ravel() for v in np.meshgrid([1024.0, 2048.0, 4096.0, 8192.0], KS[:4], indexing="ij"))
    gradients = candidates(N_K, RAW[None], n, k, np.ones(len(n)), NOISE).gradients[0]
    covariance = np.linalg.inv(gradients.T @ gradients) * NOISE**2 * np.pi / 2
    for target in ("exponent", "floor", "coefficients"):
        goal = wanted(target, N_K, cells.raw, KS, {})  # type: ignore[arg-type]
        rows = goal.rows if len(goal.rows) else np.eye(len(RAW))
        half = t.ppf(0.975, len(n) - len(RAW)) * np.sqrt(np.diag(rows @ covariance @ rows.T))
        found = expected(cells, goal, {"n_latents": n, "k": k})
        np.testing.assert_allclose(found.half_width, half, rtol=1e-3)


def test_a_point_that_a_target_ignores_is_refused(cells: Candidates) -> None:
    for target, at, said in (
        ("exponent", {"n_latents": 512.0, "k": 8.0}, "--at n: --target exponent does not depend on it; give k alone"),
        ("floor", {"n_latents": 512.0}, "--at n: --target floor does not depend on it"),
        ("coefficients", {"k": 8.0}, "--at k: --target coefficients does not depend on it; leave --at out"),
        ("prediction", {"n_latents": 512.0, "k": 8.0, "tokens": 1e9}, "--at D: --target prediction does not depend"),
    ):
        with pytest.raises(SaescaleError, match=said):
            wanted(target, N_K, cells.raw, KS, at)  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_information_of_seeds_is_that_of_generalised_least_squares(cells: Candidates, shared: float) -> None:
    """Whole covariance, cell by cell: seeds of one n and k have `shared` of their variance in common."""
    n, k = (v.ravel() for v in np.meshgrid([1024.0, 2048.0, 4096.0, 8192.0], KS[:4], indexing="ij"))
    seeds = np.arange(len(n)) % 3 + 1
    there = {"n_latents": np.repeat(n, seeds), "k": np.repeat(k, seeds)}
    of = np.repeat(np.arange(len(n)), seeds)
    covariance = (of[:, None] == of[None]) * shared + np.eye(len(of)) * (1 - shared)
    rows = candidates(N_K, RAW[None], n, k, np.ones(len(n)), NOISE).gradients[0][of]
    variance = np.linalg.inv(rows.T @ np.linalg.solve(covariance, rows)) * NOISE**2 * np.pi / 2
    goal = wanted("exponent", N_K, cells.raw, KS, {})
    free = (len(n) if shared else len(of)) - len(RAW)
    half = t.ppf(0.975, free) * np.sqrt(np.diag(goal.rows @ variance @ goal.rows.T))
    made = candidates(N_K, RAW[None], cells.n_latents, cells.k, cells.hours, NOISE, shared)
    np.testing.assert_allclose(expected(made, goal, there).half_width, half, rtol=1e-3)


def test_no_seeds_are_bought_against_a_lack_of_fit(cells: Candidates) -> None:
    """What seeds share no seed narrows: with most of the scatter of that kind, a plan is of other n and k."""
    n, k = (v.ravel() for v in np.meshgrid(2.0 ** np.arange(10, 14), np.array(KS), indexing="ij"))
    there = {"n_latents": np.tile(n, 2), "k": np.tile(k, 2)}
    goal = wanted("exponent", N_K, cells.raw, KS, {})

    def again(shared: float) -> tuple[int, int]:
        made = candidates(N_K, cells.raw, cells.n_latents, cells.k, cells.hours, NOISE, shared)
        counts = propose(made, goal, 0.5, there).counts
        known = np.isin(cells.n_latents, n)
        return int(counts[known].sum() + np.maximum(counts[~known] - 1, 0).sum()), int(counts.sum())

    own, shared = again(0.0), again(0.95)
    assert own[0] > 0.5 * own[1]
    assert shared[0] == 0 < shared[1]
    made = candidates(N_K, cells.raw, n, k, np.ones(len(n)), NOISE, 0.95)
    with pytest.raises(SaescaleError, match=r"more seeds of the n and k that are there narrow nothing.*raise --n-max"):
        propose(made, goal, 10.0, there)


def test_a_device_is_as_fast_as_the_run_measured_on_its_kind() -> None:
    rows = [
        {"device": "NVIDIA H100 80GB HBM3", "flops": 4e15, "wall_s": 10.0},
        {"device": "NVIDIA H100 80GB HBM3", "flops": 2e15, "wall_s": 20.0},
        {"device": "NVIDIA GeForce RTX 4090", "flops": 3e15, "wall_s": 10.0},
        {"device": "cpu", "flops": 1e12, "wall_s": 0.0},
    ]
    results = Table.from_rows(rows, "runs/mine")
    h100 = as_measured(find_device("h100"), results)
    assert h100.flat == pytest.approx(2e14)
    assert h100.speed_from == "measured by 2 cells of runs/mine"
    assert as_measured(find_device("rtx4090"), results).flat == pytest.approx(3e14)
    for name in ("a100", "cpu"):
        assert as_measured(find_device(name), results) == find_device(name)
    assert "assumed" in find_device("a100").speed_from
    assert as_measured(find_device("h100"), Table.from_rows([{"flops": 1.0, "wall_s": 1.0}])) == find_device("h100")


def test_cells_of_a_pack_share_its_seconds() -> None:
    """Two packs on one device after each other, timed by a clock of the test's own: three cells, then one."""
    packs = {"a": [(64, 3e6), (128, 5e6), (256, 9e6)], "b": [(512, 2e7)]}
    clock = {"a": [9.0, 2.0, 3.0], "b": [8.0, 4.0, 5.0]}  # the first interval compiles
    results, curves, flops = [], [], 0.0
    for pack, cells_of in packs.items():
        for n, each in cells_of:
            results.append({"cell_id": f"{pack}{n}", "device": "cpu", "flops": 3000 * each, "wall_s": 1.0})
            flops += 2000 * each
            curves += [
                {"cell_id": f"{pack}{n}", "step": i + 1, "tokens": 1000 * (i + 1), "flops": 1000 * (i + 1) * each,
                 "tokens_per_s": 1000 / spent}
                for i, spent in enumerate(clock[pack])
            ]  # fmt: skip
    device = as_measured(find_device("cpu"), Table.from_rows(results), Table.from_rows(curves))
    assert device.flat == pytest.approx(flops / (2 + 3 + 4 + 5))
