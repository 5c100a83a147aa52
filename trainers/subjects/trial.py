"""What only a trial tells of a loaded language model: that its blocks give one finite residual stream, and that no
token sees a later one. Names of architectures do not say so: BERT is loaded as a causal model, and is none."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.manifest import Site
from saescale.trainers.device import OutOfMemory, spoils_the_process
from saescale.trainers.subjects.subject import Run

LENGTH = 16
TEXT = "The residual stream of an earlier token must not know of later ones: 1, 2, 3, 4 and so on, to the end."
# How far a row may move with later tokens, of its norm. Causal models do not move by a bit, for both passes have one
# shape; but experts, and scales of a quantisation, are shared with the later tokens, and round otherwise with others.
EXACT, SHARED_ROUNDING = 1e-5, 0.02


class Tried(Protocol):
    """What a trial needs of a language model (language_model.py)."""

    name: str
    model: Any
    dtype: torch.dtype
    n_layers: int
    max_positions: int | None
    embedded: int
    bos_token_id: int | None
    eos_token_id: int | None

    def tokenize(self, texts: Iterable[str]) -> list[np.ndarray]: ...
    def check_ids(self, ids: np.ndarray) -> None: ...
    def run(self, ids: Tensor, sites: Sequence[Site]) -> Run: ...


def check_by_trial(subject: Tried) -> None:
    """Raises SaescaleError unless the subject is a causal language model with a usable residual stream.

    Two forward passes of 16 tokens that differ in the last 8: milliseconds, or seconds for a large model on a CPU.
    """
    for special in (subject.bos_token_id, subject.eos_token_id):
        if special is not None:
            subject.check_ids(torch.tensor([special]).numpy())
    length = min(LENGTH, subject.max_positions or LENGTH)
    sites = [Site(layer=layer, positions="all") for layer in range(subject.n_layers)]
    tolerance = SHARED_ROUNDING if _shares_rounding(subject.model) else EXACT
    try:
        (ids,) = subject.tokenize([TEXT])
        # A tokenizer of moves or molecules may make nothing of prose.
        first = (torch.from_numpy(ids) if len(ids) else torch.arange(subject.embedded)).repeat(length)[None, :length]
        second = first.clone()
        second[:, length // 2 :] = (first[:, length // 2 :] + 1) % subject.embedded
        streams, others = (subject.run(each, sites).resid for each in (first, second))
    except SaescaleError:
        raise
    except Exception as error:  # whatever a model that is not made for text alone may raise
        if spoils_the_process(error):
            raise OutOfMemory(f"{subject.name} does not run on this device: {one_line(error)}") from error
        raise SaescaleError(
            f"{subject.name}: a forward pass over {length} tokens of text fails ({one_line(error)}); "
            f"{type(subject.model).__name__} is not supported"
        ) from error
    for layer, (stream, other) in enumerate(zip(streams, others, strict=True)):
        before, changed = (each[:, : length // 2].double() for each in (stream, other))
        if not bool(stream.isfinite().all()):
            raise SaescaleError(
                f"{subject.name}: layer {layer} gives NaN or infinity for plain text in {subject.dtype}; "
                "the weights are damaged, or need another --compute-dtype"
            )
        moved = float((before - changed).norm(dim=-1).max() / before.norm(dim=-1).max().clamp_min(1e-30))
        if moved > tolerance:
            raise SaescaleError(
                f"{subject.name} is no causal language model: in layer {layer} a token's residual stream changes with "
                f"the tokens behind it (by {moved:.2g} of its norm), as in an encoder ({type(subject.model).__name__})"
            )


def _shares_rounding(model: Any) -> bool:
    return hasattr(model.config, "quantization_config") or any("expert" in path for path, _ in model.named_modules())
