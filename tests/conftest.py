"""Fixtures that several floors share."""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.s3_faults import Faults

# Before torch is imported, here and in the processes that tests start: threads that spin while they wait make
# two busy processes on two cores ten times as slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

SaveSubject = Callable[..., str]


# What takes long to make is made once: tests that use it stay in one process of `make test`, the rest goes to whichever
# is free.
SHARED = {"three_nodes": "cluster", "head": "head", "crowd": "mesh", "smollm2_store": "smollm2"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in SHARED.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(SHARED[fixture]))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, Faults]]:
    """A real S3 protocol server on loopback, and what can go wrong with it; AWS_* point every client to it."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    server._server.app = faults = Faults(server._server.app)
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3").create_bucket(Bucket="saescale")
        yield endpoint, faults
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="session")
def s3_endpoint(s3_server: tuple[str, Faults]) -> str:
    """The address of the S3 server."""
    return s3_server[0]


@pytest.fixture
def s3_faults(s3_server: tuple[str, Faults]) -> Faults:
    """Makes the S3 server fail at times."""
    return s3_server[1]


@pytest.fixture
def s3_url(s3_endpoint: str) -> str:
    """A fresh prefix in a bucket of a real S3 protocol server."""
    return f"s3://saescale/{uuid.uuid4().hex}"


# --- small real language models with random weights, for tests that need a subject but not its knowledge


@pytest.fixture(scope="session")
def save_subject(tmp_path_factory: pytest.TempPathFactory) -> SaveSubject:
    """Saves a random model of a transformers configuration (or a model) with a small tokenizer; gives its subject
    name."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

    from saescale.trainers.subjects.texts.text import python_prose

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
        model = AutoModelForCausalLM.from_config(config) if isinstance(config, PreTrainedConfig) else config
        model.save_pretrained(folder)
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
    from saescale.trainers.subjects.texts.text import python_prose

    folder: Path = tmp_path_factory.mktemp("corpus")
    texts = [text[:600] for text in python_prose()[-120:]]
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder / "prose.jsonl")
