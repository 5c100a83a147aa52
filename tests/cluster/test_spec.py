"""The sweep file: what it means as cells, and what it says about mistakes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from saescale.cluster.front.quickstart import full_sweep
from saescale.cluster.sweep.spec import load_spec, parse_spec
from saescale.storage.errors import SaescaleError
from saescale.storage.store import ActivationStore

EXAMPLES = sorted((Path(__file__).parents[2] / "deploy" / "sweeps").glob("*.yaml"))


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    document = yaml.safe_load(yaml.safe_dump(document))
    *parents, last = path.split(".")
    section = document
    for parent in parents:
        section = section[parent]
    if value is KeyError:
        del section[last]
    else:
        section[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("train.batch_token", 256, "train.batch_token is not a key, did you mean batch_tokens?"),
        ("grids", {}, "grids is not a key, did you mean grid?"),
        ("train.auxk.dead_after", 5, "train.auxk.dead_after is not a key, did you mean dead_after_tokens?"),
        ("train.lr.val", 5, "train.lr.val is not a key, did you mean value?"),
        ("train.tokens", "many", "train.tokens:"),
        ("train.ema", 1.5, "train.ema: input should be less than 1 (given: 1.5)"),
        ("grid.k", "8", "grid.k: input should be a valid integer"),
        ("grid.k", [8, "x"], "grid.k.1: input should be a valid integer"),
        ("train.tokens", "1e6", "(given: '1e6'); YAML reads that as text: write 1000000"),
        ("train.tokens", 1e6, "(given: 1000000.0); YAML reads that as a fraction: write 1000000"),
        ("train.tokens", "4,096", "(given: '4,096'); YAML reads that as text: write 4096"),
        ("train.tokens", "1.5M", "(given: '1.5M'); YAML reads that as text: write 1500000"),
        ("train.tokens", "1e999999999", "valid integer (given: '1e999999999')"),
        ("train.lr", "0,001", "(given: '0,001'); YAML reads that as text: write 0.001"),
        ("wandb.project", "a/b", "wandb.project: W&B takes no name with /"),
        ("grid.n_latents", [True], "grid.n_latents.0: input should be a valid integer"),
        ("grid.n_latents", ["64"], "grid.n_latents.0: input should be a valid integer"),
        ("train.batch_tokens", 256.0, "train.batch_tokens: input should be a valid integer"),
        ("grid.n_latents", [0], "grid.n_latents.0: input should be greater than 0 (given: 0)"),
        ("grid.n_latents", [4, 64], "grid: k = 8 is larger than n_latents = 4"),
        ("grid.n_latents", [], "grid.n_latents: list should have at least 1 item"),
        ("grid.architecture", ["topc"], "grid.architecture.0: unknown architecture 'topc': did you mean topk?"),
        ("grid.activation", ["topc"], "grid.architecture.0: unknown architecture 'topc': did you mean topk?"),
        ("grid.architecture", ["softmax", "topk"], "grid.architecture.0: unknown architecture 'softmax': "),
        ("train.settings", {"k_axu": 8}, "k_axu is no setting of topk: did you mean k_aux?"),
        ("train.settings", {"k_aux": -8}, "setting k_aux of topk: Input should be greater than or equal to 0"),
        ("train.tokens", 1000, "train: tokens = 1000 is not a multiple of batch_tokens = 256"),
        ("train.tokens", KeyError, "train.tokens is missing"),
        ("store", KeyError, "store is missing"),
        ("wandb.mode", "yes", "wandb.mode: input should be 'auto', 'online', 'offline' or 'off'"),
        ("eval", ["cor"], "eval.evaluations: unknown evaluation 'cor': did you mean core"),
        ("eval", ["core", {"core": {"where": {"k": 8}}}], "eval.evaluations: core stands there twice"),
        ("eval", [{"core": {"latents": 8}}], "eval.evaluations: core looks at all latents"),
        ("eval", [{"core": {"latent": 8}}], "eval.evaluations.0.latent is not a key, did you mean latents?"),
        ("eval", [{"core": {"where": {"k": 512}}}], "eval.evaluations: core: no cell of the grid with --where k=512"),
        ("eval", [{"core": {"where": {"kk": 8}}}], "eval.evaluations: core: --where kk=8: there is no column kk"),
        ("name", "no/slashes", "name: string should match pattern"),
    ],
)
def test_mistakes_are_named(document: dict[str, Any], sweep_file: Callable[[Any], str], path: str, value: Any,
                            said: str) -> None:  # fmt: skip
    url = sweep_file(changed(document, path, value))
    with pytest.raises(SaescaleError) as caught:
        load_spec(url)
    assert str(caught.value).startswith(f"{url}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_evaluations_of_some_cells(document: dict[str, Any], sweep_file: Callable[[Any], str]) -> None:
    # The store is known only when the sweep runs, so nothing is said against it here.
    given = ["core", {"nmse": {"where": {"n_latents": [32, 999], "store": "any"}}}, "downstream-loss"]
    spec = load_spec(sweep_file(changed(document, "eval", given)))
    written = spec.model_dump(mode="json")
    assert written["eval"]["evaluations"] == [*given[:2], "downstream_loss"]
    assert parse_spec(written, "again") == spec


def test_an_unquoted_off_is_off(document: dict[str, Any], sweep_file: Callable[[Any], str]) -> None:
    assert load_spec(sweep_file(changed(document, "wandb.mode", False))).wandb.mode == "off"


def test_files_that_are_no_sweep(tmp_path: Path) -> None:
    for content, said in (("a: [1", "not valid YAML"), ("- 1", "holds no sweep"), ("", "holds no sweep")):
        (tmp_path / "sweep.yaml").write_text(content)
        with pytest.raises(SaescaleError, match=said):
            load_spec(str(tmp_path / "sweep.yaml"))
    with pytest.raises(SaescaleError, match="no sweep file"):
        load_spec(str(tmp_path / "none.yaml"))


def test_a_grid_becomes_cells(document: dict[str, Any], store: ActivationStore) -> None:
    document["train"]["tokens"] = {"at": 64, "tokens": 16384, "exponent": 1.0}
    spec = parse_spec(document, "test")
    cells = spec.cells(store, "fp32")
    assert len(cells) == spec.size == 9
    assert len({cell.cell_id for cell in cells}) == 9
    by_n = {cell.n_latents: cell for cell in cells}
    assert {n: cell.tokens for n, cell in by_n.items()} == {32: 8192, 64: 16384, 128: 32768}
    assert by_n[128].lr == pytest.approx(3e-3 * 2**-0.5)
    document["eval"]["tokens"] = 1_024
    others = parse_spec(document, "test").cells(store, "fp32")
    assert not {cell.cell_id for cell in cells} & {cell.cell_id for cell in others}
    assert all(cell.store == store.fingerprint and cell.d_model == store.d_model for cell in cells)


def test_auto_k_aux_is_the_power_of_two_nearest_half_of_d_model(
    document: dict[str, Any], store: ActivationStore
) -> None:
    document["train"]["auxk"]["k"] = "auto"
    assert {cell.settings["k_aux"] for cell in parse_spec(document, "test").cells(store, "fp32")} == {16}  # d_model 32


def test_settings_reach_the_architectures_that_have_them(
    document: dict[str, Any], store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "trainers" / "architectures" / "README.md").read_text()
    (tmp_path / "architectures").mkdir()
    (tmp_path / "architectures" / "toy.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path))
    document["grid"] |= {"n_latents": [64], "k": [4], "architecture": ["topk", "toy"]}
    document["train"] |= {"settings": {"share": 0.3}, "multi_topk": True, "precision": "auto"}
    cells = {cell.architecture: cell for cell in parse_spec(document, "test").cells(store, "bf16")}
    assert cells["topk"].settings == {"k_aux": 8, "multi_topk": True}
    assert cells["toy"].settings == {"share": 0.3}
    assert (cells["topk"].precision, cells["toy"].precision) == ("bf16", "fp32")
    document["train"]["settings"] = {"shared": 0.3}
    with pytest.raises(SaescaleError, match="shared is no setting of topk or toy: did you mean share") as caught:
        parse_spec(document, "test")
    assert "\n" not in str(caught.value)


def test_activation_is_the_old_name_of_architecture(document: dict[str, Any], store: ActivationStore) -> None:
    now = parse_spec(document, "test").cells(store, "fp32")
    document["grid"]["activation"] = ["topk"]
    document["grid"]["cells"] = [{"n_latents": 64, "k": 4, "activation": "topk"}]
    old = parse_spec(document, "test")
    assert set(now) <= set(old.cells(store, "fp32"))
    written = old.model_dump(mode="json")["grid"]
    assert written["architecture"] == ["topk"]
    assert "activation" not in written


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("smollm2-135m", "circuits", "maze"):  # what patterns of theirs match
        for layer in (0, 14):
            (tmp_path / f"stores/{name}/resid_post.{layer}").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert load_spec(str(path)).size >= 4


def test_the_example_is_the_quickstart() -> None:
    """The numbers of the quickstart's sweep stand in deploy/sweeps too, to be edited."""
    example = load_spec(str(next(path for path in EXAMPLES if path.name == "smollm2.yaml")))
    ours = full_sweep()
    assert example.grid == ours.grid
    assert example.train == ours.train
    assert (example.eval, example.store) == (ours.eval, ours.store)
