"""A cell: one SAE to train, named by a hash of everything that defines it."""

import hashlib
import math
from functools import cached_property
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from saescale.scaling.compute import Flops, flops_per_token
from saescale.storage.columns import CurveRow

__all__ = ["Cell", "CurveRow", "EvalSpec", "Precision", "auto_k_aux"]

Precision = Literal["fp32", "bf16"]  # of the operands of the encoder product


class EvalSpec(BaseModel):
    """When and on what nmse is measured."""

    model_config = ConfigDict(extra="forbid")

    tokens: int = Field(default=32_768, gt=0, strict=True)  # held-out rows
    every_tokens: int = Field(default=16_384, gt=0, strict=True)  # training tokens between two points of the curve


class Cell(BaseModel):
    """One SAE of a sweep: what it is (n_latents, k, activation, seed) and how it is trained.

    Two cells with the same fields are the same experiment: they share `cell_id`, and a sweep never trains one twice.
    Token counts are numbers of activations (rows of the store), counted with repetition over passes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str  # fingerprint of the activation store
    d_model: int = Field(gt=0)
    n_latents: int = Field(gt=0)
    k: int = Field(gt=0)
    activation: Literal["topk"] = "topk"
    seed: int = 0  # of the initial decoder
    stream_seed: int = 0  # of the order of the data; one for the whole sweep
    tokens: int = Field(gt=0)
    batch_tokens: int = Field(gt=0)
    lr: float = Field(gt=0)
    k_aux: int = Field(ge=0)  # 0 switches AuxK off
    auxk_coefficient: float = Field(default=1 / 32, ge=0)
    dead_after_tokens: int = Field(gt=0)
    multi_topk: bool = False
    ema: float = Field(default=0.999, ge=0, lt=1)
    precision: Precision = "fp32"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.k > self.n_latents:
            raise ValueError(f"k={self.k} is larger than n_latents={self.n_latents}: a TopK SAE needs k <= n_latents")
        if self.tokens % self.batch_tokens:
            raise ValueError(f"tokens={self.tokens} is not a multiple of batch_tokens={self.batch_tokens}")
        return self

    @cached_property
    def cell_id(self) -> str:
        """Readable prefix and the first 8 hex digits of the SHA-256 of all fields."""
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()
        return f"n{self.n_latents}-k{self.k}-s{self.seed}-{digest[:8]}"

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def dead_after_tokens_long(self) -> int:
        """The second, longer window at which dead latents are reported: four times the one that AuxK acts on."""
        return 4 * self.dead_after_tokens

    def flops(self, tokens: int) -> Flops:
        """Training FLOPs spent after `tokens` tokens (paper.md, compute): sparse, and dense-equivalent."""
        multi_k = min(4 * self.k, self.n_latents) if self.multi_topk else 0
        per_token = flops_per_token(self.d_model, self.n_latents, self.k, self.k_aux, multi_k)
        return Flops(sparse=per_token.sparse * tokens, dense=per_token.dense * tokens)


def auto_k_aux(d_model: int) -> int:
    """The power of two nearest to d_model / 2 (Gao et al. 2024, appendix A.2: 512 typical, 256 at d_model 768)."""
    return 2 ** round(math.log2(d_model / 2))
