"""Small real language models with random weights, for tests that need a subject but not its knowledge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.text import python_prose

SaveSubject = Callable[..., str]


@pytest.fixture(scope="session")
def save_subject(tmp_path_factory: pytest.TempPathFactory) -> SaveSubject:
    """Saves a random model of a transformers configuration with a small tokenizer; gives its subject name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(python_prose()[:100], trainer)

    def save(name: str, config: Any, **special: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        special = special or {"bos_token": "<s>", "eos_token": "</s>"}
        PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(folder)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return f"hf:{folder}"

    return save


@pytest.fixture(scope="session")
def tiny_subject(save_subject: SaveSubject) -> str:
    """A Llama with 4 layers, d_model 32 and contexts of up to 64 tokens."""
    from transformers import LlamaConfig

    return save_subject(
        "llama",
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        ),
    )


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """120 short documents, about 30,000 tokens of the tiny subject, as a JSON lines file."""
    import json

    folder: Path = tmp_path_factory.mktemp("corpus")
    texts = [text[:600] for text in python_prose()[-120:]]
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder / "prose.jsonl")
