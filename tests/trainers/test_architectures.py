"""Every architecture: its formulas against loops, its gradients against finite differences, its training."""

import itertools
import json
import math
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures import ARCHITECTURES, batchtopk, matryoshka, pca, switch
from saescale.trainers.architectures.architecture import (
    FOUND_AT,
    Batch,
    Forward,
    Losses,
    Parameter,
    PenaltySettings,
    Shape,
    State,
    Worked,
    find_architecture,
)
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.exchange import native
from saescale.trainers.preprocess import Centre, normalise, to_tensor
from saescale.trainers.training.controller import FLOOR, START, Controller, is_off
from saescale.trainers.training.memory import StreamSize, pack_memory
from saescale.trainers.training.train import PackJob, train_pack
from saescale.trainers.training.training_cell import TrainingCell
from tests.trainers.synthetic import D_MODEL

MakeCell = Callable[..., Cell]
SHAPE = Shape(6, 24)
CENTRE = Centre(torch.zeros(D_MODEL), 1.0)
VARIANCE, COEFFICIENT = 0.37, 0.05
# Whose made-up gradients (straight-through) are no derivative of the loss, and who has none at all.
MADE_UP = {"prolu": ("W_enc", "b_enc", "b_pre"), "jumprelu": ("threshold",)}
TRAINED = [name for name in ARCHITECTURES.names() if name != "pca"]


def settings_of(name: str, **given: Any) -> Any:
    own = find_architecture(name).Settings
    given = {"k": 3, "experts": 4} | given
    return own(**{key: value for key, value in given.items() if key in own.model_fields})


