"""What of a task an SAE recovers, and which latents carry it: on a model made by hand, and against brute force."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saescale.storage.manifest import Site
from saescale.trainers.evals import circuit, circuit_latents
from saescale.trainers.evals.circuit_latents import Kept, Latents, fewest
from saescale.trainers.evals.circuit_supervised import composed
from saescale.trainers.evals.evaluation import LeftOut, Unsuited
from tests.trainers.evals.cases import a_trained, raw_rows
from tests.trainers.slow_circuit import BEFORE, FORESEEN, TOKENS, by_hand

SOURCE = SimpleNamespace(site=Site(layer=0, positions="all but BOS"))


@pytest.fixture(scope="module")
def everything() -> list[circuit.Prepared | LeftOut]:
    return circuit.prepare(SOURCE, by_hand())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def prepared(everything: list[circuit.Prepared | LeftOut]) -> list[circuit.Prepared]:
    return [each for each in everything if not isinstance(each, LeftOut)]


def measured(prepared: list[circuit.Prepared], reconstruct: object) -> dict[str, float]:
    found = circuit.measure(SimpleNamespace(reconstruct=reconstruct), SOURCE, None, list(prepared))  # type: ignore[arg-type]
    return {each.metric: each.value for each in found if not isinstance(each, LeftOut)}


def test_tasks_that_the_subject_cannot_have_are_left_out_by_name(
    everything: list[circuit.Prepared | LeftOut],
) -> None:
    exact = SimpleNamespace(reconstruct=lambda raw: raw)
    found = list(circuit.measure(exact, SOURCE, None, everything))  # type: ignore[arg-type]
    said = {each.metric: each.left_out for each in found if isinstance(each, LeftOut)}
    assert said.keys() == {"greater_than", "ioi"}
    assert all("by hand reads no text" in why for why in said.values())
    assert any(each.metric == "induction_recovered" for each in found)
    latents = circuit_latents.prepare(SOURCE, by_hand())  # type: ignore[arg-type]
    assert {each.metric: each.left_out for each in latents if isinstance(each, LeftOut)} == said


def test_recovered_is_1_of_x_itself_and_0_of_its_mean(prepared: list[circuit.Prepared]) -> None:
    assert [of.case.name for of in prepared] == ["induction"]  # it reads no text
    whole = measured(prepared, lambda raw: raw)
    assert whole["induction_recovered"] == whole["induction_necessary"] == pytest.approx(1)
    assert whole["induction_sae"] == whole["induction_clean"] > whole["induction_mean"] + 1
    nothing = measured(prepared, lambda raw: raw.mean(dim=0).expand_as(raw))
    assert nothing["induction_recovered"] == pytest.approx(0)
    assert nothing["induction_necessary"] == pytest.approx(0, abs=1e-5)

    def without(raw: torch.Tensor, first: int) -> torch.Tensor:
        raw = raw.clone()
        raw[:, first : first + TOKENS] = raw[:, first : first + TOKENS].mean(dim=0)
        return raw

    # The second layer reads the token before; what no head has written yet is missed by nobody.
    lacking = measured(prepared, lambda raw: without(raw, BEFORE))
    assert lacking["induction_recovered"] < 0.8
    assert lacking["induction_necessary"] < 1  # the rest has it
    # What x_hat lacks is what the rest has, and the other way round.
    mean = prepared[0].case.raw.mean(dim=0)
    rest = measured(prepared, lambda raw: raw - without(raw, BEFORE) + mean)
    for of, other in ((rest, lacking), (lacking, rest)):
        left = (other["induction_sae"] - of["induction_mean"]) / (of["induction_clean"] - of["induction_mean"])
        assert of["induction_necessary"] == pytest.approx(1 - left, abs=1e-5)
    assert measured(prepared, lambda raw: without(raw, FORESEEN))["induction_recovered"] == pytest.approx(1, abs=1e-3)


def test_of_a_task_that_the_subject_does_not_do_no_share_is_told(prepared: list[circuit.Prepared]) -> None:
    of = prepared[0]
    # As good with the mean, but for how prompts differ.
    around = of.clean - np.where(np.arange(len(of.clean)) % 2, 0.3, -0.29)
    nowhere, at_end = of._replace(mean=around, end_mean=around), of._replace(mean=around)
    told = {"sae", "clean", "mean"}
    for instead, shares in ((nowhere, set()), (at_end, {"end_recovered", "end_necessary"})):
        found = measured([instead], lambda raw: raw)
        assert set(found) == {f"induction_{name}" for name in told | shares}
        whole = SimpleNamespace(reconstruct=lambda raw: raw)
        said = [each for each in circuit.measure(whole, SOURCE, None, [instead]) if isinstance(each, LeftOut)]  # type: ignore[arg-type]
        assert {each.metric for each in said} == {
            f"induction_{name}" for name in {"recovered", "end_recovered"} - shares
        }
        assert all("the subject may not do it" in each.left_out for each in said)
        assert np.isfinite(list(found.values())).all()


def test_what_is_left_of_each_task_has_its_figure() -> None:
    leading = {name for name, metric in circuit.metrics.items() if metric.leads}
    assert leading == {"greater_than_recovered", "induction_recovered", "ioi_recovered"}


@pytest.mark.parametrize("exact", [True, False])
def test_a_dictionary_that_has_all_is_sufficient_and_necessary_and_one_of_the_mean_alone_is_neither(
    prepared: list[circuit.Prepared], exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = prepared[0].case
    case = case._replace(prompts=case.prompts._replace(attributes={"any": case.prompts.lengths}))
    at = torch.arange(len(case.resid))[:, None], case.prompts.reads
    rows = case.resid[at].float() if exact else case.raw.mean(dim=0).expand(*case.prompts.reads.shape, -1)
    monkeypatch.setattr(circuit, "supervised", lambda *given: rows)
    found = measured([circuit._prepared(case)], lambda raw: raw)
    for name in ("end_supervised", "end_supervised_necessary"):
        assert found[f"induction_{name}"] == pytest.approx(float(exact), abs=1e-5)
    assert found["induction_end_gap"] == pytest.approx(float(exact) - 1, abs=1e-5)
    assert found["induction_end_necessary"] == pytest.approx(1, abs=1e-5)


def test_a_subject_that_can_have_no_task_is_unsuited() -> None:
    subject = by_hand()
    subject.max_positions = 8
    with pytest.raises(Unsuited, match="by hand can have no task"):
        circuit.prepare(SOURCE, subject)  # type: ignore[arg-type]


def test_latents_at_all_their_values_are_the_reconstruction_and_attribution_is_what_one_alone_does() -> None:
    raw = torch.from_numpy(raw_rows(60)).float()
    trained = a_trained(n_latents=48, k=4)
    latents = Latents(trained, raw)
    torch.testing.assert_close(latents.rows(), trained.reconstruct(raw), rtol=1e-4, atol=1e-4)
    draw = torch.Generator().manual_seed(1)
    way = torch.randn(raw.shape, generator=draw)

    def metric(rows: torch.Tensor) -> torch.Tensor:  # linear, so that parts of it add up
        return (rows * way).sum(dim=1).view(12, 5).sum(dim=1)

    attribution = latents.attribution(metric)
    none = metric(latents.none).sum()
    alone = [metric(latents.rows(torch.tensor([each]))).sum() - none for each in range(len(latents.ids))]
    torch.testing.assert_close(attribution, torch.stack(alone), rtol=1e-3, atol=1e-2)
    z = trained.encode(raw)
    assert latents.ids.tolist() == z.sum(dim=0).nonzero()[:, 0].tolist()
    one = torch.where(torch.arange(48) == latents.ids[3], z, z.mean(dim=0))
    norm = (raw - raw.mean(dim=1, keepdim=True)).norm(dim=1, keepdim=True)
    by_hand_rows = (one @ trained.sae.params["W_dec"] + trained.sae.params["b_pre"]) * norm + raw.mean(
        dim=1, keepdim=True
    )
    torch.testing.assert_close(latents.rows(torch.tensor([3])), by_hand_rows, rtol=1e-4, atol=1e-4)


def test_an_sae_none_of_whose_latents_is_active_carries_nothing() -> None:
    trained = a_trained(n_latents=48, k=4)
    trained.sae.params["b_enc"] -= 100
    raw = torch.from_numpy(raw_rows(60)).float()
    latents = Latents(trained, raw)
    torch.testing.assert_close(latents.rows(), trained.reconstruct(raw), rtol=1e-4, atol=1e-4)
    *found, lacking = circuit_latents.carriers(latents, lambda rows: rows.sum(dim=1))
    assert {each.metric: each.value for each in found if not isinstance(each, LeftOut)} == {"active": 0, "gain": 0}
    assert isinstance(lacking, LeftOut)
    assert "no latents carry it" in lacking.left_out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_fewest_are_those_of_a_search_through_all_numbers(seed: int) -> None:
    draw = np.random.default_rng(seed)
    worth = np.sort(draw.exponential(size=400) ** 3)[::-1].copy()  # of each latent, to each of 20 prompts alike
    share = np.cumsum(worth) / worth.sum()
    prompts = 1 + 0.2 * draw.normal(size=20)
    fake = SimpleNamespace(rows=lambda kept: kept)
    kept = Kept(np.zeros(20), prompts * worth.sum(), 400)
    found = fewest(
        fake,  # type: ignore[arg-type]
        lambda kept: torch.from_numpy(prompts * worth[kept.numpy()].sum()),
        torch.arange(400),
        kept,
    )
    for target in (0.8, 0.9):
        true = int(np.argmax(share >= target)) + 1
        value, low, high = found.least(target)
        assert true <= value <= true * 1.06 + 1
        assert low is not None
        assert high is not None
        assert low <= value <= high


def test_what_is_a_sum_of_attributes_a_supervised_dictionary_has_exactly() -> None:
    values = torch.cartesian_prod(torch.arange(5), torch.arange(4), torch.arange(2))
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(number, 2, 7, generator=draw) for number in (5, 4, 2)]
    seen = 3 + sum(part[column] for part, column in zip(parts, values.T, strict=True))
    attributes = dict(zip(("io", "s", "order"), values.T, strict=True))
    others = SimpleNamespace(attributes=attributes)
    some = torch.tensor([3, 17, 30])
    prompts = SimpleNamespace(ids=some, attributes={name: of[some] for name, of in attributes.items()})
    torch.testing.assert_close(composed(seen, others, prompts), seen[some])  # type: ignore[arg-type]
    prompts.attributes["io"] = torch.tensor([9, 9, 9])  # that nobody else has
    mean = seen.mean(dim=0)
    without = seen[some] - torch.stack([seen[values[:, 0] == values[each, 0]].mean(dim=0) for each in some]) + mean
    torch.testing.assert_close(composed(seen, others, prompts), without)  # type: ignore[arg-type]


def test_as_many_latents_as_are_told_do_carry_induction(prepared: list[circuit.Prepared]) -> None:
    """Of an SAE whose latents are the 64 coordinates that the model was made of: 24 of them are its circuit."""
    case = prepared[0].case
    raw = case.raw
    latents = Latents.__new__(Latents)
    latents.ids = torch.arange(raw.shape[1])
    latents.W, latents.mean, latents.norm = torch.eye(raw.shape[1]), raw.mean(dim=0), torch.ones(len(raw), 1)
    latents.away, latents.none = raw - raw.mean(dim=0), raw.mean(dim=0).expand_as(raw)

    def metric(rows: torch.Tensor) -> torch.Tensor:
        return case.metric(case.with_rows(rows))

    none, whole = (metric(rows).mean() for rows in (latents.none, latents.rows()))

    def share(kept: torch.Tensor) -> float:
        return float((metric(latents.rows(kept)).mean() - none) / (whole - none))

    tokens = torch.arange(TOKENS)
    assert share(torch.cat([tokens, BEFORE + tokens])) > 0.95
    order = latents.attribution(metric).argsort(descending=True)
    assert len(set(order[:TOKENS].tolist()) & set(tokens.tolist())) >= 10
    carry = circuit_latents.carriers(latents, metric)
    found = {each.metric: each.value for each in carry if not isinstance(each, LeftOut)}
    for name, least in (("latents80", 0.8), ("latents90", 0.9)):
        assert share(order[: int(found[name])]) >= least - 1e-4
    assert TOKENS < found["latents80"] <= found["latents90"] < 64
    assert found["gain"] == pytest.approx(float(whole - none), rel=1e-3)
