"""Adam for one SAE, with the decoder constraint in the right order and an average of the weights."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers import sparse_cpu
from trainers.sae import SAE

BETAS = (0.9, 0.999)
EPS = 6.25e-10


class SAEAdam(torch.optim.Optimizer):
    """Every step: project W_dec's gradient off its unit rows, Adam, renormalise W_dec's rows, then the EMA.

    Adam with betas (0.9, 0.999) and eps 6.25e-10, no weight decay (Gao et al. 2024, appendix A.3). On the CPU each
    parameter is read and written once (sparse_cpu.adam); `step_plain` is the same in separate torch operations,
    for other devices and as what the fast path is held to.
    """

    def __init__(self, sae: SAE, lr: float, ema: float) -> None:
        super().__init__(sae.parameters(), {"lr": lr})
        self.sae, self.lr, self.ema = sae, lr, ema
        self.steps = 0
        for parameter in sae.parameters():
            self.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq", "average")}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Uses and keeps the parameters' `.grad`; `closure` is part of torch's interface and must be None."""
        assert closure is None
        if self.sae.W_enc.device.type != "cpu":
            return self.step_plain()
        self.steps += 1
        correction1, correction2 = self._corrections()
        for parameter in self.sae.parameters():
            state = self.state[parameter]
            tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["average"])
            sparse_cpu.adam(
                *(_rows(tensor) for tensor in tensors),
                self.lr, *BETAS, EPS, correction1, correction2, self.ema, parameter is self.sae.W_dec,
            )  # fmt: skip
        return None

    @torch.no_grad()
    def step_plain(self) -> None:
        """The same step, one operation at a time."""
        self.steps += 1
        correction1, correction2 = self._corrections()
        for parameter in self.sae.parameters():
            state, grad = self.state[parameter], parameter.grad
            assert grad is not None
            is_decoder = parameter is self.sae.W_dec
            if is_decoder:
                grad = grad - (grad * parameter).sum(dim=1, keepdim=True) * parameter
            state["exp_avg"].lerp_(grad, 1 - BETAS[0])
            state["exp_avg_sq"].mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            denominator = state["exp_avg_sq"].sqrt().mul_(correction2).add_(EPS)
            parameter.addcdiv_(state["exp_avg"], denominator, value=-self.lr * correction1)
            if is_decoder:
                parameter.div_(parameter.norm(dim=1, keepdim=True))
            # Has to come last: the EMA averages the weights that are in use.
            state["average"].lerp_(parameter, 1 - self.ema)

    def _corrections(self) -> tuple[float, float]:
        return 1 / (1 - BETAS[0] ** self.steps), 1 / (1 - BETAS[1] ** self.steps) ** 0.5

    @torch.no_grad()
    def averaged(self) -> SAE:
        """A copy of the SAE with the bias-corrected exponential moving average of its weights, for evaluation.

        Before the first step that is the SAE itself. The weights are the averages as they are, as in Gao et al. 2024:
        a decoder row is a mean of unit vectors, so its norm is at most 1 (to rounding) and the smaller, the more its
        direction moved. It is not scaled back to 1, which alone would change x_hat.
        """
        copy = SAE(self.sae.d_model, self.sae.n_latents, self.sae.k).to(self.sae.W_enc.device)
        if self.steps == 0:
            copy.load_state_dict(self.sae.state_dict())
            return copy
        correction = 1 - self.ema**self.steps
        for target, parameter in zip(copy.parameters(), self.sae.parameters(), strict=True):
            target.copy_(self.state[parameter]["average"] / correction)
        return copy

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimiser state by name, as a checkpoint holds them (views, not copies)."""
        named = {}
        for name, parameter in self.sae.named_parameters():
            named[name] = parameter.data
            named |= {f"{name}.{key}": value for key, value in self.state[parameter].items()}
        return named

    @torch.no_grad()
    def restore(self, tensors: dict[str, np.ndarray], steps: int) -> None:
        """Puts back what `tensors()` gave after `steps` steps."""
        for name, tensor in self.tensors().items():
            tensor.copy_(torch.from_numpy(tensors[name]))
        self.steps = steps


def _rows(tensor: Tensor | None) -> np.ndarray:
    """A matrix view for the kernel: vectors become one row."""
    assert tensor is not None
    array = tensor.detach().numpy()
    return array.reshape(1, -1) if array.ndim == 1 else array
