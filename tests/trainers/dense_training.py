"""A cell trained by the dense reference alone: autograd in float32, the plain optimiser, a dense evaluation.

Neither the sparse kernels nor trainers/architectures/topk_sparse.py are in it, so that what they do can be held to it.
"""

from typing import NamedTuple

import torch
from saescale.storage.store import ActivationStore
from saescale.storage.stream import Stream
from saescale.trainers.architectures import reference
from saescale.trainers.architectures.reference import Objective
from saescale.trainers.architectures.topk import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.training.optimiser import SAEAdam
from saescale.trainers.training.train import measured_centre


class Outcome(NamedTuple):
    nmse: float  # of the averaged weights on the held-out rows
    dead_fraction: float


def train_dense(store: ActivationStore, cell: Cell, eval_tokens: int) -> Outcome:
    """The same tokens in the same order, from the same seed, as `train_pack` gives `cell`."""
    centre = measured_centre(store, cell)
    sae = SAE(cell.d_model, cell.n_latents, cell.k)
    sae.initialise(centre.b_pre, cell.seed)
    optimiser = SAEAdam(sae, cell.lr, cell.ema)
    objective = Objective(cell.k, centre.variance, cell.k_aux, cell.auxk_coefficient, cell.multi_topk)
    since = torch.zeros(cell.n_latents, dtype=torch.int64)
    with Stream(store, batch_tokens=cell.batch_tokens, seed=cell.stream_seed, batches=cell.steps) as stream:
        for act in (batch.x for batch in stream):
            x = normalise(to_tensor(act, store.manifest.dtype))
            forward = sae(x)
            since += len(x)
            since[reference.fired(forward.latents.detach())] = 0
            losses = reference.losses(sae, x, forward, since >= cell.dead_after_tokens, objective)
            gradients = torch.autograd.grad(losses.total, list(sae.parameters()))
            optimiser.step_plain(dict(zip(dict(sae.named_parameters()), gradients, strict=True)))
    nmse = dense_nmse(optimiser.averaged(), store, eval_tokens)
    return Outcome(nmse, float((since >= cell.dead_after_tokens).float().mean()))


@torch.no_grad()
def dense_nmse(sae: SAE, store: ActivationStore, eval_tokens: int) -> float:
    """sum ||x - x_hat||^2 / sum ||x - mean(x)||^2 over the first held-out rows, summed in float64."""
    x = normalise(to_tensor(store.read_split("heldout", eval_tokens), store.manifest.dtype))
    squared = sum(float((rows - sae(rows).reconstruction).double().square().sum()) for rows in x.split(2_048))
    return squared / float((x.double() - x.double().mean(dim=0)).square().sum())