def case(name: str) -> SimpleNamespace:
    """A small SAE away from its start, in float64, and a batch."""
    torch.manual_seed(3)
    x = torch.randn(10, SHAPE.d_model, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    settings = settings_of(name)
    made = find_architecture(name).parameters(SHAPE, settings, Centre(torch.randn(6) * 0.05, VARIANCE), 1)
    params = {n: p.data.double() + (0.1 * torch.randn(p.data.shape, dtype=torch.float64) if p.trained else 0.0)
              for n, p in made.items()}  # fmt: skip
    return SimpleNamespace(x=x, settings=settings, made=made, params=params)


def forward_and_losses(name: str, c: SimpleNamespace, params: dict[str, Tensor]) -> tuple[Forward, Losses]:
    architecture = find_architecture(name)
    run = getattr(architecture, "training_forward", architecture.forward)
    dead = torch.arange(SHAPE.n_latents) % 5 == 0
    forward = run(params, c.x, c.settings)
    return forward, architecture.losses(params, forward, c.x, c.settings, State(VARIANCE, dead, 0.5, COEFFICIENT))


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    c = case(name)
    moved = {n: t.clone().requires_grad_() for n, t in c.params.items()}
    total = forward_and_losses(name, c, moved)[1].total
    gradients = dict(zip(moved, torch.autograd.grad(total, list(moved.values()), materialize_grads=True), strict=True))

    def loss(params: dict[str, Tensor], without: str | None) -> float:
        losses = forward_and_losses(name, c, params)[1]
        # The gate's reconstruction holds the decoder fast.
        return float(losses.total - (losses.parts["gate"] if without else 0.0))

    checked = 0
    for parameter, spec in c.made.items():
        if not spec.trained or parameter in MADE_UP.get(name, ()):
            continue
        held = "gate" if name == "gated" and parameter == "W_dec" else None
        if name == "gated" and parameter == "b_pre":
            continue  # the encoder sees it in both reconstructions, the decoder in one
        flat = gradients[parameter].flatten()
        for i in torch.randperm(len(flat))[:12].tolist():
            values = []
            for step in (1e-6, -1e-6):
                shifted = {n: t.clone() for n, t in c.params.items()}
                shifted[parameter].view(-1)[i] += step
                values.append(loss(shifted, held))
            assert float(flat[i]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-7)
            checked += 1
    assert checked >= 12


@pytest.mark.parametrize("variant", ["relu", "ste"])
def test_prolu_passes_on_the_gradient_that_its_paper_says(variant: str) -> None:
    c = case("prolu")
    settings = settings_of("prolu", variant=variant)
    W, b = c.params["W_enc"], c.params["b_enc"].clone().requires_grad_()
    prolu = find_architecture("prolu")
    forward = prolu.forward(c.params | {"b_enc": b}, c.x, settings)
    upstream = torch.randn_like(forward.latents)
    (gradient,) = torch.autograd.grad(forward.latents, b, upstream)
    expected = torch.zeros_like(b)
    for row in range(len(c.x)):
        for i in range(SHAPE.n_latents):
            m = float((c.x[row] - c.params["b_pre"]) @ W[i])
            on = m > 0 and m + float(b[i]) > 0
            assert float(forward.latents[row, i]) == pytest.approx(m if on else 0.0)
            expected[i] += float(upstream[row, i]) * on * (m if variant == "ste" else 1.0)
    assert torch.allclose(gradient, expected)


def test_jumprelu_widens_its_thresholds_by_the_pairs_near_them() -> None:
    c = case("jumprelu")
    settings = settings_of("jumprelu", bandwidth=0.4, threshold=0.1)
    theta = c.params["threshold"].clone().requires_grad_()
    forward, losses = forward_and_losses(
        "jumprelu", SimpleNamespace(x=c.x, settings=settings), c.params | {"threshold": theta}
    )
    (gradient,) = torch.autograd.grad(losses.total, theta)
    pre, cut = forward.pre_activations.detach(), theta.detach().relu()
    near = (pre - cut).abs() < 0.2
    assert near.any()
    dz = 2 * (forward.x_hat - c.x).detach() @ c.params["W_dec"].T / c.x.numel() / VARIANCE
    expected = -(dz * near).sum(dim=0) * cut / 0.4
    expected -= COEFFICIENT / 3 * near.double().mean(dim=0) / 0.4
    assert torch.allclose(gradient, torch.where(c.params["threshold"] > 0, expected, 0.0))


def test_gated_takes_the_gates_word_for_who_is_active() -> None:
    c = case("gated")
    forward = find_architecture("gated").forward(c.params, c.x, c.settings)
    scores = (c.x - c.params["b_pre"]) @ c.params["W_enc"].T
    magnitude = scores * c.params["r_mag"].exp() + c.params["b_mag"]
    off = (scores + c.params["b_gate"] <= 0) | (magnitude <= 0)
    assert 0 < int(off.sum()) < off.numel()
    assert torch.equal(forward.latents[off], torch.zeros(int(off.sum()), dtype=torch.float64))
    assert torch.allclose(forward.latents[~off], magnitude[~off])


def test_batchtopk_has_k_a_token_on_average_and_measures_where_that_cuts() -> None:
    c = case("batchtopk")
    forward, _ = forward_and_losses("batchtopk", c, c.params)
    assert int((forward.latents > 0).sum()) == 3 * len(c.x)
    counts = (forward.latents > 0).sum(dim=1)
    assert counts.min() < 3 < counts.max()
    # With the threshold that this batch gives, what is active in it is active without the rest of the batch.
    calibrated = batchtopk.calibrated(c.params, c.x, c.settings)
    assert torch.equal(batchtopk.forward(calibrated, c.x, c.settings).latents, forward.latents)
    alone = torch.cat([batchtopk.forward(calibrated, row[None], c.settings).latents for row in c.x[:-1]])
    assert int(((alone > 0) != (forward.latents[:-1] > 0)).sum()) <= 1  # the one at the threshold, by rounding


def test_matryoshka_averages_the_errors_of_its_prefixes() -> None:
    c = case("matryoshka")
    forward, losses = forward_and_losses("matryoshka", c, c.params)
    ends = matryoshka.prefixes(SHAPE.n_latents)
    assert ends == [2, 3, 6, 12]  # 24 / 16 is 1.5
    errors = []
    for end in (*ends, 24):
        latents = forward.latents.clone()
        latents[:, end:] = 0
        x_hat = latents @ c.params["W_dec"] + c.params["b_pre"]
        errors.append(float((x_hat - c.x).square().mean()) / VARIANCE)
    assert float(losses.parts["nested"]) == pytest.approx(sum(errors) / 5)
    assert float(losses.main) == pytest.approx(errors[-1])
    assert matryoshka.prefixes(4) == [1, 2]


def test_hierarchical_topk_averages_the_errors_of_fewer_latents() -> None:
    c = case("hierarchical_topk")
    c.settings = settings_of("hierarchical_topk", k=6)
    assert c.settings.levels() == [1, 2, 4, 6]
    forward, losses = forward_and_losses("hierarchical_topk", c, c.params)
    errors = {}
    for k in (1, 2, 4, 6):
        x_hat = c.params["b_pre"].repeat(len(c.x), 1)
        for row in range(len(c.x)):
            for i in forward.pre_activations[row].argsort(descending=True)[:k].tolist():
                x_hat[row] += max(0.0, float(forward.pre_activations[row, i])) * c.params["W_dec"][i]
        errors[k] = float((x_hat - c.x).square().mean()) / VARIANCE
    of_all = [errors[level] for level in (1, 2, 4, 4, 6, 6)]  # 3 and 5 by the next level
    assert float(losses.parts["nested"]) == pytest.approx(sum(of_all) / 6)


def test_switch_routes_each_token_to_one_expert_and_charges_for_that() -> None:
    c = case("switch")
    forward = switch.forward(c.params, c.x, c.settings)
    routed = torch.softmax((c.x - c.params["b_router"]) @ c.params["W_router"].T, dim=1)
    pre = (c.x - c.params["b_pre"]) @ c.params["W_enc"].T + c.params["b_enc"]
    for row in range(len(c.x)):
        e = int(routed[row].argmax())
        own = pre[row, 6 * e : 6 * e + 6]
        expected = torch.zeros(24, dtype=torch.float64)
        for i in own.argsort(descending=True)[:3].tolist():
            expected[6 * e + i] = routed[row, e] * max(0.0, float(own[i]))
        assert torch.allclose(forward.latents[row], expected)
    chosen = routed.argmax(dim=1)
    balance = 4 * sum(float((chosen == e).double().mean() * routed[:, e].mean()) for e in range(4))
    losses = switch.losses(c.params, forward, c.x, c.settings, State(VARIANCE, torch.zeros(24, dtype=torch.bool)))
    assert float(losses.parts["balance"]) == pytest.approx(balance)

    # 10 tokens: 6 scores of its own expert and 4 of the router, forward; the router backward; 8 d a pair.
    flops = switch.flops(SHAPE, c.settings, Worked(10, 30))
    assert flops.sparse == 10 * (2 * 6 * 6 + 6 * 4 * 6) + 8 * 30 * 6
    assert (
        flops.sparse < flops.dense < find_architecture("topk").flops(SHAPE, settings_of("topk"), Worked(10, 30)).dense
    )


def test_pca_has_the_components_of_all_tokens_so_far() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6)
    settings = settings_of("pca", k=2)
    made = pca.parameters(Shape(6, 16), settings, Centre(torch.ones(6), 1.0), 0)
    params = {name: parameter.data.double() for name, parameter in made.items()}
    for batch in torch.from_numpy(x).split(30):
        forward = pca.forward(params, batch, settings)
        params |= pca.losses(params, forward, batch, settings, State(1.0, torch.zeros(16, dtype=torch.bool))).measured

    mean = x.mean(axis=0)
    _, _, components = np.linalg.svd(x - mean)
    assert np.allclose(params["b_pre"], mean)
    scores = (x - mean) @ components.T
    order = np.argsort(-np.abs(scores), axis=1)[:, 2:]
    np.put_along_axis(scores, order, 0.0, axis=1)  # the two largest of a row stay
    found = pca.forward(params, torch.from_numpy(x), settings)
    assert np.allclose(found.x_hat, scores @ components + mean)
    assert int((found.latents > 0).sum(dim=1).max()) == 2
    assert (found.latents[:, 12:] == 0).all()  # there are 6 components in 2 directions


