"""saescale's own training step and the floors under any step, as contenders (protocol.py).

    python -m tests.benchmarks.ours NAME B D N K [--threads T]

runs in saescale's environment.

saescale-bf16, saescale-fp32  One step of one cell on a preprocessed batch: centring, losses and gradient, then the
                              optimiser with projection, Adam, renormalisation and EMA. AuxK is on; no latent is dead.
gemm-bf16, gemm-fp32          The encoder product alone, [B, D] x [D, N] into memory that is there already. The fastest
                              form that torch has for it: each layout of weights and output is tried at the start.
NAME-bf16, NAME-fp32          The same of another architecture, at L0 = k: where an architecture has no k of its own,
                              biases or thresholds are moved there before the first step, as if it had trained for long.
NAME-dense                    The same by its dense reference in float32, and autograd.
"""

import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

from saescale.trainers.architectures import parts
from saescale.trainers.architectures.architecture import Batch, find_architecture
from saescale.trainers.architectures.dense import DenseStep
from saescale.trainers.cell import Cell, auto_k_aux
from saescale.trainers.device import set_threads
from saescale.trainers.precision import Precision
from saescale.trainers.preprocess import Centre, measure_centre
from saescale.trainers.training.training_cell import TrainingCell
from tests.benchmarks.protocol import Server, Size, serve, unit_rows

DEAD_AFTER_TOKENS = 10_000_000  # what the peers take too: beyond what a benchmark trains
TRIALS = 2  # of each form of the encoder product


def training_cell(size: Size, centre: Centre, precision: Precision, k_aux: int, device: str = "cpu") -> TrainingCell:
    """A TopK cell of that size at its first step."""
    cell = Cell(
        store="random", d_model=size.d_model, n_latents=size.n_latents, k=size.k, tokens=10**6 * size.batch_tokens,
        batch_tokens=size.batch_tokens, lr=2e-4 * (2**14 / size.n_latents) ** 0.5, settings={"k_aux": k_aux},
        dead_after_tokens=DEAD_AFTER_TOKENS, precision=precision,
    )  # fmt: skip
    return TrainingCell(cell, centre, torch.device(device))


def saescale_step(size: Size, sample: Tensor, precision: Precision) -> Callable[[Tensor], float]:
    """A cell's training step on preprocessed x [batch_tokens, d_model], which returns the loss.

    `sample` [rows, d_model], preprocessed, stands for the first rows of the stream.
    """
    centre = measure_centre(sample)
    cell = training_cell(size, centre, precision, auto_k_aux(size.d_model))

    def train(x: Tensor) -> float:
        cell.train_on(Batch.of(x, centre.b_pre, precision == "bf16"))
        return cell.loss

    return train


def saescale(size: Size, server: Server, precision: Precision) -> None:
    # Anew, for numba's threads as well.
    set_threads(torch.get_num_threads())
    inputs = unit_rows(size)
    train = saescale_step(size, torch.cat(inputs), precision)
    about = {"library": f"saescale {version('saescale')}", "settings": f"{precision} encoder product"}
    for x in server.batches(inputs, about):
        server.loss = train(x)


ARCHITECTURES = (
    "batchtopk", "matryoshka", "hierarchical_topk", "jumprelu", "relu", "gated", "prolu", "switch",
)  # fmt: skip
STILL = 1e-9  # a learning rate that leaves L0 where it is


