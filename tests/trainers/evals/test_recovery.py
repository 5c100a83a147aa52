"""recovery against loops and all permutations, and an SAE that was planted to find every feature."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from scipy import sparse

from saescale.storage.errors import SaescaleError
from saescale.storage.store import ActivationStore
from saescale.trainers.architectures.architecture import Shape
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.evals import recovery
from saescale.trainers.evals.evaluation import Measurement
from saescale.trainers.evals.recovery import Truth, compare
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.dictionary import Dictionary
from saescale.trainers.subjects.subject import get_subject

FEATURES = 12


def by_hand(W_dec: np.ndarray, fires: np.ndarray, directions: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """The whole table from its words, one latent and feature after the other."""

    def detection(latent: int, feature: int) -> tuple[float, float, float]:
        both = float(sum(fires[:, latent] & true[:, feature]))
        if not both:
            return 0.0, 0.0, 0.0
        precision, recall = both / sum(fires[:, latent]), both / sum(true[:, feature])
        return precision, recall, 2 * precision * recall / (precision + recall)

    cosine = np.array([
        [abs(w @ d) / np.linalg.norm(w) / np.linalg.norm(d) for d in directions] for w in W_dec
    ])  # fmt: skip
    n_latents, features = cosine.shape
    rows, columns = (cosine, features) if n_latents <= features else (cosine.T, n_latents)
    mcc = max(np.mean([row[c] for row, c in zip(rows, chosen)]) for chosen in permutations(range(columns), len(rows)))  # noqa: B905
    nearest = [int(np.argmax(row)) for row in cosine]
    of_latents = np.array([detection(latent, feature) for latent, feature in enumerate(nearest)]).mean(axis=0)
    best = [
        max((detection(latent, feature) for latent in range(n_latents)), key=lambda found: found[2])
        for feature in range(features)
        if true[:, feature].any()
    ]
    of_features = np.array(best).mean(axis=0)
    nearest_of_features = cosine.max(axis=0)
    return {
        "mcc": mcc, "uniqueness": len(set(nearest)) / n_latents,
        "precision": of_latents[0], "recall": of_latents[1], "f1": of_latents[2],
        "mmcs": nearest_of_features.mean(), "found": np.mean(nearest_of_features > 0.9),
        "feature_precision": of_features[0], "feature_recall": of_features[1], "feature_f1": of_features[2],
    }  # fmt: skip


@pytest.mark.parametrize(("n_latents", "features"), [(5, 7), (7, 5)])
def test_metrics_are_those_of_loops(n_latents: int, features: int) -> None:
    rng = np.random.default_rng(n_latents)
    directions = rng.normal(size=(features, 6))
    directions -= directions.mean(axis=1, keepdims=True)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    W_dec = rng.normal(size=(n_latents, 6))
    W_dec[0] = -3 * directions[1]  # one of another sign and length
    true = rng.random((300, features)) < 0.2
    true[:, 2] = False  # a feature that never comes
    fires = rng.random((300, n_latents)) < 0.15
    fires[:, 1] = true[:, 3] | fires[:, 1]
    fires[:, 4] = False  # a dead latent
    truth = Truth(
        torch.zeros(300, 6), torch.from_numpy(directions).float(), sparse.csr_array(true.astype(np.int32)),
        true.sum(axis=0),
    )  # fmt: skip
    found = compare(torch.from_numpy(W_dec).float(), sparse.csr_array(fires.astype(np.int32)), truth)
    rows = list(recovery._measurements(found, truth))
    whole = {row.metric: row for row in rows if not row.at}
    wanted = by_hand(W_dec, fires, directions, true)
    assert whole.keys() == wanted.keys() == recovery.metrics.keys()
    for name, value in wanted.items():
        assert whole[name].value == pytest.approx(value, abs=1e-6), name
    assert whole["feature_f1"].n == features - 1
    for name in ("f1", "mmcs", "feature_f1"):
        assert whole[name].low <= whole[name].value <= whole[name].high  # type: ignore[operator]
    of_bins = [row for row in rows if row.at and row.metric == "feature_f1"]
    assert sum(row.value * row.n for row in of_bins) / (features - 1) == pytest.approx(wanted["feature_f1"], abs=1e-6)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, Dictionary]:
    """A store of fewer features than dimensions: there an encoder can tell them apart without error."""
    folder = tmp_path_factory.mktemp("planted")
    spec = {
        "features": FEATURES, "d_model": 32, "hierarchy": None, "frequencies": {"highest": 0.4, "lowest": 0.1},
        "magnitudes": {"spread": 0.3, "spread_deviation": 0.1},
    }  # fmt: skip
    (folder / "my.yaml").write_text(yaml.safe_dump(spec))
    name, out = f"dictionary:{folder}/my.yaml", str(folder / "store")
    harvest(HarvestSpec(subject=name, layer=0, out=out, tokens=64, heldout_tokens=2_000, shard_rows=2_000))
    subject = get_subject(name)
    assert isinstance(subject, Dictionary)
    return ActivationStore.open(out), subject


def sae(W_enc: torch.Tensor, W_dec: torch.Tensor, threshold: float) -> Trained:
    n_latents, d_model = W_dec.shape
    cell = Cell(
        store="s", d_model=d_model, n_latents=n_latents, k=4, architecture="relu", tokens=64, batch_tokens=64, lr=1e-3,
        dead_after_tokens=64, ema=0.9,
    )  # fmt: skip
    params = {
        "W_enc": W_enc, "b_enc": torch.full((n_latents,), -threshold), "W_dec": W_dec, "b_pre": torch.zeros(d_model),
    }  # fmt: skip
    return Trained(SAE("relu", Shape(d_model, n_latents), cell.whole_settings, params), cell)


def measured(trained: Trained, planted: tuple[ActivationStore, Dictionary]) -> dict[str, Measurement]:
    store, subject = planted
    rows = recovery.measure(trained, store, subject, recovery.prepare(store, subject))
    return {row.metric: row for row in rows if not row.at}


def test_an_sae_of_the_true_features_finds_them_all(planted: tuple[ActivationStore, Dictionary]) -> None:
    directions = planted[1].directions - planted[1].directions.mean(dim=1, keepdim=True)
    # Latents in another order, of another sign in the decoder: neither makes them other features.
    order = torch.randperm(FEATURES, generator=torch.Generator().manual_seed(1))
    perfect = sae(torch.linalg.pinv(directions).T[order], -directions[order], 0.01)
    found = measured(perfect, planted)
    for name in recovery.metrics:
        assert found[name].value == pytest.approx(1, abs=1e-5), name
    # A second latent for one feature, and one that is nobody's: counted as what they are.
    W_enc = torch.cat([perfect.sae.params["W_enc"], perfect.sae.params["W_enc"][:1], torch.zeros(1, 32)])
    W_dec = torch.cat([perfect.sae.params["W_dec"], perfect.sae.params["W_dec"][:1], perfect.sae.params["W_dec"][1:2]])
    more = measured(sae(W_enc, W_dec, 0.01), planted)
    assert more["uniqueness"].value == pytest.approx(FEATURES / (FEATURES + 2))
    assert more["f1"].value == pytest.approx((FEATURES + 1) / (FEATURES + 2))  # a dead latent detects nothing
    assert more["mcc"].value == pytest.approx(1, abs=1e-5)
    assert more["feature_f1"].value == 1


def test_anchors_are_those_of_random_and_of_true_directions(planted: tuple[ActivationStore, Dictionary]) -> None:
    draw = torch.Generator().manual_seed(3)
    W = torch.nn.functional.normalize(torch.randn(FEATURES, 32, generator=draw), dim=1)
    found = measured(sae(W, W, 0.05), planted)
    # One random decoder is as good as another.
    assert abs(found["mcc"].value - found["mcc_random"].value) < 0.1
    assert found["mcc_random"].value < 0.6
    assert found["mcc_true"].value == pytest.approx(1, abs=1e-5)
    assert found["feature_f1_true"].value > 0.6 > found["feature_f1_random"].value


def test_other_subjects_are_refused() -> None:
    subject = SimpleNamespace(name="toy", labels=("ahead",))
    with pytest.raises(SaescaleError, match="the subject toy is not composed of known features; `dictionary` is"):
        recovery.prepare(None, subject)  # type: ignore[arg-type]
