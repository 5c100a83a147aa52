"""probe_loss against scipy's own optimum of the same logistic regressions, one at a time."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.architecture import unit_rows
from saescale.trainers.evals.evaluation import Measurement
from saescale.trainers.evals.texts import probe_loss, probes
from saescale.trainers.evals.texts.probe_loss import LEAST, Group
from saescale.trainers.evals.texts.probes import RIDGE
from saescale.trainers.evals.texts.spelling import token_texts
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise
from saescale.trainers.subjects.subject import Subject
from tests.trainers.evals.cases import a_trained, raw_rows


def by_scipy(z: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, float]:
    """Weight and bias, and the least mean cross-entropy with the ridge."""

    def loss(p: np.ndarray) -> tuple[float, np.ndarray]:
        u = p[0] * z + p[1]
        away = 1 / (1 + np.exp(-u)) - truth
        value = np.logaddexp(0, u) - truth * u
        return value.mean() + RIDGE / 2 * p[0] ** 2, np.array([(away * z).mean() + RIDGE * p[0], away.mean()])

    found = minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 1_000})
    return found.x, float(found.fun)


@pytest.mark.parametrize("share", [0.5, 0.03])
def test_newton_finds_the_least_of_every_column(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_BLOCK", 7 * 600)  # in pieces, the last one short
    rng = np.random.default_rng(0)
    truth = rng.random(600) < share
    z = rng.standard_t(2, size=(20, 600))  # outliers, as of massive tokens
    z[1] += 2 * truth
    z[2] = truth  # separable
    z[3] = np.where(truth, rng.random(600) + 1, -rng.random(600))
    z[4, np.argmax(truth)] = 1e4
    z[5] = -z[1]
    z[6] = np.exp(3 * rng.normal(size=600)) * (1 + truth)
    z = (z - z.mean(axis=1, keepdims=True)) / z.std(axis=1, keepdims=True)
    z[7] = 0  # one that never varies
    found = probes.fit(torch.from_numpy(z).float(), torch.from_numpy(truth).float())
    for column, weight, bias, loss, least_found in zip(z, *(t.tolist() for t in found), strict=True):
        assert least_found
        (w, b), least = by_scipy(column, truth)
        assert loss == pytest.approx(least, abs=5e-6)
        # Where a latent separates the task, the loss hardly depends on them.
        assert weight == pytest.approx(w, abs=0.05 + 0.025 * abs(w))
        assert bias == pytest.approx(b, abs=0.05 + 0.025 * abs(b))


def test_the_best_column_is_that_of_all_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many columns a bound spares, none of them would have had a lower loss."""
    monkeypatch.setattr(probes, "CHUNK_ENTRIES", 7 * 900)  # bounds of seven columns at a time, the last ones fewer
    rng = np.random.default_rng(3)
    rows, learns = 900, rng.random(900) < 0.6
    hidden = rng.normal(size=(rows, 4))
    mixed = hidden @ rng.normal(size=(4, 120)) + rng.normal(size=(rows, 120))
    columns = np.concatenate(
        [mixed, 1e4 + mixed[:, :9], np.exp(2 * mixed[:, :20]), np.maximum(mixed[:, :20] - 1, 0), mixed[:, :9] > 1,
         rng.standard_t(1, size=(rows, 20)), np.zeros((rows, 2)), -mixed[:, :3], hidden[:, :1] > 0.4], axis=1
    )  # fmt: skip
    slopes = (0.0, 0.5, 3.0, 30.0)
    chances = [1 / (1 + np.exp(1 - slope * hidden[:, i])) for i, slope in enumerate(slopes)]
    truths = np.stack([rng.random(rows) < p for p in (*chances, np.full(rows, 0.03))] + [hidden[:, 0] > 0.4])
    values, learned = torch.from_numpy(columns).float(), torch.from_numpy(truths[:, learns]).float()
    z = probes._standard(values[torch.from_numpy(learns)]).z
    bounds = torch.cat([probes._bounds(part, learned) for part in z.split(50)], dim=1)
    found = probes.best_probes(values, torch.from_numpy(learns), torch.from_numpy(truths).float())
    for truth, bound, best in zip(learned, bounds, found, strict=True):
        every = probes.fit(z, truth).loss
        assert (bound <= every).all()
        assert ((every - bound)[:120].quantile(0.9)) < 5e-3  # near enough to spare most columns
        assert every[best.column] <= every.min() + 1e-6
        fitted = probes.fit(z[best.column : best.column + 1], truth)
        logits = best.logits(values[torch.from_numpy(learns), best.column])
        expected = fitted.weight * z[best.column].double() + fitted.bias
        assert torch.allclose(logits, expected, atol=1e-3, rtol=1e-3)


