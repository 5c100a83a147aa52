"""Any Hugging Face causal language model as a subject: tokens in, residual streams and logits out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.trainers.device import fast_precision
from saescale.trainers.subjects.subject import Patch, Run
from saescale.trainers.subjects.tokens import ids_of_texts


class LanguageModel:
    """A frozen causal language model.

    `d_model` and `n_layers` are its width and number of blocks, `bos_token_id` and `eos_token_id` are None
    where its tokenizer has none, `max_positions` is the longest context it takes (None: no limit known),
    `fingerprint` identifies its weights whatever the arithmetic, `dtype` is the arithmetic of its forward pass.
    """

    labels: tuple[str, ...] = ()

    def __init__(self, name: str, model: Any, tokenizer: Any, fingerprint: str) -> None:
        config = model.config.get_text_config()
        self.name = name
        self.fingerprint = fingerprint
        self.model = model
        self.tokenizer = tokenizer
        self.d_model = int(config.hidden_size)
        self.n_layers = int(config.num_hidden_layers)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.dtype: torch.dtype = model.dtype
        self._layers = _decoder_layers(name, model.base_model, self.n_layers)

    def tokenize(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [tokens], without special tokens, also where the text spells one."""
        texts = list(texts)
        return ids_of_texts(self.tokenizer, texts) if texts else []

    def label(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Nothing: nobody knows the truth about text."""
        return {}

    def check_site(self, layer: int, length: int) -> None:
        """Raises SaescaleError unless the subject has block `layer` and takes contexts of `length` tokens."""
        if not 0 <= layer < self.n_layers:
            raise SaescaleError(
                f"{self.name} has no layer {layer}: its {self.n_layers} layers are 0 to {self.n_layers - 1}"
            )
        if self.max_positions is not None and length > self.max_positions:
            raise SaescaleError(
                f"{self.name} takes contexts of at most {self.max_positions} tokens, not {length}: "
                "use a smaller context_length"
            )

    def run(
        self, ids: Tensor, sites: Iterable[Site], patch: Mapping[Site, Patch] | None = None, logits: bool = False
    ) -> Run:
        """One forward pass over `ids` [batch, length], on the subject's device and in its dtype.

        It ends at the last of `sites`, the residual streams after their blocks, unless `logits` are asked for: later
        blocks, the final norm and the LM head are not computed. `patch` says what takes a stream's place
        [batch, length, d_model] in all that follows, and in `Run.resid`; another float type is cast.

        Raises SaescaleError where the subject has no such layer or the contexts are longer than it takes, ValueError
        for a patch of another shape.
        """
        asked, patches = [site.layer for site in sites], {site.layer: by for site, by in (patch or {}).items()}
        for layer in {*asked, *patches}:
            self.check_site(layer, ids.shape[1])
        last = None if logits else max(asked)
        resid: dict[int, Tensor] = {}

        def at(layer: int) -> Callable[[nn.Module, object, Any], Any]:
            def hook(module: nn.Module, inputs: object, output: Any) -> Any:
                stream = output[0] if isinstance(output, tuple) else output
                resid[layer] = _patched(stream, patches[layer]) if layer in patches else stream
                if layer == last:
                    raise _Reached
                if layer not in patches:
                    return None
                return (resid[layer], *output[1:]) if isinstance(output, tuple) else resid[layer]

            return hook

        handles = [self._layers[layer].register_forward_hook(at(layer)) for layer in {*asked, *patches}]
        model = self.model if logits else self.model.base_model
        output: Any = None
        try:
            with torch.inference_mode():
                output = model(input_ids=ids.to(self.model.device), use_cache=False)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if missing := [layer for layer in asked if layer not in resid]:
            raise SaescaleError(
                f"{self.name}: the forward pass never reached layer {missing[0]}; the layout is unknown"
            )
        return Run(tuple(resid[layer] for layer in asked), output.logits if logits else None)


def _patched(stream: Tensor, by: Patch) -> Tensor:
    new = by(stream)
    if new.shape != stream.shape:
        raise ValueError(f"a patch gave {list(new.shape)} where the residual stream is {list(stream.shape)}")
    return new.to(stream.dtype)


class _Reached(Exception):
    """Ends a forward pass at the last site that it was run for."""


def load_model(name: str, source: str, dtype: str = "auto", fingerprint: str | None = None) -> LanguageModel:
    """Loads the subject `name` from `source`, a local folder or a name on the Hugging Face hub.

    Without `fingerprint` the weights are hashed as they are stored. Raises SaescaleError when the model is
    missing, unreachable, damaged, or no causal language model.
    """
    if source.startswith(("/", ".", "~")):
        source = str(Path(source).expanduser())
        if not Path(source).is_dir():
            raise SaescaleError(f"subject {name}: there is no folder {source}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = compute_dtype(dtype, device)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=wanted if fingerprint else "auto")
            fingerprint = fingerprint or _hash_weights(model)
            if model.dtype != wanted:
                # Loaded again rather than cast: a cast would round buffers (rotary frequencies) as well.
                model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted)
    except Exception as error:  # hub, file, JSON, safetensors and configuration errors share no base class
        raise SaescaleError(
            f"cannot load the subject {name} from {source}: {first_line(error)}; check the name, that this "
            "machine reaches the hub (or give a local folder as hf:/path), and that it is a causal language model"
        ) from error
    model.eval().requires_grad_(False)
    return LanguageModel(name, model.to(device), tokenizer, fingerprint)


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The arithmetic of the forward pass: `choice` ("float32", "bfloat16"), or for "auto" its device's."""
    if choice != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]
    return torch.bfloat16 if fast_precision(device) == "bf16" else torch.float32


def _decoder_layers(name: str, base: nn.Module, n_layers: int) -> nn.ModuleList:
    """The list of blocks: the one outermost ModuleList with as many members as the model has layers."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in base.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and not nested:
            found[path] = module
    if len(found) != 1:
        raise SaescaleError(
            f"{name}: cannot tell where the blocks of {type(base).__name__} are ({len(found)} lists of "
            f"{n_layers} modules: {', '.join(found) or 'none'}); this layout is not supported"
        )
    return next(iter(found.values()))


def _hash_weights(model: nn.Module) -> str:
    """xxh3-128 over names, shapes, types and bytes of all parameters, in the order of their names."""
    digest = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(parameter.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"xxh3-128:{digest.hexdigest()}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' progress bars and advice off a terminal on which a progress display may stand."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line that says something, for messages of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
