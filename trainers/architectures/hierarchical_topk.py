"""HierarchicalTopK (2505.24473): one SAE for all sparsities up to k.

The loss is the mean over j = 1 ... k of the errors that its j largest latents leave, so the SAE may be used with any
of them; a plain TopK SAE is good at its own k alone. Errors are taken at k and the powers of two below it, each for
all j since the one before. AuxK is that of TopK.
"""

from itertools import pairwise

from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.trainers.architectures import parts, topk
from saescale.trainers.architectures.architecture import Forward, Losses, Params, Shape, State, Worked
from saescale.trainers.architectures.hierarchical_topk_sparse import HierarchicalTopKStep


class Settings(topk.AuxKSettings):
    def levels(self) -> list[int]:
        """The sparsities that are trained: k, and powers of two below it."""
        return [2**i for i in range(self.k.bit_length()) if 2**i < self.k] + [self.k]

    def weights(self) -> list[float]:
        """Of each level's error in the loss: the share of the sparsities up to k that it stands for."""
        levels = self.levels()
        return [(level - before) / self.k for before, level in pairwise([0, *levels])]


parameters = topk.parameters
share = topk.share


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    return topk.forward(params, x, settings)


def losses(params: Params, forward: Forward, target: Tensor, settings: Settings, state: State) -> Losses:
    main = parts.normalised(forward.x_hat, target, state.variance)
    *fewer, own = settings.weights()
    nested = own * main
    for k, weight in zip(settings.levels(), fewer, strict=False):
        latents = parts.top_k(forward.latents, k)
        x_hat = parts.decode(params, forward.pre_activations, latents).x_hat
        nested = nested + weight * parts.normalised(x_hat, target, state.variance)
    error = (target - forward.x_hat).detach()
    auxk, beside = topk.auxk_loss(params, forward.pre_activations, error, state.dead, settings.k_aux)
    return Losses(main, nested + settings.auxk_coefficient * auxk, {"nested": nested, "auxk": auxk}, beside)


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    """As of one reconstruction: those of fewer latents are sums on its way."""
    return parts.sparse_flops(shape, worked)


step = HierarchicalTopKStep()
