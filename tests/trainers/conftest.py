"""Small real language models with random weights, and a synthetic store, for tests of what happens to them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.activations import ActivationStore
from tests.trainers.synthetic import D_MODEL, sparse_rows, write_store
from trainers.cell import Cell
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
            "batch_tokens": 256, "lr": 3e-3, "k_aux": 16, "dead_after_tokens": 2_048, "ema": 0.9,
        }  # fmt: skip
        return Cell.model_validate(defaults | fields)

    return make


@pytest.fixture
def run_url(tmp_path: Path) -> str:
    return str(tmp_path / "run")
