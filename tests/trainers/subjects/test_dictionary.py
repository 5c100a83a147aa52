"""The known dictionary: what its spec says is what its activations are, and every wrong spec is one line."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.store import ActivationStore
from saescale.trainers.evals.labels import heldout_labels
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.dictionary import ROWS, Dictionary
from saescale.trainers.subjects.dictionary_spec import DictionarySpec
from saescale.trainers.subjects.hashed import hashed, normal, uniform
from saescale.trainers.subjects.subject import Composed, Generates, get_subject, name_for_other_processes

SITE = Site(layer=0, positions="those that the subject keeps")
SMALL: dict[str, Any] = {"features": 84, "d_model": 16, "hierarchy": {"roots": 4, "branching": 4, "depth": 2}}


def dictionary(**fields: Any) -> Dictionary:
    return Dictionary("dictionary", DictionarySpec.model_validate(SMALL | fields), torch.device("cpu"))


def drawn(subject: Dictionary, sequences: int, seed: int = 5) -> np.ndarray:
    return np.stack([ids for ids, _ in islice(subject.sequences("train", seed), sequences)])


def features(subject: Dictionary, sequences: int) -> np.ndarray:
    """[rows, features]"""
    return subject.label(drawn(subject, sequences))["features"][:, 2:].reshape(-1, subject.spec.features)


def test_hashes_are_splitmix64() -> None:
    """Published outputs for the seed 1234567, and its arithmetic on Python's own integers."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(x) % 2**64 for x in hashed(torch.tensor(1234567), torch.arange(3))] == published
    bits = 2**64 - 1
    for key in (0, -1, 2**63 - 1, 123456789123):
        x = (key + 7 * 0x9E3779B97F4A7C15) & bits
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & bits
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & bits
        assert int(hashed(torch.tensor(key), torch.tensor(6))) % 2**64 == x ^ (x >> 31)


def test_what_is_drawn_is_uniform_and_normal() -> None:
    bits = hashed(torch.tensor(3), torch.arange(200_000))
    assert stats.kstest(uniform(bits).numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal(bits).numpy(), "norm").pvalue > 1e-3
    ends = torch.tensor([0, -1])  # the least and the most
    assert uniform(ends).tolist() == [2.0**-24, 1 - 2.0**-24]
    assert bool(normal(ends).isfinite().all())


def test_an_activation_is_the_sum_of_its_features_and_knows_no_other_row() -> None:
    subject = dictionary(noise=0.1)
    assert isinstance(subject, Composed)
    assert isinstance(subject, Generates)
    ids = drawn(subject, 40)
    resid = subject.run(torch.from_numpy(ids), [SITE]).resid[0].numpy()
    z = subject.label(ids)["features"]
    assert z.shape == (40, ROWS + 2, 84)
    assert not z[:, :2].any()
    assert not resid[:, :2].any()
    noise = (resid - z @ subject.directions.numpy())[:, 2:] / 0.1
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    without = dictionary()
    clean = without.run(torch.from_numpy(ids), [SITE]).resid[0].numpy()
    np.testing.assert_allclose(clean, z @ subject.directions.numpy(), atol=1e-5)
    # A few rows of a few sequences, in another order, to the last bit.
    some = ids[[7, 3]][:, [0, 1, 40, 9, 2]]
    again = without.run(torch.from_numpy(some), [SITE]).resid[0].numpy()
    assert np.array_equal(again, clean[[7, 3]][:, [0, 1, 40, 9, 2]])
    assert np.array_equal(without.label(some)["features"], z[[7, 3]][:, [0, 1, 40, 9, 2]])
    assert (z[:, 2:] > 0).any(axis=2).all()  # no row of nothing


def test_activations_and_labels_are_the_same_bits_without_vector_instructions() -> None:
    """What this processor computes, and what it does with the instructions alone that all have."""
    code = (
        "import numpy as np, sys, torch, xxhash\n"
        "from tests.trainers.subjects.test_dictionary import SITE, Dictionary, DictionarySpec, drawn\n"
        "subject = Dictionary('dictionary', DictionarySpec(features=400, noise=0.1), torch.device('cpu'))\n"
        "ids = drawn(subject, 64)\n"
        "resid = subject.run(torch.from_numpy(ids), [SITE]).resid[0].numpy()\n"
        "for each in (resid, subject.label(ids)['features'], subject.directions.numpy()):\n"
        "    print(xxhash.xxh3_64_hexdigest(np.ascontiguousarray(each).tobytes()))\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | more, capture_output=True, text=True, check=True
        ).stdout
        for more in ({}, {"ATEN_CPU_CAPABILITY": "default"})
    ]
    assert said[0] == said[1]
    assert len(set(said[0].split())) == 3


