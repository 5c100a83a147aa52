"""The Matryoshka SAE (Bussmann et al. 2025, 2503.17547) over BatchTopK: every prefix of its latents is an SAE itself.

Latents form nested prefixes of 1/16, 1/8, 1/4, 1/2 and all of them (groups of N/16, N/16, N/8, N/4, N/2), and the loss
is the mean of the errors of the reconstructions by each prefix; active are BatchTopK's, chosen among all.
"""

from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.trainers.architectures import batchtopk, parts, topk
from saescale.trainers.architectures.architecture import Forward, Losses, Params, Shape, State, Worked
from saescale.trainers.architectures.matryoshka_sparse import MatryoshkaStep

PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)

Settings = batchtopk.Settings
parameters = batchtopk.parameters
share = batchtopk.share
training_forward = batchtopk.training_forward
calibrated = batchtopk.calibrated


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    return batchtopk.forward(params, x, settings)


def losses(params: Params, forward: Forward, target: Tensor, settings: Settings, state: State) -> Losses:
    """`nmse` of all latents is the last of the errors that are averaged."""
    main = parts.normalised(forward.x_hat, target, state.variance)
    x_hat, errors, start = params["b_pre"], [], 0
    for end in prefixes(forward.latents.shape[1]):
        x_hat = x_hat + forward.latents[:, start:end] @ params["W_dec"][start:end]
        errors.append(parts.normalised(x_hat, target, state.variance))
        start = end
    nested = sum(errors, main) / (len(errors) + 1)

    error = (target - forward.x_hat).detach()
    auxk, beside = topk.auxk_loss(params, forward.pre_activations, error, state.dead, settings.k_aux)
    return Losses(main, nested + settings.auxk_coefficient * auxk, {"nested": nested, "auxk": auxk}, beside)


def prefixes(n_latents: int) -> list[int]:
    """Where the prefixes end that are shorter than all latents; fewer than five where N is small."""
    return sorted({end for share in PREFIXES if 0 < (end := round(share * n_latents)) < n_latents})


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    """As of one reconstruction: prefixes are sums that grow, so each pair is decoded and differentiated once."""
    return parts.sparse_flops(shape, worked)


step = MatryoshkaStep(prefixes)
