"""Which heads and MLPs a task needs, by activation patching (Vig et al. 2020, Wang et al. 2022; Heimersheim and Nanda
2024).

Noising: the prompts as they are, with what one part gives on the corrupted ones in its place; what is lost says what is
necessary. Denoising: the corrupted prompts, with what one part gives on the prompts as they are; what comes back says
what is sufficient. Both are shares of the distance between the metric's means on both kinds of prompts. All positions
of a part are patched together, and all parts behind it compute what follows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saescale.storage.errors import SaescaleError
from saescale.storage.manifest import Site
from saescale.trainers.subjects.transformer import Transformer
from saescale.trainers.tasks.task import METRIC, Prompts, Task, read

Progress = Callable[[int, int], None]  # parts done, in all
ADDS_UP = 0.05  # of what a block adds to a token's stream, beside what rounding the stream may do


class Part(NamedTuple):
    """A head, or the MLP (`head` None) of a block."""

    layer: int
    head: int | None

    @property
    def name(self) -> str:
        return f"mlp {self.layer}" if self.head is None else f"head {self.layer}.{self.head}"


class Effect(NamedTuple):
    """Shares: lost by noising, back by denoising, and of what noising loses the part that goes straight to the logits
    (to first order)."""

    noising: float
    denoising: float
    direct: float


class Patched(NamedTuple):
    clean: float  # means of the metric
    corrupt: float
    effects: dict[Part, Effect]


class _Pass(NamedTuple):
    """What a whole pass over prompts gave: the stream after each block [batch, length, d_model], the outputs of each
    block's heads side by side, and that of its MLP."""

    ids: Tensor
    streams: Sequence[Tensor]
    mixed: list[Tensor]
    mlp: dict[int, Tensor]
    metric: float


def patch_parts(subject: Transformer, task: Task, prompts: Prompts, progress: Progress | None = None) -> Patched:
    """The effect of every head and MLP. Raises SaescaleError where the task does not tell the two kinds of prompts
    apart, or the layout of the subject is not known.

    It costs two passes through the blocks behind it for each head and MLP.
    """
    clean, corrupt = (_whole(subject, task, prompts, ids) for ids in (prompts.ids, prompts.corrupt))
    distance = clean.metric - corrupt.metric
    if abs(distance) < 1e-6:
        raise SaescaleError(f"the metric of {subject.name} is the same on corrupted prompts, {clean.metric:.3g}")
    gradient = _gradient(subject, task, prompts, clean)
    parts = [Part(layer, head) for layer in range(len(clean.mixed)) for head in (*range(subject.n_heads), None)]
    parts = [part for part in parts if part.head is not None or part.layer in clean.mlp]
    effects = {}
    for number, part in enumerate(parts):
        noised = _with(subject, task, prompts, clean, corrupt, part)
        denoised = _with(subject, task, prompts, corrupt, clean, part)
        straight = _output(subject, clean, part) - _output(subject, corrupt, part)
        effects[part] = Effect(
            (clean.metric - noised) / distance,
            (denoised - corrupt.metric) / distance,
            float((straight * gradient).sum()) / distance,
        )
        if progress is not None:
            progress(number + 1, len(parts))
    return Patched(clean.metric, corrupt.metric, effects)


def _site(layer: int) -> Site:
    return Site(layer=layer, positions="all")


def _whole(subject: Transformer, task: Task, prompts: Prompts, ids: Tensor) -> _Pass:
    mixed: list[Any] = []
    mlp: dict[int, Tensor] = {}
    parts = subject.parts()

    def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            mlp[layer] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    handles = [each.mixing.register_forward_pre_hook(lambda _, given: mixed.append(given[0].clone())) for each in parts]
    handles += [each.mlp.register_forward_hook(keep(layer)) for layer, each in enumerate(parts) if each.mlp is not None]
    try:
        run = subject.run(ids, [_site(layer) for layer in range(len(parts))], logits=True)
    finally:
        for handle in handles:
            handle.remove()
    assert run.logits is not None, "they were asked for"
    _check_that_they_add_up(subject, run.resid, mixed, mlp)
    metric = task.score(prompts, read(prompts, run.logits[:, -prompts.last :]))[METRIC]
    return _Pass(ids, run.resid, mixed, mlp, float(metric.mean()))


