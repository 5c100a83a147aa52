"""The sparse path of BatchTopK: of each token a few candidates, then those of them that are the batch's largest.

The batch's k * batch largest are exact: a token whose candidates are all among them may have more, and is scored again
with more of them until none is. That seldom happens, so the product is made once for nearly all tokens.
"""

from typing import Any

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import Batch, Params, Reconstruction, Shape
from saescale.trainers.architectures.sparse_parts import (
    active_pairs,
    encode_select,
    encoder_operands,
    or_nan,
    target_of,
)
from saescale.trainers.architectures.topk_sparse import Chosen, TopKStep
from saescale.trainers.kernels.choose import KernelKind, kernels
from saescale.trainers.kernels.interface import Kept, Kernels, Selected
from saescale.trainers.mesh.mesh import ALONE, Mesh
from saescale.trainers.precision import Precision

CANDIDATES = 2  # times k, of each token to begin with
WIDEST = 8  # times k: the most that one token is expected to have, for memory


class BatchTopKStep(TopKStep):
    """FastStep of BatchTopK, for one process: what is selected depends on all tokens and all latents."""

    def choose(
        self, params: Params, operands: Params, batch: Batch, offset: Tensor, settings: Any, mesh: Mesh,
        kept: Kept | None,
    ) -> Chosen:  # fmt: skip
        x, W_enc, bias = encoder_operands(params, operands, batch, offset)
        selected = or_nan(batch_top_k(kernels(x.device), x, W_enc, bias, settings.k, kept), bias)
        return Chosen(selected, [selected], [1.0])

    def parts(self, losses: Any, chosen: Chosen) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def calibrate(self, params: Params, operands: Params, batch: Batch, settings: Any) -> None:
        """Writes params["threshold"]: just below the smallest activation that is active in this batch."""
        offset = params["b_pre"] - batch.origin
        chosen = BatchTopKStep.choose(self, params, operands, batch, offset, settings, ALONE, None)
        z = chosen.active.z
        smallest = z.masked_fill(z <= 0, torch.inf).amin()
        below = torch.nextafter(smallest, torch.zeros_like(smallest))
        params["threshold"].copy_(torch.where(smallest.isfinite(), below, 0.0))

    @torch.no_grad()
    def reconstruct(self, params: Params, operands: Params, batch: Batch, settings: Any, mesh: Mesh) -> Reconstruction:
        """By the threshold, which a token's company does not move."""
        offset = params["b_pre"] - batch.origin
        x, W_enc, bias = encoder_operands(params, operands, batch, offset)
        sparse, threshold = kernels(x.device), params["threshold"].expand(len(bias)).contiguous()
        above = sparse.select_above(x, W_enc, bias, threshold, len(x) * len(bias))
        assert above is not None
        selected = or_nan(above, bias)
        error = torch.empty_like(batch.x)
        decoded = sparse.decode(target_of(batch), offset, selected, params["W_dec"], None, error)
        return Reconstruction(error, decoded.squared, active_pairs(selected))

    def training_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        """Selections are as wide as the token that has most latents."""
        wider = settings.model_copy(update={"k": min(WIDEST * settings.k, shape.n_latents)})
        return super().training_bytes(shape, wider, batch, precision, kernels)

    def evaluation_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        wider = settings.model_copy(update={"k": min(WIDEST * settings.k, shape.n_latents)})
        return super().evaluation_bytes(shape, wider, batch, precision, kernels)


def batch_top_k(sparse: Kernels, x: Tensor, W_enc: Tensor, bias: Tensor, k: int, kept: Kept | None = None) -> Selected:
    """The k * batch largest positive entries of x W_enc^T + bias, exactly; operands as `encode_select` takes them.

    Indices ascend, and -1 follows; ties go to the lower token, then to the lower index.
    """
    n_latents = len(bias)
    wanted, width = k * len(x), min(CANDIDATES * k, n_latents)
    (best,) = encode_select(sparse, x, W_enc, bias, [width], kept)
    while True:
        # No more than k a token: what is wanted never exceeds what there is.
        bound = best.z.flatten().topk(wanted, sorted=False).values.amin()
        least = best.z.amin(dim=1)
        rows = ((least >= bound) & (least > 0)).nonzero().flatten()
        if width == n_latents or not len(rows):
            return _kept(best, bound, wanted, n_latents)
        width = min(2 * width, n_latents)
        (more,) = sparse.encode_select(x[rows], W_enc, bias, [width])
        missing = width - best.z.shape[1]
        best = Selected(
            torch.nn.functional.pad(best.indices, (0, missing), value=-1).index_copy_(0, rows, more.indices),
            torch.nn.functional.pad(best.z, (0, missing)).index_copy_(0, rows, more.z),
        )


def _kept(best: Selected, bound: Tensor, wanted: int, n_latents: int) -> Selected:
    """Of `best` the `wanted` largest, of which `bound` is the smallest."""
    indices = torch.where(best.z >= bound.clamp_min(torch.finfo(bound.dtype).tiny), best.indices, n_latents)
    indices, order = indices.sort(dim=1)
    widest = max(1, int((indices < n_latents).sum(dim=1).amax()))
    indices, z = indices[:, :widest], best.z.gather(1, order[:, :widest])
    z.masked_fill_(indices == n_latents, 0)
    surplus = int((z > 0).sum()) - wanted
    if surplus > 0:
        # Ties, in the order in which they are to be kept: the last ones go.
        tokens, places = ((z == bound) & (z > 0)).nonzero()[-surplus:].T
        z[tokens, places] = 0
        indices[tokens, places] = n_latents
        indices, order = indices.sort(dim=1)
        z = z.gather(1, order)
    return Selected(indices.masked_fill(indices == n_latents, -1).contiguous(), z.contiguous())