ROWS = 1_600


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return normalise(torch.from_numpy(raw_rows(ROWS, seed=4)))


def grouped(x: torch.Tensor, tasks: dict[str, np.ndarray]) -> Group:
    return probe_loss.group(x, np.arange(len(x)) // 20, tasks)


def measured(trained: Trained, *groups: Group) -> dict[tuple[str, str], Measurement]:
    rows = probe_loss.measure(trained, None, None, [*groups])  # type: ignore[arg-type]
    return {(row.metric, row.at): row for row in rows}


@pytest.mark.parametrize("architecture", ["topk", "gated", "switch", "pca"])
def test_the_loss_is_that_of_the_planted_latent(
    architecture: str, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (probe_loss, probes):  # in pieces, the last ones shorter
        monkeypatch.setattr(module, "CHUNK_ENTRIES", 7 * ROWS)
    trained = a_trained(architecture)
    rng = np.random.default_rng(1)
    pre = trained.sae.forward(x).pre_activations.double().numpy()
    tasks = {}
    for name, latent, slope in (("sharp", 17, 9), ("blunt", 3, -2), ("none", 0, 0)):
        a = (pre[:, latent] - pre[:, latent].mean()) / pre[:, latent].std()
        tasks[name] = rng.random(ROWS) < 1 / (1 + np.exp(1 - slope * a))
    group = grouped(x, tasks)
    found = measured(trained, group)
    assert found["latent", "sharp"].value in ((17, 16) if architecture == "pca" else (17,))  # both signs are one probe
    assert found["latent", "blunt"].value in ((3, 2) if architecture == "pca" else (3,))
    learns, total = group.learns, 0.0
    for name, truth in tasks.items():
        a = pre[:, int(found["latent", name].value)]
        a = (a - a[learns].mean()) / a[learns].std()
        (w, b), _ = by_scipy(a[learns], truth[learns])
        u = (w * a + b)[~learns]
        loss = (np.logaddexp(0, u) - truth[~learns] * u).mean()
        assert found["loss", name].value == pytest.approx(loss, abs=2e-4)
        assert found["share", name].value == pytest.approx(truth.mean())
        p = truth[learns].mean()
        entropy = -np.where(truth[~learns], np.log(p), np.log(1 - p)).mean()
        assert found["chance", name].value == pytest.approx(entropy)
        total += loss / len(tasks)
    assert found["loss", ""].value == pytest.approx(total, abs=2e-4)
    assert found["loss", "sharp"].value < found["loss", "blunt"].value < found["chance", "blunt"].value
    assert found["loss", "none"].value == pytest.approx(found["chance", "none"].value, abs=0.02)
    whole = found["below_channels", ""]
    assert whole.value == pytest.approx(found["channels", ""].value - found["loss", ""].value)
    assert whole.low is not None
    assert whole.high is not None
    assert whole.low <= whole.value <= whole.high
    assert whole.n == int((~learns).sum())
    # Tasks of other rows count as much as these.
    other = grouped(x[:900], {"other": tasks["sharp"][:900]})
    both = measured(trained, group, other)
    assert both["loss", "other"].value == pytest.approx(measured(trained, other)["loss", ""].value)
    assert both["loss", "blunt"][1:4] == pytest.approx(found["loss", "blunt"][1:4], rel=0.2)
    assert both["loss", ""].value == pytest.approx((3 * found["loss", ""].value + both["loss", "other"].value) / 4)


def test_baselines_are_latents_that_point_there(x: torch.Tensor) -> None:
    rng = np.random.default_rng(2)
    group = grouped(x, {"some": rng.random(ROWS) < 1 / (1 + np.exp(-8 * x[:, 2].numpy()))})
    trained = a_trained(n_latents=16)
    params = trained.sae.params
    params["b_enc"] += 3  # neither shifts nor scales matter to a probe
    drawn = unit_rows(16, 16, torch.Generator().manual_seed(probe_loss.DIRECTIONS_SEED))
    for name, directions in (("channels", torch.eye(16)), ("random", drawn)):
        params["W_enc"] = 5 * directions
        found = measured(trained, group)
        assert found["loss", "some"].value == pytest.approx(found[name, "some"].value, abs=1e-5), name
    assert found["channels", ""].value < found["chance", ""].value
    assert group.random.keys() == {16}


def prepare(store: ActivationStore, subject: Any) -> list[Group]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaescaleWarning)
        return probe_loss.prepare(store, subject)


def test_tasks_of_text_are_true_of_the_rows_tokens(text_store: ActivationStore, text_subject: Subject) -> None:
    with pytest.warns(SaescaleWarning, match=r"of 39 tasks are left out.* ends_ing"):
        group, sentences = probe_loss.prepare(text_store, text_subject)
    rows = text_store.heldout(columns=("act", "token", "pos", "doc"))
    inside = rows.pos < rows.pos.max()  # contexts of 24 tokens, whose last one has no next
    assert len(group.x) == inside.sum() == 1_536 * 23 // 24
    texts = token_texts(text_subject, rows.token.tolist())
    spelt = [texts[token] for token in rows.token[inside].tolist()]
    assert group.tasks["space"].tolist() == [text.startswith(" ") for text in spelt]
    assert group.tasks["short"].tolist() == [len(text.strip()) == 1 for text in spelt]
    assert group.tasks["early"].tolist() == (rows.pos[inside] <= 6).tolist()  # the first is at 1, behind BOS
    assert (group.doc == rows.doc[inside]).all()
    assert len(group.tasks) >= 20
    assert not set(group.doc[group.learns]) & set(group.doc[~group.learns])
    assert 0.3 < group.learns.mean() < 0.7
    for truth in group.tasks.values():
        for half in (truth[group.learns], truth[~group.learns]):
            assert LEAST <= half.sum() <= len(half) - LEAST
    assert (len(sentences.x), [*sentences.tasks]) == (320, ["plural_subject", "plural_last"])
    assert set(sentences.doc) == set(range(20))


def test_labels_are_tasks_where_there_is_no_text(text_store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = {
        "colour": rng.integers(0, 3, (1_536, 2, 2)), "ahead": rng.random(1_536) < 0.5, "real": rng.normal(size=1_536),
        "rare": np.arange(1_536) == 5, "same": np.ones(1_536),
    }  # fmt: skip
    monkeypatch.setattr(probe_loss, "heldout_labels", lambda source, subject, rows: labels)
    game = SimpleNamespace(name="game", labels=tuple(labels))
    (group,) = prepare(text_store, game)
    squares = [f"colour[{i},{j}] = {colour}" for i in (0, 1) for j in (0, 1) for colour in (0, 1, 2)]
    assert list(group.tasks) == [*squares, "ahead = True"]
    assert (group.tasks["colour[1,0] = 2"] == (labels["colour"][:, 1, 0] == 2)).all()
    monkeypatch.setattr(probe_loss, "LABEL_TASKS", 5)
    assert len(prepare(text_store, game)[0].tasks) == 4  # and one that is rare
    monkeypatch.setattr(probe_loss, "LEAST", 2_000)
    with pytest.raises(SaescaleError, match="none of its 5 tasks is true and false on 2000 held-out rows"):
        probe_loss.prepare(text_store, game)  # type: ignore[arg-type]
    with pytest.raises(SaescaleError, match="game reads no text and has no labels"):
        probe_loss.prepare(text_store, SimpleNamespace(name="game", labels=()))  # type: ignore[arg-type]
