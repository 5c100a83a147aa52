"""FLOP accounting: what training SAEs costs."""

from typing import NamedTuple


class Flops(NamedTuple):
    """Training FLOPs (a multiply and an add count as two)."""

    sparse: int
    dense: int

    def plus(self, other: "Flops") -> "Flops":
        return Flops(self.sparse + other.sparse, self.dense + other.dense)


def topk_flops(
    d_model: int,
    n_latents: int,
    *,
    tokens: int,
    selected: int,
    selected_aux: int = 0,
    dead: int = 0,
    near: int = 0,
    reconstructions: int = 1,
    products: int = 4,
) -> Flops:
    """FLOPs of forward and backward passes of a TopK SAE over `tokens` tokens (Gao et al. 2024, 2406.04093).

    `selected` and `selected_aux` are the (token, latent) pairs that were active in the reconstructions of the main
    losses (with Multi-TopK two, `reconstructions`) and in that of AuxK; `dead` is the number of dead latents that AuxK
    chose from, summed over tokens; 0 where it had nothing to do. `near` are pairs that were not active, but of which
    a threshold's gradient takes what their row of W_dec has in common with the error.

    `sparse` is what a trainer that exploits sparsity does: 2 N d a token for the encoder (every latent has to be
    scored to find the largest), and 8 d a pair, four `products` of 2 d each: decoding, the gradients of the latent, of
    its row of W_dec and of its row of W_enc; three where one of the two is not trained. AuxK chooses among
    pre-activations that are there. 2 d a near pair.

    `dense` is the dense equivalent, the same products over all latents: 12 N d a token, namely the encoder, those four
    and the gradient of b_pre through the encoder; 8 N d more for each further reconstruction; and 8 d for each dead
    latent of a token on which AuxK ran, which is AuxK dense over the dead latents alone. Each part is at least what
    `sparse` charges for it, since there are no more pairs than latents.
    """
    scored, a_pair = tokens * n_latents * d_model, 2 * products * d_model
    return Flops(
        sparse=2 * scored + a_pair * (selected + selected_aux) + 2 * near * d_model,
        dense=(4 + 2 * products * reconstructions) * scored + a_pair * dead,
    )


def forward_flops(d_model: int, n_latents: int, *, tokens: int, selected: int) -> Flops:
    """Of a forward pass alone: every latent is scored, and the `selected` pairs, or all, are decoded."""
    scored = tokens * n_latents * d_model
    return Flops(sparse=2 * scored + 2 * selected * d_model, dense=4 * scored)
