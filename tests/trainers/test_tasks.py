"""Tasks and circuits: on a model whose circuit was made by hand, against slow code, and on tokenizers that cannot."""

import numpy as np
import pytest
import torch

from saescale.storage.manifest import Site
from saescale.trainers.tasks import induction
from saescale.trainers.tasks.heads import scores_by_attention
from saescale.trainers.tasks.patching import Part, patch_parts
from saescale.trainers.tasks.task import METRIC, Prompts, find_task
from tests.trainers.slow_circuit import ByHand, by_hand, recomputed


@pytest.fixture(scope="module")
def subject() -> ByHand:
    return by_hand()


@pytest.fixture(scope="module")
def prompts(subject: ByHand) -> Prompts:
    return induction.prompts(subject, number=6, seed=3)


def slow_metric(prompts: Prompts, number: int, logits: np.ndarray) -> float:
    """Nats a token of the first time less those of the second, token by token."""
    ids = prompts.ids[number].tolist()
    losses = []
    for place in prompts.reads[number].tolist():
        chances = np.exp(logits[place]) / np.exp(logits[place]).sum()
        losses.append(-np.log(chances[ids[place + 1]]))
    half = len(losses) // 2
    return float(np.mean(losses[:half]) - np.mean(losses[half:]))


def test_patching_is_that_of_slow_code_and_finds_the_circuit(subject: ByHand, prompts: Prompts) -> None:
    found = patch_parts(subject, find_task("induction"), prompts)
    rows = range(len(prompts.ids))
    clean = [recomputed(subject.model, prompts.ids[row].tolist()) for row in rows]
    corrupt = [recomputed(subject.model, prompts.corrupt[row].tolist()) for row in rows]

    def mean(ids: torch.Tensor, put: list[dict] | None = None) -> float:
        logits = [recomputed(subject.model, ids[row].tolist(), put and put[row])[0] for row in rows]
        return float(np.mean([slow_metric(prompts, row, logits[row]) for row in rows]))

    whole, nothing = mean(prompts.ids), mean(prompts.corrupt)
    assert found.clean == pytest.approx(whole, abs=1e-4)
    assert found.corrupt == pytest.approx(nothing, abs=1e-4)
    assert whole > nothing + 1
    for part, effect in found.effects.items():
        if part.head is None:
            assert (effect.noising, effect.denoising, effect.direct) == pytest.approx((0, 0, 0), abs=1e-6)
            continue
        where = part.layer, part.head
        noised = mean(prompts.ids, [{where: given[where]} for _, given in corrupt])
        denoised = mean(prompts.corrupt, [{where: given[where]} for _, given in clean])
        assert effect.noising == pytest.approx((whole - noised) / (whole - nothing), abs=1e-4)
        assert effect.denoising == pytest.approx((denoised - nothing) / (whole - nothing), abs=1e-4)
    # The head that foresees gives all of it straight, the one before it all of it through that head; others nothing.
    assert found.effects[Part(1, 0)].noising > 0.9
    assert found.effects[Part(0, 0)].noising > 0.5
    assert abs(found.effects[Part(0, 0)].direct) < 0.15  # by the last norm alone
    for idle in (Part(0, 1), Part(1, 1)):
        assert found.effects[idle] == pytest.approx((0, 0, 0), abs=1e-6)


def test_a_part_that_goes_straight_to_the_logits_does_so_by_its_derivative(subject: ByHand, prompts: Prompts) -> None:
    """`direct` is a derivative of the metric: held to differences of it."""
    task, site = find_task("induction"), Site(layer=1, positions="all")
    (last,) = subject.run(prompts.ids, [site]).resid
    (other,) = subject.run(prompts.corrupt, [site]).resid

    def metric(stream: torch.Tensor) -> float:
        return float(task.score(prompts, _read(subject, prompts, site, stream))[METRIC].double().mean())

    # All that differs at the end came from heads and from the embeddings; the latter are read by nobody.
    step = 1e-2
    slope = (metric(last + step * (last - other)) - metric(last - step * (last - other))) / (2 * step)
    found = patch_parts(subject, task, prompts)
    straight = sum(effect.direct for effect in found.effects.values()) * (found.clean - found.corrupt)
    embedded = subject.model.transformer.wte(prompts.ids) - subject.model.transformer.wte(prompts.corrupt)
    slope_of_embeddings = (metric(last + step * embedded) - metric(last - step * embedded)) / (2 * step)
    assert straight + slope_of_embeddings == pytest.approx(slope, rel=0.02)


def _read(subject: ByHand, prompts: Prompts, site: Site, stream: torch.Tensor) -> torch.Tensor:
    from saescale.trainers.tasks.task import read

    return read(prompts, subject.resume(prompts.ids, site, stream, prompts.last))


def test_heads_are_what_they_were_made_for(subject: ByHand) -> None:
    scores = scores_by_attention(subject)
    best = {kind: max(of, key=of.__getitem__) for kind, of in scores.items()}
    assert best == {"previous_token": Part(0, 0), "duplicate_token": Part(0, 1), "induction": Part(1, 0)}
    for kind, part in best.items():
        assert scores[kind][part] > (0.25 if kind == "duplicate_token" else 0.9)
        assert all(score < scores[kind][part] - 0.1 for other, score in scores[kind].items() if other != part)


def test_a_gradient_at_the_site_is_that_of_differences(prompts: Prompts) -> None:
    subject, draw = by_hand(), torch.Generator().manual_seed(0)
    for parameter in subject.model.parameters():  # that by hand is all edges
        parameter.normal_(std=0.15, generator=draw)
    task, site = find_task("induction"), Site(layer=0, positions="all")
    (resid,) = subject.run(prompts.ids, [site]).resid
    x = resid.clone().requires_grad_()
    metric = task.score(prompts, _read(subject, prompts, site, x))[METRIC].sum()
    (gradient,) = torch.autograd.grad(metric, x)
    for _ in range(3):
        way = torch.randn(resid.shape, generator=draw)
        ends = [
            task.score(prompts, _read(subject, prompts, site, resid + sign * 1e-2 * way))[METRIC] for sign in (1, -1)
        ]
        assert float((gradient * way).sum()) == pytest.approx(
            float((ends[0] - ends[1]).double().sum()) / 2e-2, rel=0.01, abs=1e-3
        )
    last = subject.resume(prompts.ids, site, resid, prompts.last)
    assert torch.equal(last, subject.resume(prompts.ids, site, resid)[:, -prompts.last :])
