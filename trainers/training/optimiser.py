"""Adam for the parameters of one SAE, with unit rows in the right order and an average of the weights."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import Parameter, Update
from saescale.trainers.architectures.dense import apply
from saescale.trainers.kernels.interface import AdamStep, Moments

EPS = 6.25e-10


class Adam:
    """Every step: project the gradient off unit rows, Adam, bring the rows back to norm 1, then the average.

    Betas are each parameter's own, eps 6.25e-10, no weight decay (Gao et al. 2024, appendix A.3). `params` are the
    tensors that it changes in place; `parameters` say how each is trained. What a fast path needs for a step of its
    own is in `next`; `apply` makes the same step from dense gradients.
    """

    def __init__(
        self, params: Mapping[str, Tensor], parameters: Mapping[str, Parameter], lr: float, ema: float
    ) -> None:
        self.params, self.lr, self.ema = params, lr, ema
        self.steps = 0
        self._trained = {name: (of.betas, of.gate, of.unit_rows) for name, of in parameters.items() if of.trained}
        self.moments = {
            name: Moments(*(torch.zeros_like(params[name]) for _ in Moments._fields)) for name in self._trained
        }

    def next(self, share: float = 1.0, of_gates: float = 1.0) -> dict[str, Update]:
        """Counts one more step; what each parameter's update takes in it, at those shares of the learning rate."""
        self.steps += 1
        updates = {}
        for name, ((beta1, beta2), gate, unit_rows) in self._trained.items():
            correction1, correction2 = 1 / (1 - beta1**self.steps), 1 / (1 - beta2**self.steps) ** 0.5
            lr = self.lr * (of_gates if gate else share)
            adam = AdamStep(lr, beta1, beta2, EPS, correction1, correction2, self.ema)
            updates[name] = Update(self.moments[name], adam, unit_rows)
        return updates

    def apply(self, gradients: Mapping[str, Tensor]) -> None:
        """One step by a dense gradient for each parameter."""
        apply(self.params, gradients, self.next())

    @torch.no_grad()
    def averaged(self) -> dict[str, Tensor]:
        """The bias-corrected exponential moving average of the parameters, for evaluation: copies.

        Before the first step, and of a parameter that is not trained, those are the values themselves. The averages
        stay as they are, as in Gao et al. 2024: a decoder row is a mean of unit vectors, so its norm is at most 1 (to
        rounding) and the smaller, the more its direction moved. It is not scaled back to 1, which alone would change
        x_hat.
        """
        averaged = self.moments if self.steps else {}
        correction = 1 - self.ema**self.steps
        return {
            name: averaged[name].average / correction if name in averaged else tensor.clone()
            for name, tensor in self.params.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimiser state by name, as a checkpoint holds them (views, not copies)."""
        named = {}
        for name, tensor in self.params.items():
            named[name] = tensor
            if name in self.moments:
                named |= {f"{name}.{key}": value for key, value in self.moments[name]._asdict().items()}
        return named

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, np.ndarray], steps: int) -> None:
        """Puts back what `tensors()` gave after `steps` steps; KeyError where one is missing."""
        for name, tensor in self.tensors().items():
            tensor.copy_(torch.from_numpy(tensors[name]))
        self.steps = steps
