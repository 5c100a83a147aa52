"""FLOP accounting: what training one SAE costs per token."""

from typing import NamedTuple


class Flops(NamedTuple):
    """Training FLOPs per token (a multiply and an add count as two)."""

    sparse: int
    dense: int


def flops_per_token(d_model: int, n_latents: int, k: int, k_aux: int = 0, multi_k: int = 0) -> Flops:
    """FLOPs of one token's forward and backward pass through a TopK SAE (Gao et al. 2024, 2406.04093).

    `sparse` is what a trainer that exploits sparsity does: 2 n d for the encoder (every latent has to be
    scored to find the largest k) and 8 (k + k_aux + multi_k) d for what touches only selected latents, four
    products of 2 d FLOPs each: decoding, the gradients of the latents, of W_dec and of W_enc.
    `dense` is the dense equivalent 12 n d: six products over all n latents, among them the b_pre gradient
    through the encoder.

    `k_aux` is the number of dead latents in the AuxK loss; `multi_k` the size of Multi-TopK's second,
    separately decoded reconstruction (4k in the paper). Zero means that the part is off.
    """
    selected = k + k_aux + multi_k
    return Flops(sparse=2 * n_latents * d_model + 8 * selected * d_model, dense=12 * n_latents * d_model)