@torch.inference_mode()
def _check_that_they_add_up(
    subject: Transformer, streams: Sequence[Tensor], mixed: list[Tensor], mlp: dict[int, Tensor]
) -> None:
    """Raises SaescaleError unless what a block adds to the stream is what its heads and its MLP give: names alone do
    not tell (MLPs that give the whole stream, norms behind them, heads elsewhere)."""
    for layer, (before, after) in enumerate(pairwise(streams), 1):
        added = [subject.parts()[layer].mixing(mixed[layer]).float()] + ([mlp[layer].float()] if layer in mlp else [])
        off = (before.float() + sum(added) - after.float()).norm(dim=-1)
        # A stream is rounded twice in a block, and may be a thousand times as long as what is added (first tokens).
        rounded = torch.finfo(after.dtype).eps * torch.maximum(before.float().norm(dim=-1), after.float().norm(dim=-1))
        size = torch.stack([each.norm(dim=-1) for each in added]).sum(dim=0)
        beyond = float(((off - rounded) / size.clamp_min(1e-30)).max())
        if beyond > ADDS_UP:
            raise SaescaleError(
                f"{subject.name}: what the heads and the MLP of block {layer} give is not what it adds to the stream "
                f"(off by {beyond:.2g} of it); parts of {type(subject.model).__name__} cannot be patched"
            )


def _with(subject: Transformer, task: Task, prompts: Prompts, into: _Pass, of: _Pass, part: Part) -> float:
    """The metric of a pass with the output of one part of another."""
    module = subject.parts()[part.layer]
    if part.head is None:
        patch = _patched_output(module.mlp, of.mlp[part.layer])
    else:
        wide = into.mixed[part.layer].clone()
        mine = _columns(subject, wide, part.head)
        wide[..., mine] = of.mixed[part.layer][..., mine]
        patch = _patched_input(module.mixing, wide)
    with patch:
        if part.layer == 0:
            logits = subject.run(into.ids, [], logits=True).logits
            assert logits is not None, "they were asked for"
            logits = logits[:, -prompts.last :]
        else:
            logits = subject.resume(into.ids, _site(part.layer - 1), into.streams[part.layer - 1], prompts.last)
    return float(task.score(prompts, read(prompts, logits))[METRIC].mean())


def _gradient(subject: Transformer, task: Task, prompts: Prompts, clean: _Pass) -> Tensor:
    """Of the metric's mean at the stream after the last block."""
    last = clean.streams[-1].clone().float().requires_grad_()
    logits = subject.resume(clean.ids, _site(len(clean.streams) - 1), last, prompts.last)
    metric = task.score(prompts, read(prompts, logits))[METRIC].mean()
    return torch.autograd.grad(metric, last)[0]


@torch.no_grad()
def _output(subject: Transformer, of: _Pass, part: Part) -> Tensor:
    """What the part adds to the stream, float32 [batch, length, d_model]; of a head without the layer's bias."""
    if part.head is None:
        return of.mlp[part.layer].float()
    wide = torch.zeros_like(of.mixed[part.layer])
    mine = _columns(subject, wide, part.head)
    wide[..., mine] = of.mixed[part.layer][..., mine]
    mixing = subject.parts()[part.layer].mixing
    return (mixing(wide) - mixing(torch.zeros_like(wide))).float()


def _columns(subject: Transformer, wide: Tensor, head: int) -> slice:
    width = wide.shape[-1] // subject.n_heads
    return slice(head * width, (head + 1) * width)


@contextmanager
def _patched_input(module: nn.Module, instead: Tensor) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, given: (instead, *given[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _patched_output(module: nn.Module | None, instead: Tensor) -> Iterator[None]:
    assert module is not None, "there is an MLP"
    handle = module.register_forward_hook(
        lambda _, given, output: (instead, *output[1:]) if isinstance(output, tuple) else instead
    )
    try:
        yield
    finally:
        handle.remove()
