"""HierarchicalTopK (2505.24473): one SAE for all sparsities up to k.

The loss is the mean of the errors that its 1, 2, 4 ... k largest latents leave, so the SAE may be used with any of
them; a plain TopK SAE is good at its own k alone. AuxK is that of TopK.
"""

from torch import Tensor

from saescale.scaling.compute import Flops
from saescale.trainers.architectures import parts, topk
from saescale.trainers.architectures.architecture import Forward, Losses, Params, Shape, State, Worked
from saescale.trainers.architectures.hierarchical_topk_sparse import HierarchicalTopKStep


class Settings(topk.AuxKSettings):
    def levels(self) -> list[int]:
        """The sparsities that are trained: k, and powers of two below it."""
        return [2**i for i in range(self.k.bit_length()) if 2**i < self.k] + [self.k]


parameters = topk.parameters


def forward(params: Params, x: Tensor, settings: Settings) -> Forward:
    return topk.forward(params, x, settings)


def losses(params: Params, forward: Forward, target: Tensor, settings: Settings, state: State) -> Losses:
    main = parts.normalised(forward.x_hat, target, state.variance)
    errors = [
        parts.normalised(
            parts.decode(params, forward.pre_activations, parts.top_k(forward.latents, k)).x_hat, target, state.variance
        )
        for k in settings.levels()[:-1]
    ]
    nested = sum(errors, main) / (len(errors) + 1)
    error = (target - forward.x_hat).detach()
    auxk, beside = topk.auxk_loss(params, forward.pre_activations, error, state.dead, settings.k_aux)
    return Losses(main, nested + settings.auxk_coefficient * auxk, {"nested": nested, "auxk": auxk}, beside)


def flops(shape: Shape, settings: Settings, worked: Worked) -> Flops:
    """As of one reconstruction: those of fewer latents are sums on its way."""
    return parts.sparse_flops(shape, worked)


step = HierarchicalTopKStep()
