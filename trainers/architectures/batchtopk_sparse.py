"""The sparse path of BatchTopK: of each token a few candidates, then those of them that are the batch's largest.

The batch's k * batch largest are exact: a token whose candidates are all among them may have more, and is scored again
with more of them until none is. That seldom happens, so the product is made once for nearly all tokens.
"""

from typing import Any

import torch
from torch import Tensor

from saescale.trainers.architectures.architecture import Batch, Params, Shape
from saescale.trainers.architectures.sparse_parts import (
    encode_select,
    encoder_operands,
    or_nan,
    rows_of,
)
from saescale.trainers.architectures.topk_sparse import Chosen, TopKStep
from saescale.trainers.kernels import choose
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.kernels.interface import Kept, Kernels, Selected
from saescale.trainers.mesh.keys import keys_of, scores_of
from saescale.trainers.mesh.mesh import ALONE, Mesh
from saescale.trainers.mesh.traffic import Said
from saescale.trainers.precision import Precision

CANDIDATES = 2  # times k, of each token to begin with
WIDEST = 8  # times k: the most that one token is expected to have, for memory


class BatchTopKStep(TopKStep):
    """FastStep of BatchTopK. What is selected depends on all tokens and all latents, those of other processes too."""

    def choose(
        self, params: Params, operands: Params, batch: Batch, offset: Tensor, settings: Any, mesh: Mesh,
        kept: Kept | None,
    ) -> Chosen:  # fmt: skip
        x, W_enc, bias = encoder_operands(params, operands, batch, offset)
        selected = or_nan(batch_top_k(choose.kernels(x.device), x, W_enc, bias, settings.k, kept, mesh), bias)
        return Chosen(selected, [selected], [1.0])

    def parts(self, losses: Any, chosen: Chosen) -> dict[str, float]:
        return {}

    def said(self, settings: Any, n_latents: int) -> Said:
        return Said([], 1, settings.k, of_batch=1)

    @torch.no_grad()
    def calibrate(self, params: Params, operands: Params, batch: Batch, settings: Any, mesh: Mesh) -> None:
        """Writes params["threshold"]: just below the smallest activation that is active in this batch."""
        offset = params["b_pre"] - batch.origin
        chosen = BatchTopKStep.choose(self, params, operands, rows_of(batch, mesh), offset, settings, mesh, None)
        z = chosen.active.z
        smallest = mesh.gather_all(z.masked_fill(z <= 0, torch.inf).amin()).amin()
        below = torch.nextafter(smallest, torch.zeros_like(smallest))
        params["threshold"].copy_(torch.where(smallest.isfinite(), below, 0.0))

    def used(
        self, params: Params, operands: Params, batch: Batch, offset: Tensor, settings: Any, mesh: Mesh
    ) -> Selected:  # fmt: skip
        """Those above the threshold, which a token's company does not move."""
        x, W_enc, bias = encoder_operands(params, operands, batch, offset)
        threshold = params["threshold"].expand(len(bias)).contiguous()
        above = choose.kernels(x.device).select_above(x, W_enc, bias, threshold, len(x) * len(bias))
        assert above is not None
        return or_nan(above, bias)

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


def batch_top_k(
    sparse: Kernels, x: Tensor, W_enc: Tensor, bias: Tensor, k: int, kept: Kept | None = None, mesh: Mesh = ALONE
) -> Selected:
    """The k * batch largest positive entries of x W_enc^T + bias, exactly; operands as `encode_select` takes them.

    Indices ascend, and -1 follows; ties go to the lower token, then to the lower index. Of a mesh x are this replica's
    rows, and those of all replicas are one batch; W_enc and bias this shard's, and what is returned too.
    """
    n_latents = len(bias)
    wanted, width = k * len(x) * mesh.replicas, min(CANDIDATES * k, n_latents)
    (best,) = encode_select(sparse, x, W_enc, bias, [width], kept)
    while True:
        bound = _bound(best.z, wanted, mesh)
        least = best.z.amin(dim=1)
        wider = (least >= bound) & (least > 0) & (width < n_latents)
        rows = wider.nonzero().flatten()
        if not int(mesh.gather_all(wider.sum()).sum()):
            return _kept(best, bound, wanted, n_latents, mesh)
        if not len(rows):  # but of another process, whose candidates may move the bound
            continue
        width = min(2 * width, n_latents)
        (more,) = sparse.encode_select(x[rows], W_enc, bias, [width])
        missing = width - best.z.shape[1]
        best = Selected(
            torch.nn.functional.pad(best.indices, (0, missing), value=-1).index_copy_(0, rows, more.indices),
            torch.nn.functional.pad(best.z, (0, missing)).index_copy_(0, rows, more.z),
        )


def _bound(z: Tensor, wanted: int, mesh: Mesh) -> Tensor:
    """A score that the `wanted` largest candidates reach and no other does, but for equal ones."""
    if mesh.alone:
        # No more than k a token: what is wanted never exceeds what there is.
        return z.flatten().topk(wanted, sorted=False).values.amin()
    return scores_of(mesh.kth_largest(keys_of(z[z > 0], z.new_zeros(()).long()), wanted))


def _kept(best: Selected, bound: Tensor, wanted: int, n_latents: int, mesh: Mesh) -> Selected:
    """Of `best` the `wanted` largest, of which `bound` is the smallest."""
    indices = torch.where(best.z >= bound.clamp_min(torch.finfo(bound.dtype).tiny), best.indices, n_latents)
    indices, order = indices.sort(dim=1)
    widest = max(1, int(mesh.gather_all((indices < n_latents).sum(dim=1).amax()).amax()))
    indices, z = indices[:, :widest], best.z.gather(1, order[:, :widest])
    if (short := widest - indices.shape[1]) > 0:  # as wide in all replicas, of which another one looked further
        indices, z = (torch.nn.functional.pad(t, (0, short), value=v) for t, v in ((indices, n_latents), (z, 0)))
    z.masked_fill_(indices == n_latents, 0)
    surplus = int(mesh.gather_all((z > 0).sum()).sum()) - wanted
    if surplus > 0:
        # Ties, in the order in which they are to be kept: the last ones go.
        tokens, places = ((z == bound) & (z > 0)).nonzero().T
        number = mesh.rows(len(z) * mesh.replicas).start + tokens
        order = number * mesh.whole(n_latents) + mesh.first + indices[tokens, places]
        last = order >= mesh.kth_largest(order, surplus)
        tokens, places = tokens[last], places[last]
        z[tokens, places] = 0
        indices[tokens, places] = n_latents
        indices, order = indices.sort(dim=1)
        z = z.gather(1, order)
    return Selected(indices.masked_fill(indices == n_latents, -1).contiguous(), z.contiguous())
