"""Any Hugging Face causal language model as a subject: tokens in, residual streams and logits out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.manifest import Site
from saescale.trainers.device import OutOfMemory, fast_precision, is_out_of_memory
from saescale.trainers.subjects.checkpoint import CONFIG, listed
from saescale.trainers.subjects.layout import find_blocks, max_positions, text_model
from saescale.trainers.subjects.subject import Outline, Patch, Run
from saescale.trainers.subjects.tokens import ids_of_texts
from saescale.trainers.subjects.trial import check_by_trial
from saescale.trainers.subjects.weights import hash_weights, read_config, read_model


class LanguageModel:
    """A frozen causal language model.

    `d_model` and `n_layers` are its width and number of blocks, `bos_token_id` and `eos_token_id` are None
    where its tokenizer has none, `max_positions` is the longest context it takes (None: no limit known), ids are below
    `embedded`,
    `fingerprint` identifies its weights whatever the arithmetic, `dtype` is the arithmetic of its forward pass.
    """

    labels: tuple[str, ...] = ()

    def __init__(self, name: str, model: Any, tokenizer: Any, fingerprint: str, absent: Sequence[str] = ()) -> None:
        config = model.config.get_text_config()
        self.name = name
        self.fingerprint = fingerprint
        self.model = model
        self.tokenizer = tokenizer
        self.d_model = int(config.hidden_size)
        self.n_layers = int(config.num_hidden_layers)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.dtype: torch.dtype = model.dtype
        self._absent = tuple(absent)  # weights of the head that its files lack
        self._left_out: dict[int, type | None] = {}  # how the blocks up to a layer can be left out, once it was tried
        text = text_model(model)
        self.max_positions = max_positions(config, text)
        self._layers = find_blocks(name, text, self.n_layers)
        self.embedded = int(model.get_input_embeddings().weight.shape[0])

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

    def label(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Nothing: nobody knows the truth about text."""
        return {}

    def check_site(self, layer: int, length: int) -> None:
        """Raises SaescaleError unless the subject has block `layer` and takes contexts of `length` tokens."""
        Outline(self.name, self.n_layers, self.max_positions).check_site(layer, length)

    def run(
        self, ids: Tensor, sites: Iterable[Site], patch: Mapping[Site, Patch] | None = None, logits: bool = False
    ) -> Run:
        """One forward pass over `ids` [batch, length], on the subject's device and in its dtype.

        It ends at the last of `sites`, the residual streams after their blocks, unless `logits` are asked for: later
        blocks, the final norm and the LM head are not computed. `patch` says what takes a stream's place
        [batch, length, d_model] in all that follows, and in `Run.resid`; another float type is cast.

        Raises SaescaleError where the subject has no such layer, embedding or (for logits) head or the contexts are
        longer than it takes, ValueError for a patch of another shape.
        """
        if logits and self._absent:
            raise SaescaleError(f"{self.name} gives no logits: its files lack the weights {listed([*self._absent])}")
        self.check_ids(ids.cpu().numpy())
        asked, patches = [site.layer for site in sites], {site.layer: by for site, by in (patch or {}).items()}
        for layer in {*asked, *patches}:
            self.check_site(layer, ids.shape[1])
        last = None if logits else max(asked)
        resid: dict[int, Tensor] = {}

        def at(layer: int) -> Callable[[nn.Module, object, Any], Any]:
            def hook(module: nn.Module, inputs: object, output: Any) -> Any:
                stream = output[0] if isinstance(output, tuple | list) else output
                self._check_stream(layer, stream, ids)
                resid[layer] = _patched(stream, patches[layer]) if layer in patches else stream
                if layer == last:
                    raise _Reached
                if layer not in patches:
                    resid[layer] = stream.clone()  # or a later block that adds in place would move it
                    return None
                first = [resid[layer]]
                return type(output)([*first, *output[1:]]) if isinstance(output, tuple | list) else first[0]

            return hook

        handles = [self._layers[layer].register_forward_hook(at(layer)) for layer in {*asked, *patches}]
        model = self.model if logits else self.model.base_model
        output: Any = None
        try:
            with torch.inference_mode():
                output = model(input_ids=ids.to(self.model.device), use_cache=False)
        except _Reached:
            pass
        except IndexError as error:  # a table of the model's own that ends: of positions, as ids were checked
            raise SaescaleError(
                f"{self.name}: a forward pass over {list(ids.shape)} tokens fails ({one_line(error)}); use a smaller "
                "--context-length"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if missing := [layer for layer in asked if layer not in resid]:
            raise SaescaleError(
                f"{self.name}: the forward pass never reached layer {missing[0]}; the layout is unknown"
            )
        return Run(tuple(resid[layer] for layer in asked), output.logits if logits else None)

    def resume(self, ids: Tensor, site: Site, resid: Tensor) -> Tensor:
        """The logits of `run` with `resid` in place of the stream at the site, [batch, length, vocabulary].

        Blocks up to the site are left out where the model allows that, which is tried once on the first context. Raises
        what `run` raises.
        """
        if site.layer not in self._left_out:
            self._left_out[site.layer] = self._how_to_leave_out(ids[:1], site, resid[:1])
        how = self._left_out[site.layer]
        if how is None:
            logits = self.run(ids, [], {site: lambda stream: resid}, logits=True).logits
            assert logits is not None, "they were asked for"
            return logits
        self.check_ids(ids.cpu().numpy())
        return self._without_blocks(ids, site, resid, how)

    def _how_to_leave_out(self, ids: Tensor, site: Site, resid: Tensor) -> type | None:
        """What a block that is left out has to give, a tensor or a tuple; None where later ones need the earlier ones
        for more than the stream (keys and values that they share)."""
        whole = self.run(ids, [], {site: lambda stream: resid}, logits=True).logits
        self.run((ids + 1) % self.embedded, [site])  # or what blocks keep from that pass would be taken for this one's
        for how in (Tensor, tuple):
            with suppress(Exception):  # whatever such a model raises, it can be run whole
                if whole is not None and torch.equal(self._without_blocks(ids, site, resid, how), whole):
                    return how
        return None

    def _without_blocks(self, ids: Tensor, site: Site, resid: Tensor, how: type) -> Tensor:
        """A forward pass in which every block up to the site just gives `resid`."""
        resid = resid.to(self.model.device, self.dtype)
        blocks = [self._layers[layer] for layer in range(site.layer + 1)]
        own = [vars(block).get("forward") for block in blocks]
        try:
            for block in blocks:
                block.forward = lambda *_, **__: (resid,) if how is tuple else resid
            with torch.inference_mode():
                logits: Tensor = self.model(input_ids=ids.to(self.model.device), use_cache=False).logits
                return logits
        finally:
            for block, forward in zip(blocks, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def _check_stream(self, layer: int, stream: Any, ids: Tensor) -> None:
        wanted = [*ids.shape, self.d_model]
        found = list(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
        if found != wanted:
            raise SaescaleError(
                f"{self.name}: layer {layer} gives {found} where one residual stream is {wanted} "
                f"([batch, length, d_model]); the layout of {type(self.model).__name__} is not supported"
            )


def _patched(stream: Tensor, by: Patch) -> Tensor:
    new = by(stream)
    if new.shape != stream.shape:
        raise ValueError(f"a patch gave {list(new.shape)} where the residual stream is {list(stream.shape)}")
    return new.to(stream.dtype)


class _Reached(Exception):
    """Ends a forward pass at the last site that it was run for."""


def load_model(
    name: str, source: Path, dtype: str = "auto", fingerprint: str | None = None, trust_remote_code: bool = False
) -> LanguageModel:
    """Loads the subject `name` from the folder `source`.

    Without `fingerprint` the weights are hashed as they are stored. Raises SaescaleError when something of the model is
    missing or damaged, and when it is no causal language model, by its configuration or as it turns out.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = compute_dtype(dtype, device)
    with _told(name, f"{source / CONFIG} cannot be used"):
        read_config(source, trust_remote_code)
    with _told(name, f"the tokenizer in {source} cannot be read"):
        tokenizer = read_tokenizer(source, trust_remote_code)
    with _told(name, f"the weights in {source} cannot be read"):
        found = read_model(source, wanted if fingerprint else "auto", trust_remote_code)
        fingerprint = fingerprint or hash_weights(name, found)
        if found.model.dtype != wanted:
            # Loaded again rather than cast: a cast would round buffers (rotary frequencies) as well.
            found = read_model(source, wanted, trust_remote_code)
    found.model.eval().requires_grad_(False)
    subject = LanguageModel(name, found.model.to(device), tokenizer, fingerprint, found.absent)
    check_by_trial(subject)
    return subject


def read_outline(name: str, source: Path, trust_remote_code: bool = False) -> Outline:
    """What the configuration in the folder `source` says of the subject. Raises SaescaleError like `load_model`."""
    with _told(name, f"{source / CONFIG} cannot be used"):
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
def _told(name: str, what: str) -> Iterator[None]:
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
                ("read that code, then use --trust-remote-code, or get_subject(..., trust_remote_code=True)"),
            )
        elif not isinstance(error, OSError | ValueError | ImportError | RuntimeError):
            said = f"{type(error).__name__}: {said}"
        raise SaescaleError(f"cannot load the subject {name}: {what} ({_shortened(said)})") from error


def _shortened(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."


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
