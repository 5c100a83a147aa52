"""Tries an architecture of the user's own on a few rows, so that what its file has wrong is told before training."""

from typing import Any

import torch

from saescale.scaling.compute import Flops
from saescale.storage.errors import SaescaleError, one_line
from saescale.trainers.architectures import ARCHITECTURES
from saescale.trainers.architectures.architecture import (
    Parameter,
    Shape,
    State,
    Worked,
    find_architecture,
    unit_rows,
)
from saescale.trainers.preprocess import Centre

_D_MODEL, _ROWS = 8, 2  # as dense.py counts tensors with


def try_out(name: str, settings: Any, n_latents: int) -> None:
    """Makes one step's losses and gradients by the reference of `name`, a file of the user's; of others nothing.

    Raises SaescaleError, which names the file and the part of it, where that fails or gives what the door has not.
    """
    path = ARCHITECTURES.own(name)
    if path is None:
        return
    architecture, shape = find_architecture(name), Shape(_D_MODEL, n_latents)
    part = "parameters"
    try:
        made = architecture.parameters(shape, settings, Centre(torch.zeros(_D_MODEL), 1.0), 0)
        for of, parameter in made.items():
            _require("." not in of, f"a parameter is called {of!r}, with a dot")
            _require(isinstance(parameter, Parameter), f"{of} is no Parameter")
        params = {of: parameter.data.requires_grad_() for of, parameter in made.items()}
        x = unit_rows(_ROWS, _D_MODEL, torch.Generator().manual_seed(0))
        part = "forward"
        architecture.forward(params, x, settings)
        part = "training_forward" if hasattr(architecture, "training_forward") else "forward"
        forward = getattr(architecture, part)(params, x, settings)
        for of, wanted in (("latents", (_ROWS, n_latents)), ("x_hat", (_ROWS, _D_MODEL))):
            found = tuple(getattr(forward, of).shape)
            _require(found == wanted, f"{of} are {list(found)} where {list(wanted)} were asked for")
        part = "losses"
        dead = torch.zeros(n_latents, dtype=torch.bool)
        dead[: n_latents // 2] = True
        losses = architecture.losses(params, forward, x, settings, State(1.0, dead, 0.5, 1.0))
        if losses.total.requires_grad:
            torch.autograd.grad(losses.total, list(params.values()), materialize_grads=True)
        part = "flops"
        worked = Worked(_ROWS, int((forward.latents > 0).sum()))
        _require(isinstance(architecture.flops(shape, settings, worked), Flops), "it gives no Flops")
    except Exception as error:
        kind = "" if isinstance(error, _Wrong) else f"{type(error).__name__}: "
        raise SaescaleError(
            f"{path} (architecture): `{part}` fails on {_ROWS} rows of d_model {_D_MODEL} and n_latents {n_latents} "
            f"with {kind}{one_line(error)[:300]}; correct it"
        ) from error


class _Wrong(Exception):
    """Something came back that the door has not."""


def _require(holds: bool, else_: str) -> None:
    if not holds:
        raise _Wrong(else_)