def test_a_penalty_is_found_held_and_recorded(sparse_store: ActivationStore, make_cell: MakeCell, run_url: str) -> None:
    """Of all with a penalty: L0 near k, a coefficient that stays; a given one is used; the rest have none."""
    penalised = [n for n in ARCHITECTURES.names() if issubclass(find_architecture(n).Settings, PenaltySettings)]
    assert penalised == ["gated", "jumprelu", "prolu", "relu"]
    shared = {"tokens": 81_920, "lr": 1e-2, "n_latents": 96}
    # Rows have about 4 features: more than that jumprelu does not keep active whatever the penalty.
    cells = [make_cell(architecture=name, k=3, **shared) for name in penalised]
    given = make_cell(architecture="relu", settings={"coefficient": 0.02}, **shared | {"tokens": 8_192})
    job = PackJob(
        cells=[*cells, given], store=sparse_store.url, run=run_url, sweep="s", threads=1,
        eval=EvalSpec(tokens=1_024, every_tokens=4_096),
    )  # fmt: skip
    results = {row["cell_id"]: row for row in train_pack(job).results}
    run = RunDirectory(run_url)
    for cell in cells:
        row, curve = results[cell.cell_id], run.read_cell_curve(cell.cell_id)
        assert row["l0"] == pytest.approx(cell.k, rel=0.15)
        assert row["l0_error"] == row["l0"] / cell.k - 1
        held = [point["coefficient"] for point in curve if point["tokens"] >= FOUND_AT * cell.tokens]
        assert len(set(held)) == 1 < len(held)
        assert row["coefficient"] == held[0] not in [point["coefficient"] for point in curve[:3]]
    assert {point["coefficient"] for point in run.read_cell_curve(given.cell_id)} == {0.02}
    assert results[given.cell_id]["l0_error"] is None  # k is no target there


