"""A cell trained by the dense reference alone: autograd in float32, the plain optimiser, a dense evaluation.

Neither the sparse kernels nor an architecture's fast path are in it, so that what they do can be held to it.
"""

from typing import NamedTuple

import torch

from saescale.storage.store import ActivationStore
from saescale.storage.stream import Stream
from saescale.trainers.architectures.architecture import Shape, State, find_architecture
from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.training.optimiser import Adam
from saescale.trainers.training.train import measured_centre


class Outcome(NamedTuple):
    nmse: float  # of the averaged weights on the held-out rows
    dead_fraction: float


def train_dense(store: ActivationStore, cell: Cell, eval_tokens: int) -> Outcome:
    """The same tokens in the same order, from the same seed, as `train_pack` gives `cell`."""
    with measured_centre(store, cell) as centre:
        pass
    architecture, settings = find_architecture(cell.architecture), cell.whole_settings
    made = architecture.parameters(Shape(cell.d_model, cell.n_latents), settings, centre, cell.seed)
    params = {name: parameter.data.requires_grad_() for name, parameter in made.items()}
    optimiser = Adam({name: tensor.detach() for name, tensor in params.items()}, made, cell.lr, cell.ema)
    since = torch.zeros(cell.n_latents, dtype=torch.int64)
    with Stream(store, batch_tokens=cell.batch_tokens, seed=cell.stream_seed, batches=cell.steps) as stream:
        for number, batch in enumerate(stream):
            x = normalise(to_tensor(batch.x, store.dtype))
            forward = architecture.forward(params, x, settings)
            since += len(x)
            since[(forward.latents > 1e-3).any(dim=0)] = 0
            state = State(centre.variance, since >= cell.dead_after_tokens, number / cell.steps)
            losses = architecture.losses(params, forward, x, settings, state)
            gradients = torch.autograd.grad(losses.total, list(params.values()), materialize_grads=True)
            optimiser.apply(dict(zip(params, gradients, strict=True)))
    sae = SAE(cell.architecture, Shape(cell.d_model, cell.n_latents), settings, optimiser.averaged())
    return Outcome(dense_nmse(sae, store, eval_tokens), float((since >= cell.dead_after_tokens).float().mean()))


@torch.no_grad()
def dense_nmse(sae: SAE, store: ActivationStore, eval_tokens: int) -> float:
    """sum ||x - x_hat||^2 / sum ||x - mean(x)||^2 over the first held-out rows, summed in float64."""
    x = normalise(to_tensor(store.read_split("heldout", eval_tokens), store.dtype))
    squared = sum(float((rows - sae.forward(rows).x_hat).double().square().sum()) for rows in x.split(2_048))
    return squared / float((x.double() - x.double().mean(dim=0)).square().sum())
