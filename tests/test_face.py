"""What `import saescale` gives, and the walk-through, on the run of a tiny language model."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import saescale
from saescale.storage.errors import SaescaleError
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.harvest.conduct import HarvestSpec, harvest
from saescale.trainers.preprocess import to_tensor
from saescale.trainers.subjects.subject import get_subject
from saescale.trainers.training.train import PackJob, train_pack

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_and_store(tiny_subject: str, tiny_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A run directory with three cells of a harvest of the tiny language model, as a sweep leaves it."""
    folder = tmp_path_factory.mktemp("face")
    url, out = str(folder / "run"), str(folder / "store")
    harvest(
        HarvestSpec(
            subject=tiny_subject, layer=1, corpus=tiny_corpus, out=out, tokens=4_096, heldout_tokens=1_024,
            context_length=32, row_group_rows=256, compute_dtype="float32",
        )
    )  # fmt: skip
    store = ActivationStore.open(out)
    shared = {
        "store": store.identity, "d_model": 32, "tokens": 4_096, "batch_tokens": 256, "lr": 3e-3,
        "dead_after_tokens": 2_048, "ema": 0.9,
    }  # fmt: skip
    cells = [Cell.model_validate(shared | {"n_latents": n, "k": k}) for n, k in ((64, 4), (128, 4), (128, 8))]
    done = train_pack(
        PackJob(cells=cells, store=out, run=url, sweep="face", eval=EvalSpec(tokens=1_024, every_tokens=2_048))
    )
    run = RunDirectory(url)
    run.write_spec({"name": "face", "store": out, "resolved": {}})
    run.write_results(done.results)
    return url, out


def test_a_name_imports_what_it_needs_when_it_is_used(run_and_store: tuple[str, str]) -> None:
    code = (
        "import sys, saescale; light = set(sys.modules)\n"
        "saescale.open_run(sys.argv[1]).results, saescale.fit\n"
        "heavy = ('torch', 'ray', 'transformers')\n"
        "print([m for m in heavy if m in light or m in sys.modules], [m for m in ('numpy', 'scipy') if m in light])"
    )
    done = subprocess.run([sys.executable, "-c", code, run_and_store[0]], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"
    assert {"open_run", "open_store", "load", "fit", "predict"} <= set(dir(saescale))
    with pytest.raises(AttributeError, match="no attribute 'opn_run'"):
        _ = saescale.opn_run


def test_a_run_gives_its_tables_and_its_saes(run_and_store: tuple[str, str]) -> None:
    url, out = run_and_store
    run = saescale.open_run(url)
    assert run.results.num_rows == 3
    assert run.evals.num_rows == 0
    with pytest.raises(SaescaleError, match=r"no fits\.json yet"):
        _ = run.fits
    store = saescale.open_store(out)
    act = to_tensor(store.heldout().act, store.dtype)
    trained = run.load(n_latents=64)
    assert (trained.cell.n_latents, trained.cell.k) == (64, 4)
    latents, x_hat = trained.encode(act), trained.reconstruct(act)
    assert latents.shape == (1_024, 64)
    # The number that the run recorded comes out of raw activations again.
    x = act.float()
    unit = (x - x.mean(dim=1, keepdim=True)).norm(dim=1, keepdim=True)
    error, spread = ((x - x_hat) / unit).double(), ((x - x.mean(dim=1, keepdim=True)) / unit).double()
    nmse = error.square().sum() / (spread - spread.mean(dim=0)).square().sum()
    recorded = next(row["nmse"] for row in run.results.to_pylist() if row["n_latents"] == 64)
    assert float(nmse) == pytest.approx(recorded, rel=1e-4)
    same = saescale.load(f"{url}/cells/{trained.cell.cell_id}")
    assert torch.equal(same.encode(act), latents)


def test_metrics_stand_beside_the_results_of_their_cells(run_and_store: tuple[str, str], tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path))
    rows = saescale.open_run(run_and_store[0]).results.to_pylist()
    directory.write_spec({"name": "face", "resolved": {}})
    directory.write_results(rows)
    kl = {"metric": "kl", "value": 0.5, "low": 0.4, "high": 0.6}
    directory.write_evals(rows[1]["cell_id"], "downstream_loss", [kl, kl | {"at": "position 1", "value": 9.0}])
    run = saescale.open_run(str(tmp_path))
    table = run.metrics
    assert table.column_names[-3:] == [f"downstream_loss.kl{end}" for end in ("", ".low", ".high")]
    assert table.select(table.column_names[:-3]).equals(run.results)
    assert [table[name].to_pylist() for name in table.column_names[-3:]] == [
        [None, value, None] for value in (0.5, 0.4, 0.6)
    ]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"k": 4}, "2 finished cells with k = 4; there are topk n_latents = 64 k = 4 seed = 0, topk n_latents = 128"),
        ({}, "3 finished cells with no more said"),
        ({"n_latents": 65, "k": 4}, "no finished cell with n_latents = 65 and k = 4; there are topk n_latents = 64"),
    ],
)
def test_none_or_several_cells_are_one_line_that_lists_them(
    run_and_store: tuple[str, str], asked: dict[str, int], said: str
) -> None:
    with pytest.raises(SaescaleError, match=re.escape(said)):
        saescale.open_run(run_and_store[0]).load(**asked)


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SaescaleError, match="is no run directory"):
        saescale.open_run(str(tmp_path))