def plant(kind: str) -> Callable[[float], float]:
    """L0 of the next step at a coefficient: as its power at once, as that with a lag, for which it takes less and less
    while it is being found, as twice that power a few steps later, and never above 60 % of 16."""
    state, steps, asked = [math.log(128.0)], itertools.count(), deque([START], maxlen=6)

    def l0(coefficient: float) -> float:
        needed = 0.2 * math.exp(-0.7 * min(1.0, next(steps) / 360)) if kind == "falling" else 0.2
        asked.append(coefficient)
        goal = math.log(16 * (needed / coefficient) ** 0.7)
        if kind == "quick":
            goal = math.log(16 * (needed / asked[0]) ** 1.5)
        if kind == "saturating":
            goal = min(goal, math.log(0.6 * 16))
        state[0] += (goal - state[0]) * {"static": 1.0, "quick": 0.2}.get(kind, 0.08)
        return math.exp(state[0])

    return l0


@pytest.mark.parametrize("apart", [1.0, 0.9])
@pytest.mark.parametrize("kind", ["static", "lagged", "falling", "quick"])
def test_the_controller_finds_k(kind: str, apart: float) -> None:
    """Whatever L0 with averaged weights is beside that of the steps, it is that which ends at k."""
    controller, l0 = Controller(settings_of("relu", k=16), 400, 0.98), plant(kind)
    mean = 0.0
    for step in range(1, 401):
        active = l0(controller.coefficient)
        mean = 0.98 * mean + 0.02 * math.log(active)
        averaged = apart * math.exp(mean / (1 - 0.98**step))
        controller.after(step, active, averaged if controller.measures(step) else None)
    assert averaged == pytest.approx(16, rel=0.03)


