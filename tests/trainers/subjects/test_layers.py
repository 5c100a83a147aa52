"""Several layers in one pass: each store is the one of a harvest of its layer alone, whatever happened on the way."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.storage.store import ActivationStore
from saescale.trainers.harvest import make_shard as module
from saescale.trainers.harvest import room
from saescale.trainers.harvest.conduct import harvest, harvest_layers
from saescale.trainers.harvest.layers import each_layer
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.subject import get_subject

REPOSITORY = Path(__file__).parents[3]
LAYERS = (0, 2, 3)


@pytest.fixture(scope="module")
def alone(tiny_subject: str, tiny_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> HarvestSpec:
    """Stores of three layers, harvested one by one into folders named after their sites; 3 train and 2 heldout shards
    each. The spec is of their folder."""
    folder = tmp_path_factory.mktemp("alone")
    spec = HarvestSpec(
        subject=tiny_subject,
        corpus=tiny_corpus,
        out=str(folder),
        tokens=2_560,
        heldout_tokens=1_536,
        context_length=32,
        shard_rows=1_024,
        row_group_rows=256,
        batch_contexts=5,
    )
    for layer in LAYERS:
        harvest(spec.model_copy(update={"layer": layer, "out": f"{folder}/resid_post.{layer}"}))
    return spec


@pytest.fixture
def spec(alone: HarvestSpec, tmp_path: Path) -> HarvestSpec:
    return alone.model_copy(update={"out": str(tmp_path / "all")})


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], str]]:
    """Which layers each pass of the subject was for, and of which shard."""
    found: list[tuple[list[int], str]] = []
    whole = module._activations
    monkeypatch.setattr(
        module, "_activations", lambda *a: found.append(([each.layer for each in a[0]], a[-1])) or whole(*a)
    )
    return found


def everything(folder: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


SHARDS = [*(f"train-{n:05d}.parquet" for n in range(3)), *(f"heldout-{n:05d}.parquet" for n in range(2))]


def test_one_pass_writes_the_stores_of_one_harvest_each(
    alone: HarvestSpec, spec: HarvestSpec, passes: list[tuple[list[int], str]]
) -> None:
    told: list[tuple[int, int, float, str]] = []
    manifests = harvest_layers(spec, "3,0,2-3", lambda *now: told.append(now))
    assert everything(spec.out) == everything(alone.out)
    assert passes == [([0, 2, 3], name) for name in SHARDS]
    assert [manifest.site.name for manifest in manifests] == ["resid_post.0", "resid_post.2", "resid_post.3"]
    assert told[-1][:2] == (4_096, 4_096)  # a row is done when it is done for all layers
    assert any(stage.startswith("3 stores (layers 0, 2-3) of 4,096 rows: 0.9 MiB (") for *_, stage in told)
    for manifest in manifests:
        store = ActivationStore.open(f"{spec.out}/{manifest.site.name}")
        store.verify(full=True)
        assert store.manifest == manifest
    # A finished one is returned without a pass, and a layer that is added takes a pass for itself alone.
    assert harvest_layers(spec, LAYERS) == manifests
    assert len(passes) == len(SHARDS)
    harvest_layers(spec, "all")
    assert passes[len(SHARDS) :] == [([1], name) for name in SHARDS]
    assert {name: content for name, content in everything(spec.out).items() if "post.1/" not in name} == everything(
        alone.out
    )


CHILD = """
import os, signal, sys
from saescale.trainers.harvest import conduct, make_shard
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects import language_model
def die(module, name, at):
    whole, calls = getattr(module, name), []
    def call(*given):
        calls.append(given)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*given)
    setattr(module, name, call)
for given in sys.argv[1:]:
    spec, module, name, at = given.split("|")
    if not (child := os.fork()):
        die({"conduct": conduct, "make_shard": make_shard}[module], name, int(at))
        conduct.harvest_layers(HarvestSpec.model_validate_json(spec), "0,2,3")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""
# Where a harvest is killed: which layers are sealed then, and which passes are left.
KILLS: dict[str, tuple[str, list[str], dict[tuple[int, ...], list[str]]]] = {
    "between two notes": ("make_shard|note_plan|2", [], {(0, 2, 3): SHARDS}),
    # The second shard is there of layer 0 alone.
    "between two shards": ("make_shard|write_shard|5", [], {(2, 3): SHARDS[1:2], (0, 2, 3): SHARDS[2:]}),
    "between two seals": ("conduct|write_manifest|2", ["resid_post.0"], {}),
}


