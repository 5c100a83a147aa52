"""Dead latents: which have not been active for so many tokens."""

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import ACTIVE_ABOVE
from saescale.trainers.kernels.interface import Selected


class DeadLatents:
    """For each latent the number of tokens since it was last active (activation > 1e-3)."""

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self.tokens_since = torch.zeros(n_latents, dtype=torch.int64, device=device)

    def update(self, latents: Selected | Tensor) -> None:
        """Counts a batch, given what was selected or all latents [batch, n_latents]."""
        active = fired(latents) if isinstance(latents, Tensor) else self._named(latents)
        self.count(active, len(latents) if isinstance(latents, Tensor) else len(latents.z))

    def count(self, active: Tensor, tokens: int) -> None:
        """As `update` of so many tokens on which the latents `active` [n_latents] (bool) fired."""
        self.tokens_since.add_(tokens).masked_fill_(active, 0)

    def _named(self, selected: Selected) -> Tensor:
        n_latents = len(self.tokens_since)
        # Without indexing by a mask, which would make the host wait for the device.
        active = torch.where(selected.z > ACTIVE_ABOVE, selected.indices, n_latents).flatten().long()
        return torch.zeros(n_latents + 1, dtype=torch.bool, device=active.device).index_fill_(0, active, True)[:-1]

    def after(self, window: int) -> Tensor:
        """[n_latents] bool: not active for at least `window` tokens."""
        return self.tokens_since >= window


def fired(latents: Tensor) -> Tensor:
    """[batch, n_latents] -> [n_latents] bool: active on at least one token of the batch."""
    return (latents > ACTIVE_ABOVE).any(dim=0)
