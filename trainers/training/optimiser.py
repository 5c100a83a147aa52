"""Adam for one SAE, with the decoder constraint in the right order and an average of the weights."""

from collections.abc import Mapping

import numpy as np
import torch
from saescale.trainers.architectures.topk import SAE
from saescale.trainers.architectures.topk_sparse import Gradient
from saescale.trainers.cell import Precision
from saescale.trainers.kernels.choose import kernels
from saescale.trainers.kernels.eager import adam_rows
from saescale.trainers.kernels.interface import AdamStep, Moments, Summands
from torch import Tensor

BETAS = (0.9, 0.999)
EPS = 6.25e-10


class SAEAdam:
    """Every step: project W_dec's gradient off its unit rows, Adam, renormalise W_dec's rows, then the EMA.

    Adam with betas (0.9, 0.999) and eps 6.25e-10, no weight decay (Gao et al. 2024, appendix A.3). The two matrices
    and their moments are read and written once (sparse.update_rows), and their gradients never exist in memory. W_enc
    is read twice more in a step, by its products with the gradient of b_enc and with the offset: each needs all of
    what goes before.
    `step_plain` is the same in separate torch operations on dense gradients, which the tests hold `step` to.

    `operand` is W_enc as the encoder product takes it: W_enc itself in fp32, a rounded copy in bf16 that each step
    keeps up to date.
    """

    def __init__(self, sae: SAE, lr: float, ema: float, precision: Precision = "fp32") -> None:
        self.sae, self.lr, self.ema = sae, lr, ema
        self.steps = 0
        self.moments = {
            name: Moments(*(torch.zeros_like(parameter.data) for _ in Moments._fields))
            for name, parameter in sae.named_parameters()
        }
        self._rounded = sae.W_enc.data.bfloat16() if precision == "bf16" else None

    @property
    def operand(self) -> Tensor:
        """[n_latents, d_model] in the precision of the encoder product."""
        return self.sae.W_enc.data if self._rounded is None else self._rounded

    @torch.no_grad()
    def step(self, gradient: Gradient) -> None:
        """Updates the SAE by the gradient of one batch."""
        sae, pairs, aux = self.sae, gradient.pairs, gradient.aux
        sparse = kernels(sae.W_enc.device)
        adam = self._next()
        b_enc = sparse.latent_sums(pairs)
        # What AuxK's rows have of the offset is in them already, so it is added after `shift` was taken.
        shift = b_enc.clone()
        b_enc.index_add_(0, aux.latents, aux.b_enc)
        # Has to go before W_enc is updated: pre-activations see x - b_pre.
        b_pre = gradient.b_pre - b_enc @ sae.W_enc

        of_decoder = Summands(
            pairs.starts, pairs.rows, pairs.decoder, gradient.errors, None, gradient.offset, aux.latents, aux.W_dec
        )  # fmt: skip
        of_encoder = Summands(
            pairs.starts, pairs.rows, pairs.encoder, gradient.x, shift, gradient.offset, aux.latents, aux.W_enc
        )  # fmt: skip
        sparse.update_rows(sae.W_dec.data, self.moments["W_dec"], of_decoder, adam, True, None)
        sparse.update_rows(sae.W_enc.data, self.moments["W_enc"], of_encoder, adam, False, self._rounded)
        for name, grad in (("b_enc", b_enc), ("b_pre", b_pre)):
            adam_rows(sae.get_parameter(name).data, self.moments[name], grad, adam, False)

    @torch.no_grad()
    def step_plain(self, gradients: dict[str, Tensor]) -> None:
        """The same step, one operation at a time, from a dense gradient for each parameter's name."""
        adam = self._next()
        for name, parameter in self.sae.named_parameters():
            adam_rows(parameter.data, self.moments[name], gradients[name], adam, name == "W_dec")
        self._refresh()

    def _next(self) -> AdamStep:
        self.steps += 1
        correction1, correction2 = 1 / (1 - BETAS[0] ** self.steps), 1 / (1 - BETAS[1] ** self.steps) ** 0.5
        return AdamStep(self.lr, *BETAS, EPS, correction1, correction2, self.ema)

    def _refresh(self) -> None:
        if self._rounded is not None:
            self._rounded.copy_(self.sae.W_enc)

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
        for name, target in copy.named_parameters():
            torch.div(self.moments[name].average, correction, out=target.data)
        return copy

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimiser state by name, as a checkpoint holds them (views, not copies)."""
        named = {}
        for name, parameter in self.sae.named_parameters():
            named[name] = parameter.data
            named |= {f"{name}.{key}": value for key, value in self.moments[name]._asdict().items()}
        return named

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, np.ndarray], steps: int) -> None:
        """Puts back what `tensors()` gave after `steps` steps."""
        for name, tensor in self.tensors().items():
            tensor.copy_(torch.from_numpy(tensors[name]))
        self.steps = steps
        self._refresh()
