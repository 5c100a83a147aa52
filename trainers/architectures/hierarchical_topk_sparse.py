"""The sparse path of HierarchicalTopK: TopK's selection, in groups by the level at which a latent comes in."""

from typing import Any

from torch import Tensor

from saescale.trainers.architectures.architecture import Batch, Params, Shape
from saescale.trainers.architectures.nested import Nested, by_rank
from saescale.trainers.architectures.sparse_parts import select
from saescale.trainers.architectures.topk_sparse import Chosen, TopKStep
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.kernels.interface import Kept
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.mesh.traffic import Said
from saescale.trainers.precision import Precision


class HierarchicalTopKStep(Nested, TopKStep):
    def choose(
        self, params: Params, operands: Params, batch: Batch, offset: Tensor, settings: Any, mesh: Mesh,
        kept: Kept | None,
    ) -> Chosen:  # fmt: skip
        active = select(params, operands, batch, offset, [settings.k], mesh, kept)[0]
        return Chosen(active, by_rank(active, settings.levels(), mesh), settings.weights())

    def said(self, settings: Any, n_latents: int) -> Said:
        levels = settings.levels()
        # What is active, then which of it each level has.
        return Said([settings.k, *levels], len(levels), settings.k)

    def training_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        errors = (len(settings.levels()) - 1) * batch * shape.d_model * 4
        return super().training_bytes(shape, settings, batch, precision, kernels) + errors
