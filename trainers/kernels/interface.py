"""The sparse algebra of a TopK SAE: one small interface, an implementation for each kind of device behind it.

    cpu.py    numba kernels
    cuda.py   Triton kernels
    eager.py  plain torch, dense where it has to be: what stands in on other devices

Of the six products of dense training only the encoder's forward pass stays dense. All else touches the k of N
latents that a token selects, and neither a gradient of the weights nor anything of size batch x k x d_model is ever
stored: a gradient stays in the factors that `transpose` sorts (Pairs), and `update_rows` sums each row of it where
Adam uses it.

Inputs are centred once per batch for all cells of a pack: with x' = x - origin and offset = b_pre - origin,
W_enc (x - b_pre) + b_enc = W_enc x' + (b_enc - W_enc offset), and x - x_hat = x' - offset - z W_dec.
trainers/architectures/topk_sparse.py puts the pieces together; the tests hold every implementation to the dense float64
reference (trainers/architectures/topk.py).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Selected(NamedTuple):
    """The k largest positive pre-activations of each token, in no particular order. Ties go to the lower index."""

    indices: Tensor  # int32 [batch, k], -1 where fewer than k are positive
    z: Tensor  # float32 [batch, k], 0 where the index is -1


class Decoded(NamedTuple):
    squared: Tensor  # float64 scalar: ||x - x_hat||^2 over the batch
    dz: Tensor  # float32 [batch, k]: the loss's gradient by z; [batch, 0] where none was asked for


class Term(NamedTuple):
    """One reconstruction in a loss, of which `scale` * (x - x_hat) is the gradient by x_hat."""

    selected: Selected
    dz: Tensor  # float32 [batch, k]
    scale: float


class Pairs(NamedTuple):
    """The active (token, latent) pairs of all terms, sorted by latent, then by term and token.

    With the errors of all terms stacked to [terms * batch, d_model], latent n's gradients are sums over its pairs p in
    starts[n]:starts[n + 1]: sum decoder[p] errors[rows[p]] for W_dec[n], sum encoder[p] (x[rows[p] % batch] - offset)
    for W_enc[n], and sum encoder[p] for b_enc[n]. Entries beyond starts[-1], where an implementation leaves some, mean
    nothing; nor do rows of `errors` that no pair names.
    """

    starts: Tensor  # int64 [n_latents + 1]
    rows: Tensor  # int32 [pairs]: term * batch + token
    decoder: Tensor  # float32 [pairs]: scale * z
    encoder: Tensor  # float32 [pairs]: dz


class Summands(NamedTuple):
    """The gradient of a matrix [n_latents, d_model], row n of it

    sum over p in starts[n]:starts[n + 1] of weights[p] sources[rows[p] % len(sources)] - shift[n] offset + extra row,

    the last where `latents` names n.
    """

    starts: Tensor  # int64 [n_latents + 1]
    rows: Tensor  # int32 [pairs]
    weights: Tensor  # float32 [pairs]
    sources: Tensor  # float32 [sources, d_model]
    shift: Tensor | None  # float32 [n_latents]; None is zero
    offset: Tensor  # float32 [d_model]
    latents: Tensor  # int64 [extras], ascending
    extra: Tensor  # float32 [extras, d_model]


class Kept(NamedTuple):
    """Some columns of the encoder's product, for AuxK to choose from, and memory for them."""

    latents: Tensor  # int64 [kept], ascending
    pre: Tensor  # [batch, kept] of x W_enc^T, in the type of x, without bias


class DeadGradient(NamedTuple):
    """AuxK's squared error and its gradient by the latents that were given."""

    squared: Tensor  # float64 scalar: ||e - e_hat||^2 over the batch
    pairs: int  # that were active
    W_enc: Tensor  # float32 [latents, d_model]; of inputs x, their offset not taken off
    b_enc: Tensor  # float32 [latents]
    W_dec: Tensor  # float32 [latents, d_model]


class Moments(NamedTuple):
    """What Adam and the average keep for a parameter, each of its shape."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    average: Tensor  # exponential moving average of the parameter, not bias-corrected


class AdamStep(NamedTuple):
    """The numbers of one step: correction1 = 1 / (1 - beta1^t), correction2 = 1 / sqrt(1 - beta2^t)."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    correction1: float
    correction2: float
    decay: float  # of the average


