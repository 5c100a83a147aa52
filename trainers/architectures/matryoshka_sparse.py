"""The sparse path of Matryoshka: BatchTopK's selection, in groups by the prefix in which a latent comes in."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from saescale.trainers.architectures.architecture import Batch, Params, Shape
from saescale.trainers.architectures.batchtopk_sparse import BatchTopKStep
from saescale.trainers.architectures.nested import Nested, by_index
from saescale.trainers.architectures.topk_sparse import Chosen
from saescale.trainers.kernels.choose import KernelKind
from saescale.trainers.kernels.interface import Kept
from saescale.trainers.mesh.mesh import Mesh
from saescale.trainers.mesh.traffic import Said
from saescale.trainers.precision import Precision


class MatryoshkaStep(Nested, BatchTopKStep):
    """`prefixes` says where those end that are shorter than all latents."""

    def __init__(self, prefixes: Callable[[int], list[int]]) -> None:
        self.prefixes = prefixes

    def choose(
        self, params: Params, operands: Params, batch: Batch, offset: Tensor, settings: Any, mesh: Mesh,
        kept: Kept | None,
    ) -> Chosen:  # fmt: skip
        active = super().choose(params, operands, batch, offset, settings, mesh, kept).active
        n_latents = mesh.whole(len(params["W_dec"]))
        ends = [*self.prefixes(n_latents), n_latents]
        own = [min(max(0, end - mesh.first), len(params["W_dec"])) for end in ends]
        return Chosen(active, by_index(active, own, mesh), [1 / len(ends)] * len(ends))

    def said(self, settings: Any, n_latents: int) -> Said:
        return super().said(settings, n_latents)._replace(sums=len(self.prefixes(n_latents)) + 1)

    def training_bytes(
        self, shape: Shape, settings: Any, batch: int, precision: Precision, kernels: KernelKind
    ) -> float:
        errors = len(self.prefixes(shape.n_latents)) * batch * shape.d_model * 4
        return super().training_bytes(shape, settings, batch, precision, kernels) + errors
