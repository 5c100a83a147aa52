"""`core` and `downstream_loss` of a cell beside SAEBench's core metrics, by SAEBench's own code.

    pip install --target DIR --no-deps sae-bench==0.6.0 sae-lens==6.54.12 transformer-lens==2.18.0 better-abc datasets \
        dill docstring-parser einops jaxtyping multiprocess pandas simple-parsing tabulate typeguard
    PYTHONPATH=DIR python -m tests.benchmarks.saebench RUN CELL

The cell, a TopK, becomes a SAELens TopKSAE with normalize_activations="layer_norm", which takes off the row's mean and
divides by its standard deviation: weights and biases take the factor sqrt(d_model - 1) that is between that and the
unit norm. SAEBench's functions get it with the held-out rows of the store (raw, and preprocessed for an SAE that is not
to normalise), and with its contexts and the subject, with one hook point at the site. What both define alike is held to
1e-3 (shares as they are, else of what is compared), and it ends with status 1 where it is further apart; what they
define otherwise is shown beside it.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from sae_bench.evals.core import main as saebench  # type: ignore[import-not-found]
from sae_lens import TopKSAE, TopKSAEConfig  # type: ignore[import-not-found]
from torch import Tensor
from transformer_lens.hook_points import HookedRootModule, HookPoint  # type: ignore[import-not-found]

from saescale.storage.manifest import Site
from saescale.storage.recorded import recorded_sources
from saescale.storage.rundir import RunDirectory
from saescale.storage.store import ActivationStore
from saescale.trainers.evals import core, downstream_loss
from saescale.trainers.evals.evaluation import Measurement
from saescale.trainers.evals.splice import heldout_contexts
from saescale.trainers.exchange.native import read
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise, to_tensor
from saescale.trainers.subjects.subject import Subject, get_subject

HOOK = "resid"
AT_A_TIME = 16  # contexts
TOLERANCE = 1e-3


class Hooked(HookedRootModule):  # type: ignore[misc]
    """The subject as SAEBench calls models, with one hook point, at the site."""

    def __init__(self, subject: Subject, site: Site) -> None:
        super().__init__()
        self.subject, self.site, self.resid = subject, site, HookPoint()
        self.setup()

    def forward(self, tokens: Tensor, **ignored: Any) -> tuple[Tensor, Tensor]:
        logits = self.subject.run(tokens, [], {self.site: self.resid}, logits=True).logits
        assert logits is not None
        following = tokens[:, 1:].long()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), following, reduction="none")
        return logits.float(), loss


class Stored(HookedRootModule):  # type: ignore[misc]
    """Rows of the store in place of a model's: its "tokens" are their numbers."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows, self.resid = rows, HookPoint()
        self.setup()

    def forward(self, tokens: Tensor, **ignored: Any) -> None:
        self.resid(self.rows[tokens])


def exported(trained: Trained, preprocessed: bool = False) -> Any:
    """The cell as a TopKSAE of SAELens."""
    of = trained.sae.params
    n_latents, d_model = of["W_dec"].shape
    config = TopKSAEConfig(
        k=trained.cell.k, d_in=d_model, d_sae=n_latents, dtype="float32", device="cpu", apply_b_dec_to_input=True,
        normalize_activations="none" if preprocessed else "layer_norm",
    )  # fmt: skip
    sae = TopKSAE(config)
    factor = 1.0 if preprocessed else (d_model - 1) ** 0.5
    weights = {"W_enc": of["W_enc"].T / factor, "b_enc": of["b_enc"], "W_dec": of["W_dec"] * factor,
               "b_dec": of["b_pre"] * factor}  # fmt: skip
    sae.load_state_dict({name: tensor.clone().contiguous() for name, tensor in weights.items()})
    # SAEBench looks for these on the configuration itself, where SAELens had them before version 6.
    for name, value in {"hook_name": HOOK, "hook_layer": 0, "hook_head_index": None}.items():
        object.__setattr__(sae.cfg, name, value)
    return sae


class Batches:
    """What stands in for SAELens' ActivationsStore: contexts in their order. SAEBench takes means over batches, so they
    are of one size."""

    def __init__(self, ids: Tensor) -> None:
        self.number = len(ids) // AT_A_TIME
        self._batches = iter(ids[: self.number * AT_A_TIME].split(AT_A_TIME))

    def get_batch_tokens(self, size: int) -> Tensor:
        return next(self._batches)


class Line(NamedTuple):
    """`alike`: whether both define it so, and it is held to the tolerance."""

    ours_called: str
    ours: float
    theirs_called: str
    theirs: float
    alike: bool

    @property
    def apart(self) -> float:
        return abs(self.ours - self.theirs) / max(1.0, abs(self.ours))


def compare(run: RunDirectory, cell: str) -> list[Line]:
    trained = read(run.cell_url(cell))
    assert trained.sae.name == "topk", "SAELens' class here is that of TopK"
    stores = [ActivationStore.open(source.url) for source in recorded_sources(run.read_spec() or {})]
    source = next(store for store in stores if store.identity == trained.cell.store)
    return [*_of_rows(trained, source), *_of_losses(trained, source)]