def test_fit_and_predict_take_a_table() -> None:
    table = str(ROOT / "deploy/results/quickstart/results.csv")
    document = saescale.fit(table, laws=("n_k",), bootstraps=0)
    assert [entry["law"] for entry in document["fits"]] == ["n_k"]
    predicted = saescale.predict(document["fits"][0], n_latents=2_048, k=np.array([8, 32]))
    np.testing.assert_allclose(predicted, [0.2751, 0.1775], rtol=0.02)


def test_diverged_cells_are_fitted_where_that_is_asked(tmp_path: Path) -> None:
    rows = [f"{n},8,{nmse}" for n, nmse in ((64, 0.5), (128, 0.4), (256, 0.33), (512, 0.28), (1_024, 7.0))]
    (tmp_path / "cells.csv").write_text("\n".join(["n_latents,k,nmse", *rows]))
    for keep, points in ((False, 4), (True, 5)):
        found = saescale.fit(str(tmp_path / "cells.csv"), laws=("n",), bootstraps=0, keep_diverged=keep)
        assert [entry["points"] for entry in found["fits"] if not entry["floor"]] == [points]


def test_an_sae_spliced_into_the_model_is_one_call(run_and_store: tuple[str, str]) -> None:
    url, out = run_and_store
    store = saescale.open_store(out)
    subject, trained = get_subject(store.subject, dtype="float32"), saescale.open_run(url).load(n_latents=128, k=8)
    ids = torch.randint(2, 512, (4, 16), generator=torch.Generator().manual_seed(0))
    plain = subject.run(ids, [store.site], logits=True)
    spliced = subject.run(
        ids, [store.site], {store.site: lambda x: trained.reconstruct(x.flatten(0, 1)).view_as(x)}, logits=True
    )
    assert spliced.logits is not None
    assert plain.logits is not None
    assert spliced.logits.shape == plain.logits.shape
    expected = trained.reconstruct(plain.resid[0].flatten(0, 1)).view(4, 16, -1)
    torch.testing.assert_close(spliced.resid[0], expected)
    assert not torch.allclose(spliced.logits, plain.logits)


def test_the_walkthrough_ends_at_the_text_that_a_latent_fires_on(
    run_and_store: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(ROOT / "deploy/examples/walkthrough.py")
    monkeypatch.setattr(sys, "argv", [script, *run_and_store])
    left = runpy.run_path(script)
    said = capsys.readouterr().out
    assert f"latent {left['latent']} fires on" in said
    shown = re.findall(r"^ +(\d+\.\d+)  (.*)\[(.+)\](.*)$", said, re.MULTILINE)
    assert shown
    # The token in brackets is the one of the row on which the latent is most active.
    row = int(left["activity"].argmax())
    token = left["store"].heldout(columns=("token",)).token[row]
    assert shown[0][2] == repr(left["subject"].tokenizer.decode([token]))[1:-1]
    assert float(shown[0][0]) == pytest.approx(float(left["activity"].max()), abs=1e-3)
