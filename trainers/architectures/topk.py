"""The TopK SAE: its parameters, its initialisation, and its forward pass in plain dense torch."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Forward(NamedTuple):
    pre_activations: Tensor  # [batch, n_latents]
    latents: Tensor  # [batch, n_latents], zero outside the k largest
    reconstruction: Tensor  # [batch, d_model]


class SAE(nn.Module):
    """z = ReLU(TopK(W_enc (x - b_pre) + b_enc)), x_hat = z W_dec + b_pre (Gao et al. 2024, section 2.3).

    W_enc [n_latents, d_model], b_enc [n_latents], W_dec [n_latents, d_model] with one row per latent,
    b_pre [d_model]. While an SAE trains its decoder rows have unit norm; those of averaged weights, which evaluation
    uses and sae.safetensors holds, are slightly shorter (SAEAdam.averaged). Multiply z by a row's norm and divide the
    row by it where unit directions are needed: that leaves x_hat as it is.
    """

    def __init__(self, d_model: int, n_latents: int, k: int) -> None:
        super().__init__()
        self.d_model, self.n_latents, self.k = d_model, n_latents, k
        self.W_enc = nn.Parameter(torch.zeros(n_latents, d_model))
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(torch.zeros(n_latents, d_model))
        self.b_pre = nn.Parameter(torch.zeros(d_model))

    @torch.no_grad()
    def initialise(self, b_pre: Tensor, seed: int) -> None:
        """Random unit decoder rows, tied encoder, b_pre [d_model] (the geometric median of the data).

        The encoder is scaled so that 256 random unit vectors are reconstructed at norm 1 on average
        (Gao et al. 2024, appendix A.1). Drawn on the CPU, so that a seed means the same on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        W = torch.randn(self.n_latents, self.d_model, generator=generator)
        W /= W.norm(dim=1, keepdim=True)
        probes = torch.randn(256, self.d_model, generator=generator)
        probes /= probes.norm(dim=1, keepdim=True)
        # With zero biases the reconstruction is linear in the encoder's scale, so one division sets the norm.
        norms = (_top_k(probes @ W.T, self.k).relu() @ W).norm(dim=1)
        self.W_dec.copy_(W)
        self.W_enc.copy_(W / norms.mean())
        self.b_pre.copy_(b_pre)

    def encode(self, x: Tensor) -> Tensor:
        """Pre-activations [batch, n_latents] of preprocessed x [batch, d_model]."""
        return (x - self.b_pre) @ self.W_enc.T + self.b_enc

    def forward(self, x: Tensor, k: int | None = None) -> Forward:
        """The dense reference: x [batch, d_model], preprocessed; `k` other than the SAE's own for Multi-TopK."""
        return self.decode(self.encode(x), k)

    def decode(self, pre: Tensor, k: int | None = None) -> Forward:
        """What `forward` makes of pre-activations [batch, n_latents]."""
        latents = _top_k(pre, self.k if k is None else k).relu()
        return Forward(pre, latents, latents @ self.W_dec + self.b_pre)


def _top_k(pre: Tensor, k: int) -> Tensor:
    """`pre` [batch, n] with all but each row's k largest entries set to zero."""
    largest = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, largest.indices, largest.values)