def test_a_penalty_that_is_not_needed_is_off_and_comes_back() -> None:
    settings = settings_of("relu", k=16)
    controller, l0 = Controller(settings, 400, 0.98), plant("saturating")
    for step in range(1, 401):
        controller.after(step, l0(controller.coefficient))
    assert is_off(settings, controller.coefficient)
    assert not is_off(settings_of("relu", coefficient=1e-9), 1e-9)  # that was asked for
    lowest = START * FLOOR
    assert controller.coefficient >= 0.99 * lowest


def test_gates_of_prolu_rest_when_the_coefficient_is_held(sparse_store: ActivationStore, make_cell: MakeCell) -> None:
    cell = make_cell(architecture="prolu", tokens=40 * 256, lr=1e-2)
    assert cell.steps == 40
    x = normalise(to_tensor(sparse_store.read_split("heldout", 256), sparse_store.dtype))
    training = TrainingCell(cell, CENTRE, torch.device("cpu"))
    moves: dict[str, list[float]] = {"b_enc": [], "W_enc": []}
    for _ in range(cell.steps):
        before = {name: training.sae.params[name].clone() for name in moves}
        training.train_on(Batch.of(x, CENTRE.b_pre, False))
        for name, made in moves.items():
            made.append(float((training.sae.params[name] - before[name]).abs().max()))
    held = round(FOUND_AT * cell.steps)
    # Adam moves no number by much more than the rate: a tenth of that of the others, less and less, then none.
    assert max(moves["b_enc"][:held]) < 0.4 * cell.lr
    assert 0 < max(moves["b_enc"][held - 4 : held]) < 0.3 * max(moves["b_enc"])
    assert max(moves["b_enc"][held:]) == 0
    assert min(moves["W_enc"]) > 0


def test_the_target_comes_down_from_the_most_that_a_batch_had() -> None:
    """A first batch may have fewer active latents than the next ones, as JumpReLU's where N is large."""
    controller = Controller(settings_of("jumprelu", k=16), 400, 0.98)
    for step in range(1, 21):
        controller.after(step, 12.0 + 3 * step)
    assert controller.coefficient < 2.5 * START  # it was 5 times START when the first batch said where the line begins


def test_a_k_that_no_penalty_reaches_is_refused(make_cell: MakeCell) -> None:
    with pytest.raises(ValueError, match="k=33 is out of reach: with no penalty at all about half of n_latents=64"):
        make_cell(architecture="gated", k=33)
    make_cell(architecture="gated", k=33, settings={"coefficient": 0.1})


def test_the_controller_goes_on_where_it_was() -> None:
    settings = settings_of("relu", k=16)
    one, two = Controller(settings, 200, 0.98), Controller(settings, 200, 0.98)
    plants = plant("lagged"), plant("lagged")
    for step in range(1, 201):
        for controller, l0 in zip((one, two), plants, strict=True):
            active = l0(controller.coefficient)
            controller.after(step, active, 0.9 * active if controller.measures(step) else None)
        fresh = Controller(settings, 200, 0.98)
        fresh.restore(two.state._asdict())
        two = fresh
    assert one.state == two.state
    assert not one.state.finding