@pytest.mark.parametrize(("exclusive", "scaled"), [(True, False), (False, True)])
def test_children_fire_only_with_their_parents(exclusive: bool, scaled: bool) -> None:
    tree = SMALL["hierarchy"] | {"exclusive": exclusive, "scaled": scaled}
    even = {"first": 3.0, "last": 3.0, "spread": 0.0, "spread_deviation": 0.0}
    subject = dictionary(hierarchy=tree, magnitudes=even | {"spread": 0.3})
    z = features(subject, 300)
    parent_of = {4 + child: child // 4 for child in range(16)} | {20 + child: 4 + child // 4 for child in range(64)}
    together = 0
    for child, parent in parent_of.items():
        on = z[:, child] > 0
        assert on.any()
        assert (z[on, parent] > 0).all()
        siblings = [other for other, of in parent_of.items() if of == parent and other != child]
        together += int((z[np.ix_(on, siblings)] > 0).sum())
        if scaled:
            # What is left of a child less its parent's part is a draw of its own, around 3.
            own = z[on, child] / (z[on, parent] / 3)
            assert abs(own.mean() - 3) < 5 * 0.3 / np.sqrt(on.sum())
    assert (together == 0) == exclusive


def test_features_fire_as_often_as_the_spec_says() -> None:
    subject = dictionary(
        hierarchy=None, correlations=None, frequencies={"exponent": 0.7, "highest": 0.3, "lowest": 0.01}
    )
    z = features(subject, 400)
    zipf = np.array([rank**-0.7 for rank in range(1, 85)])
    wanted = 0.01 + 0.29 * (zipf - zipf.min()) / (zipf.max() - zipf.min())
    fired = (z > 0).sum(axis=0)
    deviation = (fired - len(z) * wanted) / np.sqrt(len(z) * wanted * (1 - wanted))
    assert np.abs(deviation[1:]).max() < 4.5
    # The first also fires where no other does.
    nothing = np.prod(1 - wanted)
    assert fired[0] / len(z) == pytest.approx(wanted[0] + nothing, abs=0.015)
    sizes = np.array([z[z[:, f] > 0, f].mean() for f in range(84)])
    np.testing.assert_allclose(sizes, np.linspace(5, 4, 84), atol=0.35)


def test_correlations_are_those_of_a_gaussian_copula() -> None:
    """Pairs fire together as often as two normal variables of the factors' covariance exceed both thresholds."""
    frequencies = {"exponent": 0.5, "highest": 0.3, "lowest": 0.1}
    correlations = {"rank": 2, "scale": 0.45}
    subject = dictionary(features=24, hierarchy=None, frequencies=frequencies, correlations=correlations)
    on = features(subject, 700) > 0
    weights = subject._weights.double().numpy()
    covariance = weights @ weights.T
    wanted = subject._chance.double().numpy()
    worst = 0.0
    pairs = [(i, j) for i in range(1, 24) for j in range(i) if j]
    for i, j in pairs:
        both = stats.multivariate_normal([0, 0], [[1, covariance[i, j]], [covariance[i, j], 1]])
        expected = both.cdf(stats.norm.ppf(wanted[[i, j]]))
        seen = (on[:, i] & on[:, j]).mean()
        worst = max(worst, abs(seen - expected) / np.sqrt(expected * (1 - expected) / len(on)))
    assert worst < 4.5
    assert max(abs(covariance[i, j]) for i, j in pairs) > 0.3  # it would show
    assert np.abs(on.mean(axis=0) - wanted)[1:].max() < 0.01


def test_coherence_is_kept_and_what_cannot_be_is_said() -> None:
    subject = dictionary(coherence=0.6)
    cosine = (subject.directions @ subject.directions.T - torch.eye(84)).abs()
    assert float(cosine.max()) <= 0.6
    free = dictionary().directions
    assert float((free @ free.T - torch.eye(84)).abs().max()) > 0.6
    with pytest.raises(SaescaleError, match=r"coherence 0\.24 was not reached: 84 directions in 16 dimensions came to"):
        dictionary(coherence=0.24)


def test_splits_share_nothing_and_a_fingerprint_is_of_the_whole_spec() -> None:
    subject = dictionary()
    seeds = {
        split: {tuple(ids[:2]) for seed in range(3) for ids, _ in islice(subject.sequences(split, seed), 300)}
        for split in ("train", "heldout")
    }
    assert len(seeds["train"]) == len(seeds["heldout"]) == 900
    assert not seeds["train"] & seeds["heldout"]
    assert np.array_equal(drawn(subject, 3), drawn(dictionary(seed=1), 3))  # ids are the harvest's, features the spec's
    assert not np.array_equal(features(subject, 3), features(dictionary(seed=1), 3))
    others = [
        {"seed": 1}, {"noise": 0.1}, {"features": 85}, {"d_model": 17}, {"coherence": 0.9}, {"correlations": None},
        {"hierarchy": None}, {"magnitudes": {"spread": 0.4}}, {"frequencies": {"exponent": 0.6}},
    ]  # fmt: skip
    assert len({dictionary(**other).fingerprint for other in [{}, *others]}) == 1 + len(others)


def test_rows_of_a_store_lead_back_to_their_features(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(SMALL))
    name = f"dictionary:{tmp_path}/my.yaml"
    spec = HarvestSpec(
        subject=name, layer=0, out=str(tmp_path / "store"), tokens=3_000, heldout_tokens=1_000, shard_rows=700
    )
    manifest = harvest(spec)
    assert manifest.context_length == ROWS + 2
    store, subject = ActivationStore.open(spec.out), get_subject(name)
    assert manifest.fingerprint == subject.fingerprint == dictionary().fingerprint
    z = heldout_labels(store, subject)["features"]
    act = store.heldout().act.astype(np.float32)
    np.testing.assert_allclose(act, z @ subject.directions.numpy(), rtol=2e-3, atol=2e-3)  # type: ignore[attr-defined]
    assert np.array_equal(heldout_labels(store, subject, 300)["features"], z[:300])


def test_the_specs_that_are_shipped_are_read() -> None:
    shipped = sorted((Path(__file__).parents[3] / "deploy/subjects").glob("*.yaml"))
    assert shipped
    for path in shipped:
        assert DictionarySpec.model_validate(yaml.safe_load(path.read_text())).features >= 1024


def test_a_relative_spec_means_the_same_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_for_other_processes("dictionary:a/my.yaml") == f"dictionary:{tmp_path}/a/my.yaml"
    assert name_for_other_processes("dictionary:/a/my.yaml") == "dictionary:/a/my.yaml"
    assert name_for_other_processes("dictionary:s3://bucket/my.yaml") == "dictionary:s3://bucket/my.yaml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("featres: 12", "featres is not a key, did you mean features?"),
        ("frequencies: {exponents: 1}", "frequencies.exponents is not a key, did you mean exponent?"),
        ("features: 1,024", "write 1024"),
        ("features: 0", "features: "),
        ("frequencies: {highest: 0.1, lowest: 0.2}", "lowest, 0.2, is above highest, 0.1"),
        ("features: 100", "16 roots with 4 children each to depth 2 are 336 features, and there are 100"),
        ("correlations: {rank: 100, scale: 0.1}", "rank * scale^2 has to be at most 0.5"),
        ("coherence: 0.01", "have a |cosine| of at least 0.0827 among them (Welch's bound), not 0.01"),
        ("noise: .nan", "noise: "),
        ("- 1", "holds no keys"),
        ("a: [", "is not valid YAML"),
    ],
)  # fmt: skip
def test_a_wrong_spec_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(SaescaleError) as caught:
        get_subject(f"dictionary:{tmp_path}/my.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "my.yaml") in str(caught.value)


def test_what_else_it_cannot_do_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SaescaleError, match=r"there is no /nowhere/my\.yaml; a dictionary is a YAML file"):
        get_subject("dictionary:/nowhere/my.yaml")
    with pytest.raises(SaescaleError, match="computes in float32 alone"):
        get_subject("dictionary", dtype="bfloat16")
    with pytest.raises(SaescaleError, match="dictionary has no layer 1: its one site is layer 0"):
        harvest(HarvestSpec(subject="dictionary", layer=1, out=str(tmp_path / "store"), tokens=64, heldout_tokens=64))
