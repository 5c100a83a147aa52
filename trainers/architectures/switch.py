"""The switch SAE (Mudide et al. 2024, 2410.08201): each token goes to one of several experts, which scores it alone.

    p = softmax(W_router (x - b_router)),  e = argmax p,  z = p_e ReLU(TopK(W_enc^e (x - b_pre) + b_enc^e))
    x_hat = z W_dec + b_pre

so that scoring costs 2 d (N / experts + experts) instead of 2 d N. The loss adds balance * experts * sum_e f_e P_e, f_e
the share of tokens that went to e and P_e the mean of p_e, which is least where experts are used alike.
"""

import torch
from pydantic import Field
from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.trainers.architectures import architecture, parts
from saescale.trainers.architectures.architecture import (
    Candidates,
    Forward,
    Losses,
    Parameter,
    Params,
    Shape,
    State,
    Worked,
    unit_rows,
)
from saescale.trainers.architectures.switch_sparse import SwitchStep
from saescale.trainers.preprocess import Centre


class Settings(architecture.Settings):
    experts: int = Field(default=8, ge=1)
    balance: float = Field(default=3.0, ge=0)  # weight of the loss that keeps experts in use alike

    def check(self, n_latents: int) -> None:
        """Raises ValueError unless the experts share the latents evenly and have k of them each."""
        if n_latents % self.experts:
            raise ValueError(f"{self.experts} experts do not divide n_latents={n_latents}")
        if self.k > n_latents // self.experts:
            raise ValueError(
                f"k={self.k} is larger than the {n_latents // self.experts} latents of each of {self.experts} experts"
            )


def parameters(shape: Shape, settings: Settings, centre: Centre, seed: int) -> dict[str, Parameter]:
    own = Shape(shape.d_model, shape.n_latents // settings.experts)
    started = parts.tied_parameters(shape, centre, seed, lambda pre: _one_of(pre, own.n_latents, settings.k))
    generator = torch.Generator().manual_seed(seed + 1)
    return started | {
        "W_router": Parameter(unit_rows(settings.experts, shape.d_model, generator)),
        "b_router": Parameter(centre.b_pre.clone()),
    }


def _one_of(pre: Tensor, each: int, k: int) -> Tensor:
    """The latents of the first expert alone, as each token has those of one."""
    latents = torch.zeros_like(pre)
    latents[:, :each] = parts.top_k(pre[:, :each], k).relu()
    return latents


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    routed = _router(params, x)
    p, chosen = routed.max(dim=1)
    pre = parts.encode(params, x)
    best = _own(pre, chosen, settings).topk(settings.k, dim=-1)
    latents = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu()) * p[:, None]
    # The router's probabilities go along, since the losses balance them.
    return parts.decode(params, torch.cat([pre, routed], dim=1), latents)


def _own(pre: Tensor, chosen: Tensor, settings: Settings) -> Tensor:
    """`pre` [batch, n_latents], -inf for latents of experts other than the token's `chosen` one."""
    expert = torch.arange(pre.shape[1], device=pre.device) // (pre.shape[1] // settings.experts)
    return torch.where(expert == chosen[:, None], pre, -torch.inf)


def candidates(params: Params, forward: Forward, settings: Settings) -> Candidates:
    pre, routed = forward.pre_activations.tensor_split([forward.latents.shape[1]], dim=1)
    p, chosen = routed.max(dim=1)
    own = _own(pre, chosen, settings) * p[:, None]
    return Candidates(own, own)


def _router(params: Params, x: Tensor) -> Tensor:
    """[batch, experts]"""
    return torch.softmax((x - params["b_router"]) @ params["W_router"].T, dim=-1)


def losses(params: Params, forward: Forward, target: Tensor, settings: Settings, state: State) -> Losses:
    main = parts.normalised(forward.x_hat, target, state.variance)
    routed = forward.pre_activations[:, -settings.experts :]
    share = torch.nn.functional.one_hot(routed.argmax(dim=1), settings.experts).to(routed.dtype).mean(dim=0)
    balance = settings.experts * (share * routed.mean(dim=0)).sum()
    return Losses(main, main + settings.balance * balance, {"balance": balance})


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    """Of the expert that a token was routed to; the router is scored and differentiated densely: 6 d an expert.

    Dense: the same, and five products more over the expert's latents.
    """
    each = shape.n_latents // settings.experts
    router = 6 * int(worked.tokens) * settings.experts * shape.d_model
    routed = parts.sparse_flops(Shape(shape.d_model, each), worked)
    return Flops(routed.sparse + router, routed.dense + router)


step = SwitchStep()
