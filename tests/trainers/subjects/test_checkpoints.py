"""Folders of models that are not whole: one line that names what is missing, and never random weights."""

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.storage.manifest import Site
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.subject import check_sites_before_loading, get_subject

SITE = Site(layer=1, positions="all")
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def whole(save_subject: Callable[..., str]) -> Path:
    """A Llama with 2 layers, d_model 16, as save_pretrained writes it."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return Path(save_subject("whole", config).removeprefix("hf:"))


@pytest.fixture(scope="session")
def fingerprint(whole: Path) -> str:
    return get_subject(f"hf:{whole}").fingerprint


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    changed = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
    save_file(changed, path, metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def only(folder: Path, **texts: str) -> None:
    """The folder with nothing but these files, `_json` for `.json`."""
    for path in folder.iterdir():
        path.unlink()
    for name, text in texts.items():
        (folder / name.replace("_json", ".json")).write_text(text)


def in_shards(folder: Path) -> list[Path]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    return sorted(folder.glob("model-*"))


def as_pickle(folder: Path) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(SaescaleError) as caught:
        get_subject(f"hf:{folder}", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


# --- weights that are not read, or read into nothing


def without_mlp(folder: Path) -> None:
    rewrite(folder, lambda found: {name: each for name, each in found.items() if "layers.1.mlp" not in name})


def behind_a_wrapper(folder: Path) -> None:
    rewrite(folder, lambda found: {f"module.{name}": each for name, each in found.items()})


def compiled(folder: Path) -> None:
    rewrite(folder, lambda found: {name.replace("model.", "model._orig_mod."): each for name, each in found.items()})


def with_an_adapter_left(folder: Path) -> None:
    rewrite(folder, lambda found: {**found, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)})


def added(**weights: torch.Tensor) -> Callable[[Path], None]:
    """Beside the whole weights these, `__` for `.`."""
    extra = {name.replace("__", "."): each for name, each in weights.items()}
    return lambda folder: rewrite(folder, lambda found: {**found, **extra})


def in_integers(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    norm = "model.norm.weight"
    rewrite(folder, lambda found: {**found, name: (found[name] * 100).to(torch.int8), norm: found[norm] > 0})


def in_integers_in_a_pickle(folder: Path) -> None:
    in_integers(folder)
    as_pickle(folder)


def body(found: Weights) -> Weights:
    """As AutoModel saves it: no head, no prefix."""
    return {name.removeprefix("model."): each for name, each in found.items() if name.startswith("model.")}


def body_of_more_layers(folder: Path) -> None:
    rewrite(folder, body)
    configure(folder, num_hidden_layers=1)


NOT_LOADED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a part of a layer is missing": (without_mlp, r"lack 3 of the model's weights, .* model.layers.1.mlp.down_proj"),
    "a prefix": (behind_a_wrapper, r"lack 21 of the model's weights, .*embed_tokens.* \.\.\. and 16 more"),
    "a compiled model's prefix": (compiled, r"20 weights of the files have no place .*_orig_mod"),
    "fewer layers than config.json": (
        lambda folder: configure(folder, num_hidden_layers=3),
        r"lack 9 .*model.layers.2",
    ),
    "more layers than config.json": (
        lambda folder: configure(folder, num_hidden_layers=1),
        r"9 weights of the files have no place in the model: model.layers.1.",
    ),
    "more layers without a prefix": (body_of_more_layers, r"9 weights of the files have no place .*layers.1."),
    "an adapter that was not merged": (with_an_adapter_left, "1 weights of the files .*q_proj.lora_A.weight"),
    "another adapter's prefix": (
        added(base_model__model__model__layers__0__self_attn__q_proj__lora_A__weight=torch.ones(4, 16)),
        "1 weights of the files .*: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight;",
    ),
    "an adapter of its own": (added(lora__layers__0__q__weight=torch.ones(4, 16)), "1 weights .*: lora.layers.0.q"),
    "a second copy": (
        added(module__model__layers__0__self_attn__q_proj__weight=torch.ones(16, 16)),
        "1 weights of the files .*: module.model.layers.0.self_attn.q_proj.weight;",
    ),
    "a bias that is no mask": (added(model__layers__0__self_attn__bias=torch.ones(16)), "1 weights .*0.self_attn.bias"),
    "integers without a scale": (
        in_integers,
        "2 weights are whole numbers .*: model.layers.0.mlp.up_proj.weight, model.norm",
    ),
    "integers in a pickle": (in_integers_in_a_pickle, "2 weights are whole numbers .*: model.layers.0.mlp.up_proj"),
    "another width": (
        lambda folder: configure(folder, hidden_size=32),
        r"another shape .*lm_head.weight \(\[512, 16\] in the files, \[512, 32\] in the model\)",
    ),
}


@pytest.mark.parametrize("case", NOT_LOADED)
def test_every_weight_that_is_not_loaded_is_named(folder: Path, case: str) -> None:
    spoil, said = NOT_LOADED[case]
    spoil(folder)
    with pytest.raises(SaescaleError, match=said):
        get_subject(f"hf:{folder}")
    refused(folder)


def test_heads_and_tables_are_put_aside(folder: Path, fingerprint: str) -> None:
    tables = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.1.attn.masked_bias": torch.ones(1),
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4),
        "model.layers.1.self_attn.bias": torch.ones(4, 4, dtype=torch.bool),
        "score.weight": torch.ones(2, 16),
        "value_head.0.weight": torch.ones(1, 16),
        "vision_model.model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8),
        "v_head.summary.weight": torch.ones(1, 16),
    }
    rewrite(folder, lambda found: {**found, **tables})
    assert get_subject(f"hf:{folder}").fingerprint == fingerprint


def test_without_a_head_there_are_rows_and_no_logits(whole: Path, folder: Path) -> None:
    rewrite(folder, body)
    first, again = get_subject(f"hf:{folder}"), get_subject(f"hf:{folder}")
    assert first.fingerprint == again.fingerprint  # what was drawn for the head is not in it
    ids = torch.arange(2, 22)[None]
    assert torch.equal(first.run(ids, [SITE]).resid[0], get_subject(f"hf:{whole}").run(ids, [SITE]).resid[0])
    with pytest.raises(SaescaleError, match=r"gives no logits: its files lack the weights lm_head.weight"):
        first.run(ids, [SITE], logits=True)


def test_weights_that_are_no_numbers_are_refused_and_zeros_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda found: {**found, name: found[name] * 0})
    with pytest.warns(SaescaleWarning, match=f"all zeros, .*: {name}"):
        get_subject(f"hf:{folder}")
    rewrite(folder, lambda found: {**found, name: found[name] / 0})
    assert f"{name} holds NaN or infinity" in refused(folder)


def test_other_ways_to_store_the_same_weights_are_the_same_subject(whole: Path, folder: Path, fingerprint: str) -> None:
    assert len(in_shards(folder)) > 1
    assert get_subject(f"hf:{folder}").fingerprint == fingerprint
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    as_pickle(folder)
    assert get_subject(f"hf:{folder}").fingerprint == fingerprint


# --- files that are missing or others


def beheaded(folder: Path) -> None:
    for path in in_shards(folder)[:2]:
        path.unlink()


def no_weight_map(folder: Path) -> None:
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def cut_pickle(folder: Path) -> None:
    path = as_pickle(folder)
    path.write_bytes(path.read_bytes()[:1000])


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def code_in_a_pickle(folder: Path) -> None:
    torch.save({"weight": Code()}, as_pickle(folder))


def adapter(folder: Path) -> None:
    only(folder, adapter_config_json='{"base_model_name_or_path": "some/base"}', README="")


def nested(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "copy")
    only(folder)
    shutil.move(folder.parent / "copy", folder / "checkpoint-500")


def folder_of_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def no_class(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")


def damaged_pieces(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x00\x01damaged" * 20)


NO_VOCABULARY = "the tokenizer in .* holds no vocabulary that can be read; copy tokenizer.json of the model there"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 99\n"
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (only, "is empty; give the folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "an adapter": (adapter, "holds an adapter .* of some/base; merge both"),
    "a checkpoint below": (nested, "holds no config.json; did you mean hf:.*/checkpoint-500"),
    "GGUF": (lambda folder: only(folder, **{"model.gguf": ""}), "holds a GGUF file and no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights .*, but config.json"),
    "a folder of weights": (folder_of_weights, r"model.safetensors is a folder where a file with weights should be"),
    "weights of Mistral's own": (
        lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors"),
        r"does not read \(consolidated.safetensors\); give the model.safetensors",
    ),
    "no tokenizer": (lambda folder: [p.unlink() for p in folder.glob("tok*")], "holds no tokenizer"),
    "half a tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), NO_VOCABULARY),
    "a tokenizer of no class": (no_class, NO_VOCABULARY),
    "a damaged tokenizer.model": (damaged_pieces, NO_VOCABULARY),
    "no vocabulary": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        r"holds no vocabulary that can be read \('added_tokens'\); copy",
    ),
    "missing shards": (beheaded, r"lacks model-00001-of-\d+.safetensors, model-00002.* of the \d+ files"),
    "no shards": (no_weight_map, "index.json has no weight_map"),
    "cut weights": (lambda folder: truncate(folder, 3000), "model.safetensors is truncated: 3,000 bytes,"),
    "cut header": (lambda folder: truncate(folder, 100), "is truncated or no safetensors"),
    "nothing": (lambda folder: truncate(folder, 0), "is truncated or no safetensors"),
    "pointer": (lambda folder: (folder / "model.safetensors").write_text(POINTER), "is a Git LFS pointer"),
    "pointer to a tokenizer": (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "is a Git LFS pointer"),
    "cut pickle": (cut_pickle, "the weights in .* cannot be read|damaged pickle"),
    "code in a pickle": (code_in_a_pickle, "more than weights and is not read for safety"),
    "cut tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"ver'),
        r"the tokenizer in .* holds no vocabulary that can be read \(Unterminated string",
    ),
    "cut config": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged: not JSON"),
    "no type": (lambda folder: (folder / "config.json").write_text("{}"), "names no model_type"),
    "unknown type": (lambda folder: configure(folder, model_type="saunet"), "knows no model_type 'saunet'"),
    "images": (lambda folder: configure(folder, model_type="vit"), "no causal language model of the type 'vit'"),
    "encoder-decoder": (lambda folder: configure(folder, model_type="t5"), "t5 is an encoder-decoder model"),
    "quantised": (
        lambda folder: configure(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "GPTQ quantized model requires",
    ),
    "unknown activation": (
        lambda folder: configure(folder, hidden_act="nonsense"),
        r"config.json cannot be used \(hidden_act is 'nonsense', which transformers does not know\)",
    ),
    "wrong number": (lambda folder: configure(folder, num_hidden_layers="three"), "config.json cannot be used"),
}


def truncate(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("case", FILES)
def test_what_is_missing_or_damaged_is_named(folder: Path, case: str) -> None:
    spoil, said = FILES[case]
    spoil(folder)
    with pytest.raises(SaescaleError, match=said):
        get_subject(f"hf:{folder}")
    refused(folder)


def test_a_file_or_a_folder_with_a_revision_is_refused(whole: Path) -> None:
    with pytest.raises(SaescaleError, match=r"is a file; give the folder"):
        get_subject(f"hf:{whole}/model.safetensors")
    for odd in (f"/{'x' * 300}", "~nobody-of-this-name/model"):
        with pytest.raises(SaescaleError, match=r"there is no such folder"):
            get_subject(f"hf:{odd}")
    with pytest.raises(SaescaleError, match=r"a folder has no revisions, so 'step1000' cannot be taken"):
        get_subject(f"hf:{whole}@step1000")


def test_a_wrong_layer_is_told_before_weights_are_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    check_sites_before_loading(f"hf:{folder}", [1], 64)
    with pytest.raises(SaescaleError, match="has no layer 2: its 2 layers are 0 to 1"):
        check_sites_before_loading(f"hf:{folder}", [2], 64)
    with pytest.raises(SaescaleError, match="at most 64 tokens, not 65"):
        check_sites_before_loading(f"hf:{folder}", [1], 65)
    check_sites_before_loading("smollm2-135m", [29], 64)
    with pytest.raises(SaescaleError, match="smollm2-135m has no layer 30"):
        check_sites_before_loading("smollm2-135m", [30], 64)


def test_a_damaged_file_that_no_model_needs_is_nobodys_concern(folder: Path, fingerprint: str) -> None:
    (folder / "trainer_state.json").write_text("{")
    assert get_subject(f"hf:{folder}").fingerprint == fingerprint


# --- code that comes with a model


@pytest.fixture
def with_code(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Llama of a type that only its own code knows."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    configure(folder, model_type="ours", auto_map={"AutoConfig": "ours.Ours", "AutoModelForCausalLM": "ours.Model"})
    (folder / "ours.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Ours(LlamaConfig):\n    model_type = 'ours'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Ours\n"
    )
    return folder


def test_code_of_a_models_own_runs_only_where_it_is_allowed(
    with_code: Path, monkeypatch: pytest.MonkeyPatch, fingerprint: str
) -> None:
    monkeypatch.setattr("builtins.input", lambda *given: pytest.fail("it asks, behind a progress display"))
    assert "code of its own, which runs only where you allow it (read that code, then use --trust" in refused(with_code)
    with pytest.raises(SaescaleError, match="runs only where you allow it"):
        check_sites_before_loading(f"hf:{with_code}", [1], 8)
    check_sites_before_loading(f"hf:{with_code}", [1], 8, trust_remote_code=True)
    assert get_subject(f"hf:{with_code}", trust_remote_code=True).fingerprint == fingerprint
    spec = HarvestSpec(subject=f"hf:{with_code}", layer=1, out="out", trust_remote_code=True)
    assert pickle.loads(pickle.dumps(spec)).trust_remote_code  # an actor is told
    assert spec.identity(reads_text=True) == spec.model_copy(update={"trust_remote_code": False}).identity(True)
    with pytest.raises(SaescaleError, match=r"smollm2-135m comes with no code .* leave --trust-remote-code out"):
        get_subject("smollm2-135m", trust_remote_code=True)


# --- anything


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]),
    kind=st.sampled_from(["drop", "cut", "flip", "zeros"]),
    at=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_a_damaged_folder_gives_the_model_or_one_line(
    whole: Path, fingerprint: str, tmp_path: Path, name: str, kind: str, at: float, bit: int
) -> None:
    folder = shutil.copytree(whole, tmp_path / "any", dirs_exist_ok=True)
    path = Path(folder) / name
    content = bytearray(path.read_bytes())
    place = int(at * len(content))
    if kind == "flip":
        content[place] ^= 1 << bit
    elif kind == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    path.write_bytes(content[:place] if kind == "cut" else content)
    if kind == "drop":
        path.unlink()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SaescaleWarning)
            subject = get_subject(f"hf:{folder}", dtype="float32")
    except SaescaleError:
        refused(Path(folder))
        return
    same = name != "model.safetensors" or bytes(path.read_bytes()) == (whole / name).read_bytes()
    assert (subject.fingerprint == fingerprint) == same
