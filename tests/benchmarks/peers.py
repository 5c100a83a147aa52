"""One training step of other libraries' TopK SAEs, each by its own training loop, fed from memory.

    python -m tests.benchmarks.peers NAME B D N K [--threads T] [--device D]

runs in the peers' environment (peers_requirements.txt), imports nothing of saescale, and speaks protocol.py on stdin
and stdout. No step is rewritten here: `Trainer.fit`, `SAETrainer.fit` and `trainSAE` run as they are and take their
next batch when the harness asks for a step; W&B and checkpoints are switched off. Weights and inputs are float32 on the
device, the CPU unless told otherwise. Settings are the library's defaults but for what the name says. No latent is dead
in so few steps, so AuxK costs nobody more than looking for dead latents.

sparsify-adam        SparseCoder under Trainer.fit: activations copied through the token mask, decoder rows normalised,
                     fused encoder (ReLU, top-k), embedding_bag decode, FVU, encoder gradient by index_add over
                     [batch k, d], gradient projected off the decoder rows, torch's Adam, a linear schedule, dead
                     latents counted. AuxK is off and there is no gradient clipping. Its fastest optimiser here.
sparsify-signum      The same with the optimiser that is its default: SignSGD in a schedule-free wrapper.
saelens-sparse       TopKTrainingSAE under SAETrainer.fit: encoder, top-k as a sparse COO matrix, sparse decode, MSE,
                     AuxK, firing statistics, backward (dense for the encoder), gradient norm clipped to 1, torch's
                     Adam, a constant schedule. Decoder rows are free. use_sparse_activations=True, its fastest setting
                     in float32; that needs rescale_acts_by_decoder_norm=False, since torch cannot differentiate the
                     rescaling of a sparse matrix on the CPU.
saelens-dense        The same with its defaults: decoder norms in the pre-activations, top-k scattered into a dense
                     matrix, dense products throughout.
saelens-autocast     saelens-dense with autocast=True: bfloat16 products.
dictionary_learning  TopKTrainer under trainSAE: encoder, ReLU, top-k scattered into a dense matrix, dense decode,
                     squared error, AuxK, dense backward, gradient projected off the decoder columns, gradient norm
                     clipped to 1, torch's Adam, a warm-up schedule, decoder normalised. trainSAE has no autocast on a
                     CPU; on CUDA dictionary_learning-autocast has bfloat16 products.

Other architectures (bench_architectures.py), each by the library's own class and trainer with its defaults, in float32:

saelens-NAME              of batchtopk, matryoshka, jumprelu, relu ("standard" there) and gated
dictionary_learning-NAME  of the same
"""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.protocol import Server, Size, Unavailable, serve, unit_rows

# Far beyond any benchmark: no loop ends by itself, and schedules stay where they begin.
STEPS = 1_000_000


def sparsify(size: Size, server: Server, optimizer: str = "adam") -> None:
    if server.device.type == "cpu":
        # With triton in the environment the decoder would be a GPU kernel.
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoderConfig, TrainConfig, Trainer  # type: ignore[import-not-found]

    coder = SparseCoderConfig(num_latents=size.n_latents, k=size.k)
    config = TrainConfig(
        coder, batch_size=1, optimizer=optimizer, hookpoints=["site"], save_every=STEPS, log_to_wandb=False
    )
    batches = server.batches(unit_rows(size), _about("eai-sparsify", f"optimizer {optimizer}"))
    subject = _Subject(size.d_model, server.device)
    trainer = Trainer(config, _Contexts(subject, batches, size.batch_tokens), subject)
    trainer.saes["site"].register_forward_hook(lambda _module, _inputs, output: _keep(server, output.fvu))
    trainer.fit()


class _Subject(nn.Module):
    """Stands where sparsify wants a language model: `site` puts out the batch at hand, [1, batch_tokens, d_model]."""

    def __init__(self, d_model: int, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.site = nn.Identity()
        self.activations = torch.zeros(1, 1, d_model, device=device)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        output: Tensor = self.site(self.activations)
        return output


class _Contexts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Token ids without meaning. Taking an item is the moment at which sparsify's loop waits for the next step."""

    def __init__(self, subject: _Subject, batches: Iterator[Tensor], batch_tokens: int) -> None:
        self.subject, self.batches = subject, batches
        self.input_ids = torch.zeros(batch_tokens, dtype=torch.long)

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.subject.activations = next(self.batches)[None]
        return {"input_ids": self.input_ids}


def saelens(size: Size, server: Server, sparse: bool = False, autocast: bool = False) -> None:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]
    from sae_lens.config import SAETrainerConfig  # type: ignore[import-not-found]
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found]

    class Trainer(SAETrainer):
        def step(self, batch: Tensor) -> Any:
            output = super().step(batch)
            _keep(server, output.loss)
            return output

    config = SAETrainerConfig(
        total_training_samples=STEPS * size.batch_tokens,
        train_batch_size_samples=size.batch_tokens,
        lr_end=3e-5,  # what the runner fills in; a constant schedule has no use for it
        autocast=autocast,
        device=str(server.device),
    )
    sae_config = TopKTrainingSAEConfig(
        size.d_model,
        size.n_latents,
        k=size.k,
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,
        device=str(server.device),
    )
    settings = "sparse activations, no rescaling" if sparse else "autocast to bfloat16" if autocast else "defaults"
    batches = server.batches(unit_rows(size), _about("sae-lens", settings))
    Trainer(config, TopKTrainingSAE(sae_config), batches).fit()


