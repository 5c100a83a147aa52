"""Any Hugging Face causal language model as a subject: tokens in, residual streams and logits out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from saescale.storage.errors import SaescaleError, one_line
from saescale.trainers.device import OutOfMemory, fast_precision, is_out_of_memory
from saescale.trainers.subjects.checkpoint import CONFIG
from saescale.trainers.subjects.layout import max_positions
from saescale.trainers.subjects.spread import Spread, words
from saescale.trainers.subjects.subject import Outline
from saescale.trainers.subjects.texts.tokens import ids_of_texts
from saescale.trainers.subjects.transformer import Transformer
from saescale.trainers.subjects.trial import check_by_trial
from saescale.trainers.subjects.weights import read_config, read_identified


class LanguageModel(Transformer):
    """A frozen causal language model and its tokenizer.

    `bos_token_id` and `eos_token_id` are None where its tokenizer has none.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, fingerprint: str, absent: Sequence[str] = ()) -> None:
        super().__init__(name, model, fingerprint, absent)
        self.spread: Spread | None = None  # what lies on the disk lies there for as long as this is held
        self.tokenizer = tokenizer
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id

    def tokenize(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [tokens], without special tokens, also where the text spells one."""
        texts = list(texts)
        if not texts:
            return []
        found = ids_of_texts(self.tokenizer, texts)
        self.check_ids(np.concatenate(found))
        return found

    def check_ids(self, ids: np.ndarray) -> None:
        """Raises SaescaleError for a token of which the model has no embedding."""
        largest = int(ids.max(initial=0))
        if largest >= self.embedded:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise SaescaleError(
                f"{self.name}: its tokenizer gives token {largest} ({token!r}), and its embedding ends at "
                f"{self.embedded - 1}: the tokenizer is of another model, or tokens were added to it alone; give the "
                "folder the tokenizer of its model"
            )


def load_model(
    name: str,
    source: Path,
    dtype: str = "auto",
    fingerprint: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
    notify: Callable[[str], None] = lambda stage: None,
) -> LanguageModel:
    """Loads the subject `name` from the folder `source`.

    Without `fingerprint` the weights are hashed as they are stored. With `device_map` (spread.py) the layers may lie on
    several devices; how they do, `notify` is told. Raises SaescaleError when something of the model is
    missing or damaged, and when it is no causal language model, by its configuration or as it turns out.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = compute_dtype(dtype, device)
    with told(name, f"{source / CONFIG} cannot be used"):
        read_config(source, trust_remote_code)
    with told(name, f"the tokenizer in {source} cannot be read"):
        tokenizer = read_tokenizer(source, trust_remote_code)
    with told(name, f"the weights in {source} cannot be read"):
        spread = None if device_map is None else Spread(device_map)
        found, fingerprint = read_identified(name, source, wanted, fingerprint, trust_remote_code, spread)
    model = found.model.eval().requires_grad_(False)
    if spread is None:
        model = model.to(device)
    else:
        notify(f"{name} is spread: of its parts {words(model)}")
    subject = LanguageModel(name, model, tokenizer, fingerprint, found.absent)
    subject.spread = spread
    check_by_trial(subject)
    return subject


def read_outline(name: str, source: Path, trust_remote_code: bool = False) -> Outline:
    """What the configuration in the folder `source` says of the subject. Raises SaescaleError like `load_model`."""
    with told(name, f"{source / CONFIG} cannot be used"):
        config = read_config(source, trust_remote_code).get_text_config()
        return Outline(name, int(config.num_hidden_layers), max_positions(config, None))


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The arithmetic of the forward pass: `choice` ("float32", "bfloat16"), or for "auto" its device's."""
    if choice != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]
    return torch.bfloat16 if fast_precision(device) == "bf16" else torch.float32


def read_tokenizer(source: Path, trust_remote_code: bool) -> Any:
    """The tokenizer in the folder `source`. Raises SaescaleError where it knows no word."""
    none = f"the tokenizer in {source} holds no vocabulary that can be read"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # that of the library of tokenizers is of no class of its own
        said = one_line(error)
        if isinstance(error, OSError | ImportError) or "trust_remote_code" in said or is_out_of_memory(error):
            raise
        # Where it can make nothing of the files, transformers asks for packages that would not help.
        why = "" if "backend tokenizer" in said or "tiktoken" in said else f" ({_shortened(said)})"
        raise SaescaleError(f"{none}{why}; copy tokenizer.json of the model there") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise SaescaleError(f"{none}; copy tokenizer.json of the model there")
    return tokenizer


@contextmanager
def told(name: str, what: str) -> Iterator[None]:
    """Keeps transformers silent; what it raises becomes one line that names the subject and `what` failed."""
    try:
        with quiet_transformers():
            yield
    except SaescaleError as error:
        raise SaescaleError(f"cannot load the subject {name}: {error}") from error
    except Exception as error:  # hub, file, JSON, safetensors and configuration errors share no base class
        said = one_line(error)
        if is_out_of_memory(error):
            raise OutOfMemory(f"cannot load the subject {name}: memory ran out ({_shortened(said)})") from error
        if "trust_remote_code" in said:
            what, said = (
                "it comes with Python code of its own, which runs only where you allow it",
                (
                    "read that code, then use --trust-remote-code of saescale harvest, eval or subject show, or "
                    "get_subject(..., trust_remote_code=True); a sweep trains on what was harvested so"
                ),
            )
        elif not isinstance(error, OSError | ValueError | ImportError | RuntimeError):
            said = f"{type(error).__name__}: {said}"
        raise SaescaleError(f"cannot load the subject {name}: {what} ({_shortened(said)})") from error


def _shortened(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps progress bars and advice of transformers and accelerate off a terminal on which a display may stand."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    accelerate = logging.getLogger("accelerate")
    level = accelerate.level
    accelerate.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        accelerate.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