class Kernels(Protocol):
    """What an implementation offers. Tensors are on its device and contiguous, float32 unless said otherwise.

    Nothing is checked: shapes and types other than those stated are the caller's fault and undefined. NaN and infinity
    in the operands come through to `squared`, so that a diverged cell is noticed.
    """

    def encode_select(self, x: Tensor, W_enc: Tensor, bias: Tensor, ks: Sequence[int]) -> list[Selected]:
        """For each k of `ks` the k largest of ReLU(x W_enc^T + bias), exactly; [batch, n_latents] is never whole.

        x [batch, d_model] and W_enc [n_latents, d_model], both bfloat16 or both float32, are multiplied with float32
        accumulation (a bfloat16 product may be rounded to bfloat16); bias [n_latents] is added in float32.
        """

    def select_above(self, x: Tensor, W_enc: Tensor, bias: Tensor, threshold: Tensor, most: int) -> Selected | None:
        """All latents of each token whose pre-activation x W_enc^T + bias exceeds `threshold` [n_latents].

        Operands are those of `encode_select`, and [batch, n_latents] is never whole here either. `z` holds the
        pre-activations, of whatever sign; indices ascend, and rows are as wide as the widest has latents, but at least
        1. None where that makes more than `most` pairs.
        """

    def decode(
        self, x: Tensor, offset: Tensor, selected: Selected, W_dec: Tensor, scale: float | None, error: Tensor
    ) -> Decoded:
        """Writes x - offset - z W_dec to `error` [batch, d_model]; with `scale`, dz = scale error . W_dec[index].

        dz is 0 where z is (ReLU). x [batch, d_model], offset [d_model], W_dec [n_latents, d_model].
        """

    def gradient_by_z(self, error: Tensor, indices: Tensor, W_dec: Tensor, scale: float) -> Tensor:
        """float32 [batch, k], as of `decode` but for any `error` [batch, d_model] and at every index [batch, k]:
        scale * error . W_dec[index], 0 where the index is -1."""

    def transpose(self, terms: Sequence[Term], n_latents: int) -> Pairs:
        """The pairs of `terms` with z > 0 by latent; the same order at every call."""

    def latent_sums(self, pairs: Pairs) -> Tensor:
        """[n_latents]: the sum of `encoder` over each latent's pairs, in their order."""

    def update_rows(
        self,
        parameter: Tensor,
        moments: Moments,
        gradient: Summands,
        adam: AdamStep,
        unit_rows: bool,
        operand: Tensor | None,
    ) -> None:
        """One step of a matrix [n_latents, d_model], in place and in one pass over it and its moments.

        Sums the gradient's row, projects it off the row where `unit_rows`, applies Adam, scales the row back to unit
        norm where `unit_rows`, takes it into the average, and rounds it to `operand` (bfloat16) where there is one.
        """


class DeadKernels(Protocol):
    """What an implementation may have beside for AuxK: one product for both selections, and the dead rows by pairs.

    Its caller has to know the names of dead latents before the batch, so it is for devices on which asking for them
    waits for nothing.
    """

    def encode_select(
        self, x: Tensor, W_enc: Tensor, bias: Tensor, ks: Sequence[int], kept: Kept | None
    ) -> list[Selected]:
        """Kernels.encode_select, which writes kept.pre besides while the product is in the cache."""

    def select(self, pre: Tensor, bias: Tensor, k: int) -> Selected:
        """The k largest of ReLU(pre + bias); pre [batch, n] as in Kept, bias [n], which may be -inf."""

    def dead_rows(
        self, x: Tensor, error: Tensor, selected: Selected, W_dec: Tensor, latents: Tensor, scale: float
    ) -> DeadGradient:
        """e_hat = z W_dec[latents] for e = `error` [batch, d_model], and its squared error's gradient times scale / 2.

        `selected` indexes `latents` (int64), each token's pairs before its padding; their order, which may change in
        place, costs least where it ascends. `scale` times e_hat - e is the gradient by e_hat.
        """


_PRODUCT_ENTRIES = {"cpu": 2**23, "cuda": 2**27}
_PRODUCT_ROWS = 512


def product_rows(batch: int, n_latents: int, device: str) -> int:
    """Tokens whose pre-activations [rows, n_latents] are made, and held, at a time.

    On a CPU so many that they are still in the cache when they are selected from, on CUDA 256 MiB of bfloat16; but no
    fewer than 512, which would slow the product down.
    """
    return min(batch, max(_PRODUCT_ROWS, _PRODUCT_ENTRIES[device] // n_latents))


def group_size(n_latents: int, k: int) -> int:
    """Entries of a group of the two-level top-k on CUDA, a power of two: about as many entries lie in the k groups that
    are searched as there are groups."""
    size = 1
    while 4 * size * size * k <= n_latents:
        size *= 2
    return size