def _of_rows(trained: Trained, source: ActivationStore) -> list[Line]:
    ours = _of_whole_cell(core.measure(trained, source, None))
    raw = to_tensor(source.heldout(trained.cell.heldout_rows).act, source.dtype).float()
    numbers = torch.arange(len(raw)).view(-1, 64)
    found = []
    for preprocessed in (True, False):
        batches = Batches(numbers)
        assert batches.number * AT_A_TIME == len(numbers)
        theirs, of_latents = saebench.get_sparsity_and_variance_metrics(
            exported(trained, preprocessed), Stored(normalise(raw) if preprocessed else raw), batches, batches.number,
            compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
            compute_featurewise_density_statistics=True, eval_batch_size_prompts=0, model_kwargs={},
        )  # fmt: skip
        density, where = np.array(of_latents["feature_density"]), "preprocessed rows" if preprocessed else "raw rows"
        dead, dense = float((density == 0).mean()), float((density > 0.01).mean())
        found += [
            Line("l0", ours["l0"], f"l0, {where}", theirs["l0"], True),
            Line("dead", ours["dead"], f"feature_density = 0, {where}", dead, True),
            Line("dense_1", ours["dense_1"], f"feature_density > 0.01, {where}", dense, True),
            Line("cosine", ours["cosine"], f"cossim, {where}", theirs["cossim"], preprocessed),
            Line("explained_variance_zero", ours["explained_variance_zero"], f"explained_variance, {where}",
                 theirs["explained_variance"], preprocessed),
            Line("explained_variance", ours["explained_variance"], f"explained_variance_legacy, {where}",
                 theirs["explained_variance_legacy"], False),
        ]  # fmt: skip
    return found


def _of_losses(trained: Trained, source: ActivationStore) -> list[Line]:
    manifest = source.manifest
    subject = get_subject(manifest.subject, None, str(manifest.created_with.get("computed_in", "auto")), None, False)
    prepared = downstream_loss.prepare(source, subject)
    ours = _of_whole_cell(downstream_loss.measure(trained, source, subject, prepared))
    contexts = list(heldout_contexts(source, subject, downstream_loss.TOKENS))
    ids, keep = torch.cat([part.ids for part in contexts]), torch.cat([part.keep for part in contexts])
    dropped = _dropped(ids, keep)
    batches, of_tokens = Batches(ids), []
    whole = saebench.get_recons_loss

    def recorded(*arguments: Any, **more: Any) -> dict[str, Tensor]:
        of_tokens.append(whole(*arguments, **more))
        return dict(of_tokens[-1])

    saebench.get_recons_loss = recorded
    theirs = saebench.get_downstream_reconstruction_metrics(
        exported(trained), Hooked(subject, source.site), batches, True, True, batches.number, 0, dropped, True
    )
    assert batches.number * AT_A_TIME == len(ids)
    # Of each token, to leave out the last of each context, which has no next one.
    kl = torch.cat([of["kl_div_with_sae"] for of in of_tokens])[:, :-1][keep[:, :-1]]
    return [
        Line("ce", ours["ce"], "ce_loss_with_sae", theirs["ce_loss_with_sae"], True),
        Line("ce_original", ours["ce_original"], "ce_loss_without_sae", theirs["ce_loss_without_sae"], True),
        Line("ce_zero", ours["ce_zero"], "ce_loss_with_ablation", theirs["ce_loss_with_ablation"], not dropped),
        Line("recovered_zero", ours["recovered_zero"], "ce_loss_score", theirs["ce_loss_score"], not dropped),
        Line("kl", ours["kl"], "kl_div_with_sae of tokens with a next one", float(kl.mean()), True),
        Line("kl", ours["kl"], "kl_div_with_sae", theirs["kl_div_with_sae"], False),
    ]


def _dropped(ids: Tensor, keep: Tensor) -> set[int]:
    """The tokens that rows of the store leave out, which SAEBench leaves out by what they are."""
    dropped = ids[~keep].unique()
    assert bool((torch.isin(ids, dropped) == ~keep).all())
    return set(dropped.tolist())


def _of_whole_cell(measured: Iterable[Measurement]) -> dict[str, float]:
    return {each.metric: each.value for each in measured if not each.at}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("cell")
    parser.add_argument("--rows", type=int, default=downstream_loss.TOKENS, help="rows whose contexts are read again")
    arguments = parser.parse_args()
    downstream_loss.TOKENS = arguments.rows
    with torch.no_grad():
        lines = compare(RunDirectory(arguments.run), arguments.cell)
    print("| saescale | value | SAEBench | value | apart | defined alike |\n| --- | --- | --- | --- | --- | --- |")
    for line in lines:
        values = f"{line.ours:.5f} | {line.theirs_called} | {line.theirs:.5f} | {line.apart:.1e}"
        print(f"| {line.ours_called} | {values} | {'yes' if line.alike else 'no'} |")
    if wrong := [line for line in lines if line.alike and not line.apart <= TOLERANCE]:
        sys.exit(f"{len(wrong)} of what is defined alike is more than {TOLERANCE:g} apart")


if __name__ == "__main__":
    main()
