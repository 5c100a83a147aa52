"""Models of other layouts than a Llama's: the rows are the model's own, or one line says why there are none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models
from transformers import AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.trainers.subjects.subject import get_subject

SHAPE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 512, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
FIRST, LAST = Site(layer=0, positions="all"), Site(layer=1, positions="all")


def picture_reader(text: dict[str, Any], **more: Any) -> PreTrainedModel:
    """A Llava whose vision tower has as many layers as its language model."""
    tower = {**SHAPE, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    config = tf.LlavaConfig(text_config={**SHAPE, **text}, vision_config=tower, image_token_index=511, **more)
    return AutoModelForImageTextToText.from_config(config)


# Each with the longest context that it takes.
READ: dict[str, tuple[Callable[[], Any], int | None]] = {
    "blocks that return lists": (lambda: tf.OpenAIGPTConfig(**GPT), 32),
    "blocks that return tuples": (lambda: tf.BloomConfig(vocab_size=512, hidden_size=16, n_layer=2, n_head=2), None),
    "positions behind padding": (lambda: tf.RobertaConfig(**SHAPE, is_decoder=True, max_position_embeddings=34), 32),
    "positions behind an offset": (
        lambda: tf.BioGptConfig(**SHAPE, max_position_embeddings=32),
        32,
    ),
    "state space": (lambda: tf.MambaConfig(vocab_size=512, hidden_size=16, num_hidden_layers=2, state_size=4), None),
    "recurrent": (lambda: tf.RwkvConfig(vocab_size=512, hidden_size=16, num_hidden_layers=2, context_length=32), 32),
    "experts": (lambda: tf.MixtralConfig(**SHAPE, num_key_value_heads=1, num_local_experts=4), 4096 * 32),
    "images and text": (lambda: picture_reader({"model_type": "llama"}), 2048),
}


@pytest.mark.parametrize("layout", READ)
def test_the_rest_of_a_model_runs_on_what_its_blocks_gave(save_subject: Callable[..., str], layout: str) -> None:
    make, longest = READ[layout]
    subject = get_subject(save_subject("model", make()), dtype="float32")
    assert subject.max_positions == longest
    ids = torch.randint(2, 500, (3, min(longest or 32, 32)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = subject.model(input_ids=ids, use_cache=False).logits
    plain = subject.run(ids, [FIRST, LAST], logits=True)
    patched = subject.run(ids, [LAST], {FIRST: lambda x: x.clone()}, logits=True)
    assert torch.equal(plain.logits, wanted)
    assert torch.equal(patched.logits, wanted)
    assert torch.equal(patched.resid[0], plain.resid[1])
    # Nothing but the last block's stream reaches the head.
    zero = subject.run(ids, [], {LAST: torch.zeros_like}, logits=True).logits
    assert torch.equal(zero, zero[:1, :1].expand_as(zero))
    assert not torch.equal(zero, wanted)


def altup() -> Any:
    return tf.Gemma3nTextConfig(
        **SHAPE, vocab_size_per_layer_input=512, hidden_size_per_layer_input=4, num_key_value_heads=1, head_dim=8,
        num_kv_shared_layers=0, laurel_rank=4, altup_num_inputs=4, activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "BERT": (lambda: tf.BertConfig(**SHAPE), r"no causal language model: in layer 0 .* changes with the tokens behind"),
    "RoBERTa": (lambda: tf.RobertaConfig(**SHAPE), r"no causal language model: in layer 0 .*RobertaForCausalLM"),
    "four streams": (altup, r"layer 0 gives \[4, 1, 16, 16\] where one residual stream is \[1, 16, 16\]"),
    "length first": (
        lambda: tf.XLNetConfig(vocab_size=512, d_model=16, n_layer=2, n_head=2, d_inner=32),
        r"layer 0 gives \[16, 1, 16\]|a forward pass over 16 tokens of text fails",
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_without_a_causal_stream_is_refused(save_subject: Callable[..., str], kind: str, dtype: str) -> None:
    make, said = REFUSED[kind]
    name = save_subject("model", make())
    with pytest.raises(SaescaleError, match=said) as caught:
        get_subject(name, dtype=dtype)
    assert "\n" not in str(caught.value)


def test_a_token_without_an_embedding_is_named(save_subject: Callable[..., str]) -> None:
    name = save_subject("small", tf.GPT2Config(**{**GPT, "vocab_size": 400}))
    with pytest.raises(SaescaleError, match=r"its tokenizer gives token \d+ \('.*'\), and its embedding ends at 399"):
        get_subject(name)
    subject = get_subject(save_subject("large", tf.GPT2Config(**GPT)))
    subject.tokenizer.add_tokens(["saescale"])
    assert len(subject.tokenize(["other words"])[0])
    with pytest.raises(SaescaleError, match=r"gives token 512 \('saescale'\), and its embedding ends at 511"):
        subject.tokenize(["other words", "saescale"])
    with pytest.raises(SaescaleError, match="gives token 512"):
        subject.run(torch.tensor([[1, 512]]), [FIRST])


def test_a_tokenizer_that_knows_no_word_is_refused(save_subject: Callable[..., str]) -> None:
    name = save_subject("wordless", tf.GPT2Config(**GPT))
    empty = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=empty, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(Path(name.removeprefix("hf:")))
    with pytest.raises(SaescaleError, match=r"holds no vocabulary that can be read; copy tokenizer.json"):
        get_subject(name)


def test_a_tokenizer_of_moves_alone_will_do(save_subject: Callable[..., str]) -> None:
    name = save_subject("chess", tf.GPT2Config(**GPT))
    moves = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "1": 2, "5": 3}, []))
    PreTrainedTokenizerFast(tokenizer_object=moves, bos_token="<s>", eos_token="</s>").save_pretrained(
        Path(name.removeprefix("hf:"))
    )
    subject = get_subject(name)
    assert [len(ids) for ids in subject.tokenize(["prose", "1551"])] == [0, 4]


def test_a_table_of_positions_that_ends_is_one_line(save_subject: Callable[..., str]) -> None:
    subject = get_subject(save_subject("short", tf.GPT2Config(**GPT)))
    subject.max_positions = None  # as of a model whose table has another name
    with pytest.raises(SaescaleError, match=r"over \[1, 33\] tokens fails .* use a smaller --context-length"):
        subject.run(torch.ones(1, 33, dtype=torch.int64), [FIRST])
