"""What heads do, by scores (Olsson et al. 2022, Wang et al. 2022, McDougall et al. 2023).

| kind | score |
|---|---|
| previous_token | attention to the token before, mean over positions of repeated random tokens |
| duplicate_token | attention of the second R to the same token in the first one |
| induction | attention of the second R to the token behind the same one in the first |
| name_mover | of `ioi`: attention from the end to IO, times what the head gives the metric straight (patching.py) |
| s_suppression | of `ioi`: attention from the end to the second S, times what it gives the metric straight |
| s_inhibition | of `ioi`: attention from the end to the second S, times what it gives the metric through later parts |

The first three are of random tokens, and lie in [0, 1]; the last three are zero where either part of them is negative.
"""

import torch
from torch import Tensor

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.transformer import Transformer
from saescale.trainers.tasks.patching import Part, Patched
from saescale.trainers.tasks.task import Prompts, find_task

Scores = dict[str, dict[Part, float]]

PROMPTS, SEED = 8, 0


def scores_by_attention(subject: Transformer) -> Scores:
    """Of heads that copy, on repeated random tokens. Raises SaescaleError where the subject cannot have them."""
    prompts = find_task("induction").prompts(subject, PROMPTS, SEED)
    attention = subject.attention(prompts.ids)
    length, repeated = attention.shape[-1], prompts.reads.shape[1] // 2 + 1
    second = torch.arange(length - repeated, length)
    return {
        "previous_token": _of_heads(_at(attention, torch.arange(length - 2 * repeated + 1, length), 1)),
        "duplicate_token": _of_heads(_at(attention, second, repeated)),
        "induction": _of_heads(_at(attention, second, repeated - 1)),
    }


def scores_of_names(subject: Transformer, prompts: Prompts, patched: Patched) -> Scores:
    """Of heads that move names, on prompts of `ioi` and what patching says of them."""
    if not {"io", "s2", "end"} <= prompts.places.keys():
        raise SaescaleError("heads that move names are told on prompts of ioi")
    attention = subject.attention(prompts.ids)
    rows = torch.arange(len(prompts.ids))
    from_end = attention[:, rows, :, prompts.places["end"]]  # [prompts, layers, heads, length]
    to_io, to_s = (
        _of_heads(from_end[rows, ..., prompts.places[place]].permute(1, 0, 2)[..., None]) for place in ("io", "s2")
    )
    heads = [part for part in patched.effects if part.head is not None]
    straight = {part: patched.effects[part].direct for part in heads}
    through = {part: patched.effects[part].noising - straight[part] for part in heads}
    return {
        "name_mover": {part: to_io[part] * max(straight[part], 0.0) for part in heads},
        "s_suppression": {part: to_s[part] * max(straight[part], 0.0) for part in heads},
        "s_inhibition": {part: to_s[part] * max(through[part], 0.0) for part in heads},
    }


def _at(attention: Tensor, positions: Tensor, back: int) -> Tensor:
    """From these positions so far back, [layers, batch, heads, positions]."""
    return attention[..., positions, positions - back]


def _of_heads(found: Tensor) -> dict[Part, float]:
    """The mean over prompts and positions of [layers, batch, heads, positions]."""
    means = found.mean(dim=(1, 3))
    return {Part(layer, head): float(mean) for layer, line in enumerate(means) for head, mean in enumerate(line)}