def dictionary_learning(size: Size, server: Server, autocast: bool = False) -> None:
    from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]
    from dictionary_learning.training import trainSAE  # type: ignore[import-not-found]

    class Trainer(TopKTrainer):
        def update(self, step: int, x: Tensor) -> float:
            server.loss = super().update(step, x)
            return server.loss

    trainer = {
        "trainer": Trainer,
        "steps": STEPS,
        "activation_dim": size.d_model,
        "dict_size": size.n_latents,
        "k": size.k,
        "layer": 0,
        "lm_name": "none",
        "device": str(server.device),
    }
    dtype, settings = (torch.bfloat16, "autocast to bfloat16") if autocast else (torch.float32, "defaults")
    batches = server.batches(unit_rows(size), _about("dictionary-learning", settings))
    trainSAE(batches, [trainer], STEPS, device=str(server.device), autocast_dtype=dtype)


# Names of classes: what an architecture is called there. Matryoshka's prefixes are ours, 1/16 to all of the latents.
SAELENS = {
    "batchtopk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK", "jumprelu": "JumpReLU", "relu": "Standard",
    "gated": "Gated",
}  # fmt: skip
DICTIONARY_LEARNING = {
    "batchtopk": "BatchTopKTrainer", "matryoshka": "MatryoshkaBatchTopKTrainer", "jumprelu": "JumpReluTrainer",
    "relu": "StandardTrainer", "gated": "GatedSAETrainer",
}  # fmt: skip
_PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)


def saelens_architecture(size: Size, server: Server, name: str) -> None:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    class Trainer(SAETrainer):
        def step(self, batch: Tensor) -> Any:
            output = super().step(batch)
            _keep(server, output.loss)
            return output

    config = SAETrainerConfig(
        total_training_samples=STEPS * size.batch_tokens,
        train_batch_size_samples=size.batch_tokens,
        lr_end=3e-5,
        device=str(server.device),
    )
    own: dict[str, Any] = {"k": size.k} if name in ("batchtopk", "matryoshka") else {}
    if name == "matryoshka":
        own["matryoshka_widths"] = [round(share * size.n_latents) for share in _PREFIXES]
    kind = SAELENS[name]
    settings = getattr(sae_lens, f"{kind}TrainingSAEConfig")(
        d_in=size.d_model, d_sae=size.n_latents, device=str(server.device), **own
    )
    batches = server.batches(unit_rows(size), _about("sae-lens", f"{kind}TrainingSAE, defaults"))
    Trainer(config, getattr(sae_lens, f"{kind}TrainingSAE")(settings), batches).fit()


def dictionary_learning_architecture(size: Size, server: Server, name: str) -> None:
    from importlib import import_module

    from dictionary_learning.training import trainSAE

    module = {"batchtopk": "batch_top_k", "matryoshka": "matryoshka_batch_top_k", "relu": "standard", "gated": "gdm"}
    kind = DICTIONARY_LEARNING[name]
    found = getattr(import_module(f"dictionary_learning.trainers.{module.get(name, name)}"), kind)

    class Trainer(found):  # type: ignore[misc, valid-type]
        def update(self, step: int, x: Tensor) -> Any:
            loss = super().update(step, x)
            if loss is not None:  # not every trainer says it
                server.loss = loss
            return loss

    trainer = {
        "trainer": Trainer, "steps": STEPS, "activation_dim": size.d_model, "dict_size": size.n_latents, "layer": 0,
        "lm_name": "none", "device": str(server.device),
    }  # fmt: skip
    trainer |= {"k": size.k} if name in ("batchtopk", "matryoshka") else {}
    if name == "matryoshka":
        ends = [round(share * size.n_latents) for share in _PREFIXES]
        trainer["group_fractions"] = [(b - a) / size.n_latents for a, b in zip([0, *ends], ends, strict=False)]
    batches = server.batches(unit_rows(size), _about("dictionary-learning", f"{kind}, defaults"))
    trainSAE(batches, [trainer], STEPS, device=str(server.device), autocast_dtype=torch.float32)


def _about(distribution: str, settings: str) -> dict[str, str]:
    return {"library": f"{distribution} {version(distribution)}", "settings": settings}


def _keep(server: Server, loss: Tensor) -> None:
    # Read when it is asked for: a GPU would be waited for here.
    server.loss = loss.detach()


PEERS: dict[str, Callable[[Size, Server], None]] = {
    "sparsify-adam": sparsify,
    "sparsify-signum": partial(sparsify, optimizer="signum"),
    "saelens-sparse": partial(saelens, sparse=True),
    "saelens-dense": saelens,
    "saelens-autocast": partial(saelens, autocast=True),
    "dictionary_learning": dictionary_learning,
    "dictionary_learning-autocast": partial(dictionary_learning, autocast=True),
    **{f"saelens-{name}": partial(saelens_architecture, name=name) for name in SAELENS},
    **{f"dictionary_learning-{n}": partial(dictionary_learning_architecture, name=n) for n in DICTIONARY_LEARNING},
}


def _available(name: str, peer: Callable[[Size, Server], None], size: Size, server: Server) -> None:
    try:
        peer(size, server)
    except ImportError as error:
        raise Unavailable(
            f"its library cannot be imported ({error}); install tests/benchmarks/peers_requirements.txt in the "
            f"environment of {sys.executable}"
        ) from error


if __name__ == "__main__":
    # They only import it in passing, and a build for another torch would keep them from being imported at all.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    serve({name: partial(_available, name, peer) for name, peer in PEERS.items()}, __doc__)