def architecture_step(size: Size, server: Server, name: str, how: str) -> None:
    """`how`: a precision, or "dense"."""
    set_threads(torch.get_num_threads())
    inputs = unit_rows(size)
    centre = measure_centre(torch.cat(inputs))
    precision: Precision = "bf16" if how == "bf16" else "fp32"
    fields = find_architecture(name).Settings.model_fields
    asked = {"k_aux": auto_k_aux(size.d_model), "coefficient": 0.02}
    cell = Cell(
        store="random", d_model=size.d_model, n_latents=size.n_latents, k=size.k, tokens=10**6 * size.batch_tokens,
        batch_tokens=size.batch_tokens, lr=STILL, architecture=name, precision=precision,
        settings={key: value for key, value in asked.items() if key in fields}, dead_after_tokens=DEAD_AFTER_TOKENS,
    )  # fmt: skip
    training = TrainingCell(cell, centre, torch.device("cpu"))
    _reach_k(training, inputs[0])
    if how == "dense":
        training.sae.step = DenseStep(training.sae.architecture, size.n_latents)
    settings = "dense reference, autograd" if how == "dense" else f"{how} encoder product"
    for x in server.batches(inputs, {"library": f"saescale {version('saescale')}", "settings": settings}):
        training.train_on(Batch.of(x, centre.b_pre, precision == "bf16"))
        assert training.error is None, training.error
        server.loss = training.loss


def _reach_k(training: TrainingCell, x: Tensor) -> None:
    """Moves what decides on activity so that k latents of a token are active on average.

    The encoder is scaled as for k active latents: at its start it is for half of them, and pre-activations are so small
    that all lie within JumpReLU's bandwidth of any threshold.
    """
    params, k = training.sae.params, training.sae.settings.k
    by_bias, by_threshold = params.get("b_gate", params.get("b_enc")), params.get("threshold")
    if "k_aux" in type(training.sae.settings).model_fields or training.sae.name == "switch":
        return  # it has a k of its own
    tied = parts.tied_parameters(
        training.sae.shape, Centre(torch.zeros(training.sae.shape.d_model), 1.0), training.cell.seed,
        lambda pre: parts.top_k(pre, k).relu(),
    )  # fmt: skip
    params["W_enc"].copy_(tied["W_enc"].data)
    pre = (x - params["b_pre"]) @ params["W_enc"].T
    level = float(pre.flatten().topk(k * len(x)).values[-1])
    if by_threshold is not None:
        by_threshold.fill_(level)
    else:
        by_bias.fill_(-level)
    if "b_mag" in params:
        params["b_mag"].fill_(-level)
    training.sae.round()


def gemm(size: Size, server: Server, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in unit_rows(size)]
    by_latent = torch.randn(size.n_latents, size.d_model).to(dtype)
    by_dimension = by_latent.T.contiguous()
    # One memory for both layouts of the output: at the largest size it has gigabytes.
    out = torch.empty(size.batch_tokens * size.n_latents, dtype=dtype)
    pre, pre_transposed = out.view(size.batch_tokens, size.n_latents), out.view(size.n_latents, size.batch_tokens)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "x @ W.T, W [N, D]": lambda x: torch.mm(x, by_latent.T, out=pre),
        "x @ W, W [D, N]": lambda x: torch.mm(x, by_dimension, out=pre),
        "W @ x.T, W [N, D]": lambda x: torch.mm(by_latent, x.T, out=pre_transposed),
        "W.T @ x.T, W [D, N]": lambda x: torch.mm(by_dimension.T, x.T, out=pre_transposed),
    }

    def seconds(form: str) -> float:
        began = time.perf_counter()
        forms[form](inputs[0])
        return time.perf_counter() - began

    # In turn, so that a disturbance does not fall on one form; the first turn only warms up.
    turns = [{form: seconds(form) for form in forms} for _ in range(1 + TRIALS)][1:]
    fastest = min(forms, key=lambda form: min(turn[form] for turn in turns))
    for x in server.batches(inputs, {"library": "torch", "settings": fastest}):
        forms[fastest](x)


OURS: dict[str, Callable[[Size, Server], None]] = {
    "saescale-bf16": partial(saescale, precision="bf16"),
    "saescale-fp32": partial(saescale, precision="fp32"),
    **{
        f"{name}-{how}": partial(architecture_step, name=name, how=how)
        for name in ARCHITECTURES
        for how in ("bf16", "fp32", "dense")
    },
    "gemm-bf16": partial(gemm, dtype=torch.bfloat16),
    "gemm-fp32": partial(gemm, dtype=torch.float32),
}


if __name__ == "__main__":
    serve(OURS, __doc__)
