"""A trained SAE, ready to use: raw activations in, latents and reconstructions out."""

from typing import NamedTuple

import torch
from torch import Tensor

from saescale.trainers.architectures.sae import SAE
from saescale.trainers.cell import Cell


class SparseLatents(NamedTuple):
    """The active latents of each row, most active first: int64 and float32 [batch, most], padded with -1 and 0."""

    indices: Tensor
    values: Tensor


class Trained(NamedTuple):
    """An SAE and the cell that it was trained as. `sae` expects rows as preprocess.normalise makes them; the methods
    take raw activations [batch, d_model] of any float type, and give x_hat in their space."""

    sae: SAE
    cell: Cell
