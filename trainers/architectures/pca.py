"""Principal components as a dictionary: what a linear code of the same sparsity reconstructs.

Latents are the components of largest variance, each in both of its directions, as many as there are: at most 2 d_model,
so further latents are never active. A token has its k largest. Nothing is trained by gradient: mean and covariance of
all tokens so far are measured while it trains, and W_dec holds the components of that covariance.
"""

import torch
from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.trainers.architectures import architecture, parts
from saescale.trainers.architectures.architecture import Forward, Losses, Parameter, Params, Shape, State, Worked
from saescale.trainers.preprocess import Centre


class Settings(architecture.Settings):
    pass


def parameters(shape: Shape, settings: Settings, centre: Centre, seed: int) -> dict[str, Parameter]:
    zeros = {
        "W_dec": torch.zeros(shape.n_latents, shape.d_model),
        "covariance": torch.zeros(shape.d_model, shape.d_model),
        "batches": torch.zeros(1),
    }
    measured = zeros | {"b_pre": centre.b_pre}
    return {name: Parameter(tensor, trained=False) for name, tensor in measured.items()}


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    pre = (x - params["b_pre"]) @ params["W_dec"].T
    return parts.decode(params, pre, parts.top_k(pre, settings.k).relu())


def losses(params: Params, forward: Forward, target: Tensor, settings: Settings, state: State) -> Losses:
    """The components of the tokens before this batch reconstruct it; then it is added to what they are made of."""
    main = parts.normalised(forward.x_hat, target, state.variance).detach()
    return Losses(main, main, {}, measured=_with(params, target))


@torch.no_grad()
def _with(params: Params, x: Tensor) -> dict[str, Tensor]:
    """Mean, covariance and components with the tokens x [batch, d_model] (the update of Chan et al. for a batch)."""
    before = params["batches"]
    share = 1 / (before + 1)  # batches are of one size
    # b_pre starts as the geometric median, which counts for no token.
    old_mean = torch.where(before > 0, params["b_pre"], 0.0)
    new_mean = x.mean(dim=0)
    centred, apart = x - new_mean, new_mean - old_mean
    covariance = torch.lerp(params["covariance"], centred.T @ centred / len(x), share)
    covariance = covariance + share * (1 - share) * torch.outer(apart, apart)
    components = torch.linalg.eigh(covariance).eigenvectors.flip(1).T  # rows, of the largest variance first
    both = torch.stack([components, -components], dim=1).flatten(0, 1)[: len(params["W_dec"])]
    W_dec = torch.zeros_like(params["W_dec"])
    W_dec[: len(both)] = both
    mean = torch.lerp(old_mean, new_mean, share)
    return {"W_dec": W_dec, "covariance": covariance, "batches": before + 1, "b_pre": mean}


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    """Scores, reconstruction, and the covariance, 2 d^2 a token; not the eigenvectors, which no token adds to."""
    used = min(shape.n_latents, 2 * shape.d_model)
    scored = (2 * used + 2 * shape.d_model) * shape.d_model * worked.tokens
    sparse = scored + 2 * worked.selected * shape.d_model
    return Flops(int(sparse), int(scored + 2 * used * shape.d_model * worked.tokens))
