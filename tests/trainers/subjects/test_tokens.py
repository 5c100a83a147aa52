"""Text that spells a special token is text, whatever the kind of tokenizer: no special id comes from a corpus."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.spec import HarvestSpec
from saescale.trainers.subjects.language_model import LanguageModel
from saescale.trainers.subjects.subject import get_subject
from saescale.trainers.subjects.texts.tokens import ids_of_texts

SPELLED = "a<s>b <s> b</s> <|user|> a <pad>b"
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
WORDS = ["<unk>", "<s>", "</s>", "<pad>", "a", "b", "<", ">", "s", "/", "p", "d", "▁", "|", "user"]


def unigram() -> Any:
    """Its vocabulary holds the special tokens, and their scores are the best."""
    found = Tokenizer(models.Unigram([(word, -float(number > 3)) for number, word in enumerate(WORDS)], unk_id=0))
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=found, **NAMES, additional_special_tokens=["<|user|>"])


def word_level() -> Any:
    found = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=found, **NAMES, additional_special_tokens=["<|user|>"])


def python_bytes() -> Any:
    return ByT5Tokenizer(bos_token="<s>")


@pytest.fixture(params=["bytes of BPE", unigram, word_level, python_bytes])
def subject(request: pytest.FixtureRequest, tiny_subject: str, tmp_path: Path) -> LanguageModel:
    if isinstance(request.param, str):
        return get_subject(tiny_subject)
    request.param().save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=8, n_layer=1, n_head=1, n_positions=64)).save_pretrained(tmp_path)
    return get_subject(f"hf:{tmp_path}")


def test_no_text_gives_a_special_id(subject: LanguageModel) -> None:
    tokenizer = subject.tokenizer
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    assert len(special) >= 2
    as_told = tokenizer(SPELLED, add_special_tokens=False)["input_ids"]
    assert special & set(as_told)
    ids, plain = subject.tokenize([SPELLED, "a b"])
    assert not special & set(ids.tolist())
    assert len(plain) >= 2
    assert plain.tolist() == tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert set(plain.tolist()) & set(ids.tolist())


@pytest.mark.parametrize("refusal", [TypeError, ValueError])
def test_a_tokenizer_that_cannot_be_told_is_asked_without(refusal: type[Exception]) -> None:
    class OfCode(ByT5Tokenizer):
        """As code that comes with a model may be written."""

        def __call__(self, *texts: Any, **options: Any) -> Any:
            if "split_special_tokens" in options:
                raise refusal("an unexpected keyword argument 'split_special_tokens'")
            return super().__call__(*texts, **options)

    (ids,) = ids_of_texts(OfCode(), ["ab"])
    assert ids.tolist() == ByT5Tokenizer()("ab", add_special_tokens=False)["input_ids"]


def test_a_harvest_of_spelled_tokens_has_no_bos_in_mid_context(tiny_subject: str, tmp_path: Path) -> None:
    texts = [f"{number}: <s>some</s> markup <s> {number * 7}" for number in range(60)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes = {"tokens": 256, "heldout_tokens": 64, "context_length": 16, "shard_rows": 128, "row_group_rows": 64}
    out = tmp_path / "store"
    harvest(
        HarvestSpec.model_validate(
            {"subject": tiny_subject, "layer": 1, "corpus": f"{tmp_path}/x.jsonl", "out": str(out), **sizes}
        )
    )
    tokenizer = get_subject(tiny_subject).tokenizer  # type: ignore[attr-defined]
    token = np.concatenate([pq.read_table(path)["token"].to_numpy() for path in out.glob("*.parquet")])
    assert not np.isin(token, tokenizer.all_special_ids).any()
    assert {tokenizer.decode([each]) for each in token} >= {"<", ">", "s"}
