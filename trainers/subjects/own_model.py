"""Models that saescale trains itself, on sequences that a subject makes: from random weights, to a folder of
transformers, and back. What they are models of is for the files that use this (othello.py, maze.py)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from saescale.storage.errors import SaescaleError
from saescale.trainers.device import default_device
from saescale.trainers.subjects.checkpoint import Checkpoint
from saescale.trainers.subjects.language_model import compute_dtype, told
from saescale.trainers.subjects.subject import NO_TARGET, Lesson
from saescale.trainers.subjects.transformer import Transformer
from saescale.trainers.subjects.weights import Weighted, hash_weights, read_config, read_identified

Loaded = TypeVar("Loaded", bound="OwnModel")


class OwnModel(Transformer):
    """A frozen model whose sequences saescale makes."""

    def untrained(self, seed: int = 0) -> Self:
        """The same model with random weights, as training begins with them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(self.model)(self.model.config)
        fingerprint = hash_weights(self.name, Weighted(model, ()))
        return type(self)(f"{self.name} (untrained)", frozen(model.to(self.model.device, self.dtype)), fingerprint)


def gpt2_config(
    vocabulary: int,
    positions: int,
    n_layers: int,
    d_model: int,
    n_heads: int,
    d_mlp: int | None = None,
    spread: float = 0.02,
) -> GPT2Config:
    """Learned positions; without dropout, and with an LM head of its own. `spread` is the standard deviation of random
    weights.

    Raises SaescaleError where the heads do not share d_model evenly.
    """
    _check_heads(d_model, n_heads)
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=d_model,
        n_layer=n_layers,
        n_head=n_heads,
        n_inner=d_mlp,
        initializer_range=spread,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        use_cache=False,
    )


def llama_config(vocabulary: int, positions: int, n_layers: int, d_model: int, n_heads: int) -> LlamaConfig:
    """Rotary positions; the gated MLP has as many weights as that of a GPT-2.

    Raises SaescaleError where the heads do not share d_model evenly, or in odd parts.
    """
    _check_heads(d_model, n_heads)
    if d_model // n_heads % 2:
        raise SaescaleError(
            f"d_model {d_model} gives each of {n_heads} heads {d_model // n_heads} dimensions, and rotary positions "
            f"turn pairs of them; take a multiple of {2 * n_heads}"
        )
    return LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        hidden_size=d_model,
        intermediate_size=8 * d_model // 3,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        use_cache=False,
    )


def _check_heads(d_model: int, n_heads: int) -> None:
    if d_model % n_heads:
        raise SaescaleError(f"d_model {d_model} cannot be shared by {n_heads} heads; take a multiple")


def blank_model(config: GPT2Config | LlamaConfig, seed: int) -> Any:
    """A model with random weights, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config) if isinstance(config, LlamaConfig) else GPT2LMHeadModel(config)


def read_folder(name: str, path: Path, dtype: torch.dtype) -> tuple[Any, str]:
    """The model in a folder as transformers saves it, and what identifies its weights.

    Raises SaescaleError where there is none, or it cannot be read.
    """
    if not path.is_dir():
        raise SaescaleError(f"cannot load the subject {name}: there is no folder {path}")
    checkpoint = Checkpoint(name, path)
    checkpoint.check_config()
    checkpoint.check_weights()
    with told(name, f"the model in {path} cannot be read"):
        read_config(path, trust_remote_code=False)
        weighted, fingerprint = read_identified(name, path, dtype)
    return weighted.model, fingerprint


def shipped(name: str) -> AbstractContextManager[Path]:
    """The folder of that name among the weights that come with saescale."""
    try:
        return as_file(files("saescale.shipped") / name)
    except ModuleNotFoundError as error:  # of an editable install that is older than the weights
        raise SaescaleError(f"the weights of {name} are not installed; install saescale again: make install") from error


def load_own(
    kind: Callable[[str, Any, str], Loaded],
    subject: str,
    rest: str,
    weights: str,
    read: Callable[[str, Path, torch.dtype], tuple[Any, str]],
    dtype: str,
) -> Loaded:
    """The model at the path `rest`, or without one that of the shipped `weights`, as `kind` makes a subject of it: on
    the device of this machine. Raises SaescaleError where `read` or `kind` do."""
    device = default_device()
    wanted = compute_dtype(dtype, device)
    name = f"{subject}:{rest}" if rest else subject
    with nullcontext(Path(rest).expanduser()) if rest else shipped(weights) as path:
        model, fingerprint = read(name, path, wanted)
    return kind(name, frozen(model.to(device)), fingerprint)


def frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def lessons_of(drawn: Iterator[tuple[Tensor, ...]], batch: int) -> Iterator[Lesson]:
    """Lessons of `batch` sequences from parts of any number of them: their numbers [some], ascending, ids, targets and,
    where they branch, branches, int64 [some, length] each. Columns at the end that no sequence of a lesson has a target
    in are left out."""
    waiting: tuple[Tensor, ...] = ()
    for part in drawn:
        waiting = tuple(map(torch.cat, zip(waiting, part, strict=True))) if waiting else part
        while len(waiting[0]) >= batch:
            numbers, ids, targets, *branch = (each[:batch] for each in waiting)
            waiting = tuple(each[batch:] for each in waiting)
            used = int((targets != NO_TARGET).any(dim=0).nonzero().max()) + 1
            yield Lesson(ids[:, :used], targets[:, :used], int(numbers[-1]) + 1, *(each[:, :used] for each in branch))
