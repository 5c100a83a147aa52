"""FLOPs are of what steps did: held to the pairs that gradients were summed over."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saescale.scaling.compute import Flops
from saescale.trainers.architectures import auxk
from saescale.trainers.architectures.architecture import Batch, Worked
from saescale.trainers.architectures.dead import DeadLatents
from saescale.trainers.architectures.topk import flops
from saescale.trainers.architectures.topk_sparse import Gradient, TopKStep
from saescale.trainers.cell import Cell
from saescale.trainers.kernels import choose
from saescale.trainers.preprocess import measure_centre, normalise
from saescale.trainers.training.training_cell import TrainingCell
from tests.trainers.topk_case import random_sae, take_step

BATCH, STEPS = 64, 40
CPU = torch.device("cpu")


def cell_of(d_model: int, n_latents: int, k: int, **own: object) -> Cell:
    return Cell(
        store="s", d_model=d_model, n_latents=n_latents, k=k, settings=own, tokens=STEPS * BATCH, batch_tokens=BATCH,
        lr=3e-3, dead_after_tokens=4 * BATCH, ema=0.9,
    )  # fmt: skip


def batches(d_model: int) -> list[torch.Tensor]:
    """[BATCH, d_model] each, of few directions, so that latents die."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(6, d_model, generator=generator)
    return [
        normalise(torch.rand(BATCH, 6, generator=generator) @ directions + 0.1 * torch.randn(d_model))
        for _ in range(STEPS)
    ]


@pytest.mark.parametrize(
    ("d_model", "n_latents", "k", "own"),
    [
        (64, 128, 8, {"k_aux": 256}),  # more than there are latents
        (32, 256, 2, {"k_aux": 8}),
        (32, 96, 24, {"k_aux": 16, "multi_topk": True}),  # 4k = N
    ],
)
def test_a_cell_counts_the_pairs_that_its_gradients_were_summed_over_across_a_restart(
    d_model: int, n_latents: int, k: int, own: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # AuxK's pairs too go into the gradient as pairs.
    monkeypatch.setattr(choose, "dead_kernels", lambda sparse, device: None)
    monkeypatch.setattr(auxk, "FEW_DEAD", 0)
    real, summed = TopKStep.update, []

    def update(self: TopKStep, params: Any, operands: Any, gradient: Gradient, *rest: Any) -> None:
        summed.append(int(gradient.pairs.starts[-1]))
        real(self, params, operands, gradient, *rest)

    monkeypatch.setattr(TopKStep, "update", update)
    rows = batches(d_model)
    centre, cell = measure_centre(torch.cat(rows)), cell_of(d_model, n_latents, k, **own)
    training, at_work = TrainingCell(cell, centre, CPU), 0
    for number, x in enumerate(rows):
        if number == STEPS // 2 + 3:
            state, tensors = json.loads(json.dumps(training.state())), training.tensors()
            training = TrainingCell(cell, centre, CPU)
            training.restore(tensors, state)
        before = training.worked
        training.train_on(Batch.of(x, centre.b_pre, False))
        did, dead = training.worked, int(training.dead.after(cell.dead_after_tokens).sum())
        assert did.dead - before.dead == dead * BATCH
        assert did.selected_aux - before.selected_aux <= min(dead, int(str(own["k_aux"]))) * BATCH
        at_work += did.selected_aux > before.selected_aux
        training.record(nmse=1.0, l0=1.0, tokens_per_s=1.0)
    assert training.error is None
    assert STEPS / 4 < at_work < STEPS  # no latent is dead to begin with

    done = np.cumsum(summed)
    assert [row.flops for row in training.curve] == [
        2 * n_latents * d_model * BATCH * (i + 1) + 8 * d_model * int(done[i]) for i in range(STEPS)
    ]
    assert training.flops.sparse == training.curve[-1].flops < training.flops.dense
    # A plan expects no dead latents.
    assert training.flops.dense > cell.flops(cell.tokens).dense >= cell.flops(cell.tokens).sparse


@settings(max_examples=40, deadline=None)
@given(
    d_model=st.sampled_from([2, 17, 64]),
    n_latents=st.sampled_from([1, 7, 128, 150]),
    k_share=st.floats(0, 1),
    k_aux=st.sampled_from([0, 3, 64, 300]),
    multi=st.booleans(),
    dead_share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_sparse_is_never_more_than_dense(
    d_model: int, n_latents: int, k_share: float, k_aux: int, multi: bool, dead_share: float, seed: int
) -> None:
    sae = random_sae(d_model, n_latents, max(1, round(k_share * n_latents)), seed, k_aux=k_aux, multi_topk=multi)
    dead = DeadLatents(n_latents)
    dead.tokens_since[torch.rand(n_latents) < dead_share] = 1000
    step = take_step(sae, torch.randn(20, d_model), torch.zeros(d_model), dead, window=1000)
    done = flops(sae.shape, sae.settings, step.worked)
    assert 0 < done.sparse <= done.dense


def test_auxk_costs_nothing_while_no_latent_is_dead() -> None:
    sae = random_sae(16, 40, 4, seed=1, k_aux=32)
    step = take_step(sae, torch.randn(30, 16), torch.zeros(16), DeadLatents(40), window=1000)
    without = random_sae(16, 40, 4, seed=1, k_aux=0)
    assert flops(sae.shape, sae.settings, step.worked) == flops(without.shape, without.settings, step.worked)
    assert flops(sae.shape, sae.settings, Worked(30, 120)) == Flops(30 * 2 * 40 * 16 + 8 * 120 * 16, 30 * 12 * 40 * 16)
