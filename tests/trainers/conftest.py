"""A synthetic activation store, and cells over it."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from saescale.storage.store import ActivationStore
from saescale.trainers.cell import Cell
from tests.trainers.synthetic import D_MODEL, sparse_rows, write_store

README = Path(__file__).parents[2] / "trainers" / "architectures" / "README.md"


@pytest.fixture(scope="session")
def sparse_store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    url = str(tmp_path_factory.mktemp("sparse") / "store")
    write_store(url, sparse_rows(16_384, seed=0), sparse_rows(2_048, seed=1))
    return ActivationStore.open(url)


@pytest.fixture(scope="session")
def make_cell(sparse_store: ActivationStore) -> Callable[..., Cell]:
    """Cells over `sparse_store`, small and quick unless told otherwise."""

    def make(**fields: object) -> Cell:
        defaults = {
            "store": sparse_store.fingerprint, "d_model": D_MODEL, "n_latents": 64, "k": 3, "tokens": 8_192,
            "batch_tokens": 256, "lr": 3e-3, "dead_after_tokens": 2_048, "ema": 0.9,
        }  # fmt: skip
        if fields.get("architecture", "topk") == "topk":
            own = {name: fields.pop(name) for name in ("k_aux", "multi_topk") if name in fields}
            defaults["settings"] = {"k_aux": 16} | own
        return Cell.model_validate(defaults | fields)

    return make


@pytest.fixture
def run_url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example of the page, where a user would put it."""
    block = re.search(r"```python\n(# architectures/toy\.py\n.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    source = block.group(1)
    assert len(source.splitlines()) < 60
    (tmp_path / "own" / "architectures").mkdir(parents=True)
    (tmp_path / "own" / "architectures" / "toy.py").write_text(source)
    monkeypatch.setenv("SAESCALE_PATH", str(tmp_path / "own"))
    return "toy"
