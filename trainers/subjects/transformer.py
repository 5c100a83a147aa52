"""A model of transformers from the inside: residual streams out of its blocks, and other streams into them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saescale.storage.errors import SaescaleError, one_line
from saescale.storage.manifest import Site
from saescale.trainers.subjects.checkpoint import listed
from saescale.trainers.subjects.layout import (
    Parts,
    find_blocks,
    find_parts,
    find_projection,
    max_positions,
    text_model,
)
from saescale.trainers.subjects.spread import device_of
from saescale.trainers.subjects.subject import Outline, Patch, Run


class Transformer:
    """A frozen causal model, whatever its ids stand for.

    `d_model` and `n_layers` are its width and number of blocks, `max_positions` is the longest context it takes (None:
    no limit known), ids are below `embedded`, `fingerprint` identifies its weights whatever the arithmetic, `dtype` is
    the arithmetic of its forward pass. `absent` are weights of the head that its files lack. It has no labels unless
    its file knows any.
    """

    labels: tuple[str, ...] = ()

    def __init__(self, name: str, model: Any, fingerprint: str, absent: Sequence[str] = ()) -> None:
        config = model.config.get_text_config()
        self.name = name
        self.fingerprint = fingerprint
        self.model = model
        self.d_model = int(config.hidden_size)
        self.n_layers = int(config.num_hidden_layers)
        self.dtype: torch.dtype = model.dtype
        self._absent = tuple(absent)
        self._left_out: dict[int, type | None] = {}  # how the blocks up to a layer can be left out, once it was tried
        text = text_model(model)
        self.max_positions = max_positions(config, text)
        self._layers = find_blocks(name, text, self.n_layers)
        self.embedded = int(model.get_input_embeddings().weight.shape[0])

    def label(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Nothing; files that know the truth about what their model reads say more."""
        return {}

    @property
    def device(self) -> torch.device:
        """Of ids, streams and logits; the layers of a large model may lie on others too."""
        return device_of(self.model)

    @property
    def n_heads(self) -> int:
        """Of each block."""
        return int(self.model.config.get_text_config().num_attention_heads)

    def parts(self) -> list[Parts]:
        """Heads and MLP of each block. Raises SaescaleError where they cannot be told."""
        return find_parts(self.name, self._layers)

    def attention(self, ids: Tensor) -> Tensor:
        """Attention of every head over `ids` [batch, length], float32 [layers, batch, heads, length, length].

        Raises SaescaleError where the model gives none, or does not take `ids`.
        """
        self.check_ids(ids.cpu().numpy())
        self.check_site(0, ids.shape[1])
        config = self.model.config.get_text_config()
        before = config._attn_implementation
        try:
            self.model.set_attn_implementation("eager")  # others never make the whole matrix
            with torch.inference_mode():
                found = self.model(input_ids=ids.to(self.device), use_cache=False, output_attentions=True)
        finally:
            self.model.set_attn_implementation(before)
        if not found.attentions or any(each is None for each in found.attentions):
            raise SaescaleError(f"{self.name} does not give the attention of its heads")
        return torch.stack([each.float().to(self.device) for each in found.attentions])

    def check_ids(self, ids: np.ndarray) -> None:
        """Raises SaescaleError for an id of which the model has no embedding."""
        largest = int(ids.max(initial=0))
        if largest >= self.embedded:
            raise SaescaleError(f"{self.name} has no token {largest}: its embedding ends at {self.embedded - 1}")

    def check_site(self, layer: int, length: int) -> None:
        """Raises SaescaleError unless the subject has block `layer` and takes contexts of `length` tokens."""
        Outline(self.name, self.n_layers, self.max_positions).check_site(layer, length)

    def run(
        self,
        ids: Tensor,
        sites: Iterable[Site],
        patch: Mapping[Site, Patch] | None = None,
        logits: bool = False,
        cache: Any = None,
    ) -> Run:
        """One forward pass over `ids` [batch, length], on the subject's device and in its dtype.

        It ends at the last of `sites`, the residual streams after their blocks, unless `logits` are asked for: later
        blocks, the final norm and the LM head are not computed. `patch` says what takes a stream's place
        [batch, length, d_model] in all that follows, and in `Run.resid`; another float type is cast. With `cache`, one
        of transformers, `ids` go on from those that it was given before.

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
                here = stream.to(self.device)
                resid[layer] = _patched(here, patches[layer]) if layer in patches else here
                if layer == last:
                    raise _Reached
                if layer not in patches:
                    if here is stream:
                        resid[layer] = stream.clone()  # or a later block that adds in place would move it
                    return None
                first = [resid[layer].to(stream.device)]
                return type(output)([*first, *output[1:]]) if isinstance(output, tuple | list) else first[0]

            return hook

        handles = [self._layers[layer].register_forward_hook(at(layer)) for layer in {*asked, *patches}]
        model = self.model if logits else self.model.base_model
        output: Any = None
        try:
            with torch.inference_mode():
                kept = {"past_key_values": cache, "use_cache": True} if cache is not None else {"use_cache": False}
                output = model(input_ids=ids.to(self.device), **kept)
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
        return Run(tuple(resid[layer] for layer in asked), output.logits.to(self.device) if logits else None)

    def neurons(self, ids: Tensor, layer: int) -> Tensor:
        """The activations of the neurons of a layer's MLP, behind their nonlinearity, [batch, length, neurons].

        Raises what `run` raises, and SaescaleError where the block has no such neurons.
        """
        self.check_ids(ids.cpu().numpy())
        self.check_site(layer, ids.shape[1])
        found: list[Tensor] = []

        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            found.append(inputs[0].to(self.device))
            raise _Reached

        handle = find_projection(self.name, self._layers[layer], self.d_model).register_forward_pre_hook(hook)
        try:
            with torch.inference_mode(), suppress(_Reached):
                self.model.base_model(input_ids=ids.to(self.device), use_cache=False)
        finally:
            handle.remove()
        (neurons,) = found
        return neurons

    def resume(self, ids: Tensor, site: Site, resid: Tensor, last: int | None = None) -> Tensor:
        """The logits of `run` with `resid` in place of the stream at the site, [batch, length, vocabulary]; of the
        `last` positions alone where that is given. Where `resid` requires a gradient, they carry it.

        Blocks up to the site are left out where the model allows that, which is tried once on the first context. Raises
        what `run` raises, and SaescaleError for a gradient where it does not allow that.
        """
        if site.layer not in self._left_out:
            self._left_out[site.layer] = self._how_to_leave_out(ids[:1], site, resid[:1].detach())
        how = self._left_out[site.layer]
        if how is not None:
            self.check_ids(ids.cpu().numpy())
            with torch.inference_mode(not resid.requires_grad):
                logits = self._without_blocks(ids, site, resid, how, last)
        elif resid.requires_grad:
            raise SaescaleError(
                f"{self.name} gives no gradients at {site.name}: later blocks need more of earlier ones than the stream"
            )
        else:
            whole = self.run(ids, [], {site: lambda stream: resid}, logits=True).logits
            assert whole is not None, "they were asked for"
            logits = whole
        return logits if last is None else logits[:, -last:]

    @torch.inference_mode()
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

    def _without_blocks(self, ids: Tensor, site: Site, resid: Tensor, how: type, last: int | None = None) -> Tensor:
        """A forward pass in which every block up to the site just gives `resid`."""
        resid = resid.to(self.device, self.dtype)
        blocks = [self._layers[layer] for layer in range(site.layer + 1)]
        own = [vars(block).get("forward") for block in blocks]
        # The last positions of several contexts do not lie side by side, and torch would copy the whole head for each.
        head = self.model.get_output_embeddings()
        joined = None if head is None else head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
        try:
            for block in blocks:
                block.forward = lambda *_, **__: (resid,) if how is tuple else resid
            logits: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False, **self._few(last)).logits
            return logits.to(self.device)
        finally:
            if joined is not None:
                joined.remove()
            for block, forward in zip(blocks, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def _few(self, last: int | None) -> dict[str, int]:
        """How the model is told to give logits of the last positions alone; many can be."""
        known = last is not None and "logits_to_keep" in inspect.signature(self.model.forward).parameters
        return {"logits_to_keep": last} if known and last is not None else {}

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