def test_a_hierarchical_sae_says_what_it_reaches_at_each_k(
    sparse_store: ActivationStore, make_cell: MakeCell, run_url: str
) -> None:
    cell = make_cell(architecture="hierarchical_topk", k=6, tokens=8_192)
    job = PackJob(
        cells=[cell], store=sparse_store.url, run=run_url, sweep="s", threads=1,
        eval=EvalSpec(tokens=1_024, every_tokens=4_096),
    )  # fmt: skip
    row = train_pack(job).results[0]
    levels = json.loads(row["levels"])
    assert [level["k"] for level in levels] == [1, 2, 4, 6]
    assert (levels[-1]["nmse"], levels[-1]["l0"]) == pytest.approx((row["nmse"], row["l0"]))

    params = native.read(RunDirectory(run_url).cell_url(cell.cell_id)).sae.params
    x = normalise(to_tensor(sparse_store.read_split("heldout", 1_024), sparse_store.dtype)).double()
    pre = ((x - params["b_pre"]) @ params["W_enc"].double().T + params["b_enc"]).relu()
    order = pre.argsort(dim=1, descending=True)
    for level in levels:
        z = pre.masked_fill(torch.zeros_like(pre, dtype=torch.bool).scatter(1, order[:, level["k"] :], True), 0.0)
        error = (z @ params["W_dec"].double() + params["b_pre"] - x).square().sum()
        assert level["nmse"] == pytest.approx(float(error / (x - x.mean(dim=0)).square().sum()), rel=1e-4)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES.names() if n != "topk"])
def test_it_trains_and_what_is_not_trained_stays(
    name: str, sparse_store: ActivationStore, make_cell: MakeCell, run_url: str
) -> None:
    """nmse falls, the weights read back give the nmse of the result, and frozen ones are those of the start."""
    settings = {"experts": 4} if name == "switch" else {}
    cell = make_cell(architecture=name, tokens=16_384, settings=settings)
    job = PackJob(
        cells=[cell], store=sparse_store.url, run=run_url, sweep="s", threads=1,
        eval=EvalSpec(tokens=1_024, every_tokens=1_024),
    )  # fmt: skip
    row = train_pack(job).results[0]
    assert row["status"] == "done"
    curve = RunDirectory(run_url).read_cell_curve(cell.cell_id)
    l0 = [point["l0"] for point in curve]
    # Where a penalty brings L0 down nmse rises for that, so it is compared at equal L0 only.
    if max(l0) < 1.2 * min(l0):
        assert curve[-1]["nmse"] < curve[0]["nmse"] or name == "pca"

    sae = native.read(RunDirectory(run_url).cell_url(cell.cell_id)).sae
    x = normalise(to_tensor(sparse_store.read_split("heldout", 1_024), sparse_store.dtype))
    error = float((sae.forward(x).x_hat - x).double().square().sum())
    assert row["nmse"] == pytest.approx(error / float((x.double() - x.double().mean(dim=0)).square().sum()), rel=1e-5)
    assert row["l0"] == pytest.approx(float((sae.encode(x) > 0).double().sum(dim=1).mean()), rel=1e-6)

    frozen = {"frozen_decoder": ["W_dec"], "frozen_encoder": ["W_enc", "b_enc"]}.get(name, [])
    start: dict[str, Parameter] = find_architecture(name).parameters(
        Shape(D_MODEL, 64), cell.whole_settings, CENTRE, cell.seed
    )
    for parameter in set(start) & {"W_dec", "W_enc", "b_enc"}:
        assert torch.equal(sae.params[parameter], start[parameter].data) == (parameter in frozen)


@pytest.mark.parametrize("name", ARCHITECTURES.names())
def test_plans_know_its_parameters(name: str, make_cell: MakeCell) -> None:
    """Of an SAE that is not made for it, also where few latents could not have its settings."""
    cell = make_cell(architecture=name, n_latents=512, k=16)
    made = find_architecture(name).parameters(Shape(D_MODEL, 512), cell.whole_settings, CENTRE, 0)
    held = pack_memory([cell], 256, StreamSize(256, 1_024)).held
    assert held >= 16 * sum(parameter.data.numel() for parameter in made.values()) > 0.98 * (held - 8 * 512)


def test_experts_that_do_not_divide_the_latents_are_refused(make_cell: MakeCell) -> None:
    with pytest.raises(ValueError, match="7 experts do not divide n_latents=64"):
        make_cell(architecture="switch", settings={"experts": 7})
    with pytest.raises(ValueError, match="k=9 is larger than the 8 latents of each of 8 experts"):
        make_cell(architecture="switch", k=9)
