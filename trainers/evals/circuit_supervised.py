"""A dictionary made with the truth in hand (Makelov et al. 2024): what an SAE of a task could be.

What the behaviour is a function of are a task's attributes: of indirect objects the two names and their order. At a
position that the metric is read from, the stream of a prompt is set to

    mean + sum over attributes of (mean of the prompts with the same value - mean)

where means are over 512 other prompts. So it has one feature for each value, of which a prompt has as many as there are
attributes.
"""

import torch
from torch import Tensor

from saescale.storage.manifest import Site
from saescale.trainers.evals.intervals import SEED
from saescale.trainers.subjects.transformer import Transformer
from saescale.trainers.tasks.task import Prompts, Task

LEARNT_FROM = 512
AT_A_TIME = 32


def supervised(subject: Transformer, site: Site, task: Task, prompts: Prompts) -> Tensor:
    """The stream at the positions that are read from as the dictionary has it, float32 [prompts, reads, d_model]."""
    others = task.prompts(subject, LEARNT_FROM, SEED + 1)
    seen = []
    for start in range(0, LEARNT_FROM, AT_A_TIME):
        some = others.part(slice(start, start + AT_A_TIME))
        (resid,) = subject.run(some.ids, [site]).resid
        seen.append(resid[torch.arange(len(resid))[:, None], some.reads.to(resid.device)].float())
    return composed(torch.cat(seen), others, prompts)


def composed(seen: Tensor, others: Prompts, prompts: Prompts) -> Tensor:
    """Of what was `seen` [others, reads, d_model]: [prompts, reads, d_model]. A value that no other prompt has is the
    mean."""
    mean = seen.mean(dim=0)
    found = mean.expand(len(prompts.ids), -1, -1).clone()
    for name, values in prompts.attributes.items():
        for value in values.unique().tolist():
            alike = (others.attributes[name] == value).to(seen.device)
            if alike.any():
                found[(values == value).to(seen.device)] += seen[alike].mean(dim=0) - mean
    return found
