"""Trains a cell with sparsify, the fastest peer, on rows from a file; bench_quality.py starts it.

    python -m tests.benchmarks.peers_train ROWS.npy B N K STEPS LR OUT.npz [--threads T]

runs in the peers' environment. ROWS.npy holds preprocessed rows, float32 [rows, D], which are taken B at a time from
the first to the last and then again. OUT.npz gets W_enc and W_dec [N, D], b_enc [N] and b_pre [D].
"""

import argparse
import os
import sys
from collections.abc import Iterator

import numpy as np
import torch

from tests.benchmarks.peers import _Contexts, _Subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    for name in ("batch", "latents", "k", "steps"):
        parser.add_argument(name, type=int)
    parser.add_argument("lr", type=float)
    parser.add_argument("out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoderConfig, TrainConfig, Trainer  # type: ignore[import-not-found]

    rows = torch.from_numpy(np.load(arguments.rows))
    config = TrainConfig(
        SparseCoderConfig(num_latents=arguments.latents, k=arguments.k), batch_size=1, optimizer="adam",
        lr=arguments.lr, hookpoints=["site"], save_every=10**6, log_to_wandb=False, lr_warmup_steps=50,
    )  # fmt: skip
    subject = _Subject(rows.shape[1])
    contexts = _Steps(subject, _batches(rows, arguments.batch), arguments.batch, arguments.steps)
    trainer = Trainer(config, contexts, subject)
    trainer.fit()
    sae = trainer.saes["site"]
    found = {"W_enc": sae.encoder.weight, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_pre": sae.b_dec}
    np.savez(arguments.out, **{name: tensor.detach().float().numpy() for name, tensor in found.items()})


class _Steps(_Contexts):
    """As many as are asked for, so that sparsify's schedule ends where the training does."""

    def __init__(self, subject: _Subject, batches: Iterator[torch.Tensor], batch_tokens: int, steps: int) -> None:
        super().__init__(subject, batches, batch_tokens)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps


def _batches(rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    while True:
        yield from rows.split(size)


if __name__ == "__main__":
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    main()