@pytest.fixture(scope="module")
def killed(alone: HarvestSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, HarvestSpec]:
    """Harvests that SIGKILL ended, by where."""
    folder = tmp_path_factory.mktemp("killed")
    specs = {name: alone.model_copy(update={"out": str(folder / name)}) for name in KILLS}
    given = [f"{specs[name].model_dump_json()}|{moment}" for name, (moment, _, _) in KILLS.items()]
    subprocess.run([sys.executable, "-c", CHILD, *given], cwd=REPOSITORY, check=True)
    return specs


@pytest.mark.parametrize("where", KILLS)
def test_a_killed_harvest_goes_on_with_what_each_layer_lacks(
    alone: HarvestSpec, killed: dict[str, HarvestSpec], passes: list[tuple[list[int], str]], where: str
) -> None:
    spec, (_, sealed, left) = killed[where], KILLS[where]
    whole, there = everything(alone.out), everything(spec.out)
    assert there
    assert {name: whole[name] for name in there} == there
    assert [name.split("/")[0] for name in there if name.endswith("manifest.json")] == sealed
    harvest_layers(spec, LAYERS)
    assert passes == [(list(layers), name) for layers, names in left.items() for name in names]
    assert everything(spec.out) == whole


def test_a_block_that_writes_over_its_input_moves_no_earlier_site(alone: HarvestSpec) -> None:
    subject: Any = get_subject(alone.subject, dtype="float32")

    def double(block: object, given: tuple[torch.Tensor, ...]) -> None:
        given[0].mul_(2)

    subject._layers[3].register_forward_pre_hook(double)
    ids = torch.arange(32).reshape(2, 16)
    sites = [Site(layer=layer, positions="all") for layer in LAYERS]
    together = subject.run(ids, sites).resid
    for site, resid in zip(sites, together, strict=True):
        assert torch.equal(resid, subject.run(ids, [site]).resid[0])


# --- bad input


def test_other_text_than_that_of_a_sealed_layer_is_refused(
    alone: HarvestSpec, spec: HarvestSpec, tmp_path: Path
) -> None:
    moved = tmp_path / "corpus.jsonl"
    shutil.copy(alone.corpus, moved)
    own = spec.model_copy(update={"corpus": str(moved)})
    harvest_layers(own, [0])
    lines = moved.read_text().splitlines()
    moved.write_text("\n".join(reversed(lines)))
    with pytest.raises(SaescaleError, match=r"resid_post.0 holds another harvest: tokens_xxh3"):
        harvest_layers(own, [0, 1])
    with pytest.raises(SaescaleError, match=r"resid_post.0 holds another harvest: seed is 0 there, 3 here"):
        harvest_layers(own.model_copy(update={"seed": 3}), [0, 1])
    assert not Path(own.out, "resid_post.1").exists()
    # Nor are two that hold other rows taken for one harvest, though each of them is finished.
    harvest(own.model_copy(update={"layer": 1, "out": f"{own.out}/resid_post.1"}))
    with pytest.raises(SaescaleError, match=r"resid_post.1 holds another harvest: tokens_xxh3"):
        harvest_layers(own, [0, 1])


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("0,4", "has no layer 4: its 4 layers are 0 to 3"),
        ("", "--layers must be numbers and ranges"),
        ("0;3", "not '0;3': '0;3' is none"),
        ("1,-2", "'-2' is none"),
        ("3-1", "counts down; write 1-3"),
        ("0-99999999999", "no subject has a layer 99999999999"),
        ([], "no layer is named"),
    ],
)
def test_layers_that_there_are_not_are_one_line(spec: HarvestSpec, layers: Any, said: str) -> None:
    with pytest.raises(SaescaleError, match=said):
        harvest_layers(spec, layers)
    assert not Path(spec.out).exists()


def test_a_store_is_no_folder_of_stores(alone: HarvestSpec) -> None:
    before = everything(alone.out)
    with pytest.raises(SaescaleError, match=r"resid_post.0 is a store itself \(it holds manifest.json\)"):
        each_layer(alone.model_copy(update={"out": f"{alone.out}/resid_post.0"}), "0-1")
    with pytest.raises(SaescaleError, match=r"holds other files \(resid_post.0\)"):
        harvest(alone.model_copy(update={"layer": 1}))
    assert everything(alone.out) == before


def test_a_disk_that_is_too_small_is_told_before_any_pass(
    spec: HarvestSpec, passes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda url: 700_000)
    with pytest.raises(SaescaleError, match=r"3 stores \(layers 0, 2-3\) of 4,096 rows take 0.9 MiB, .* 0.7 MiB free"):
        harvest_layers(spec, LAYERS)
    assert not passes
    assert not Path(spec.out).exists()
    harvest_layers(spec, [0, 2])
