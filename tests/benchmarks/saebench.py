"""`core` and `downstream_loss` of a cell beside SAEBench's core metrics, by SAEBench's own code.

    pip install --target DIR --no-deps sae-bench==0.6.0 sae-lens==6.54.12 transformer-lens==2.18.0 better-abc datasets \
        dill docstring-parser einops jaxtyping multiprocess pandas simple-parsing tabulate typeguard
    PYTHONPATH=DIR python -m tests.benchmarks.saebench RUN CELL

The cell, a TopK, becomes a SAELens TopKSAE with normalize_activations="layer_norm", which takes off the row's mean and
divides by its standard deviation: weights and biases take the factor sqrt(d_model - 1) that is between that and the
unit norm. SAEBench's functions get it, the held-out contexts of the store, and the subject with one hook point at the
site. What the two define alike is held to 1e-3 (of what is compared; shares as they are), and ends with status 1 where
it is not; what they define otherwise is shown beside it.
"""

import argparse
import sys
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
from saescale.trainers.evals.splice import Contexts, heldout_contexts
from saescale.trainers.exchange.native import read
from saescale.trainers.exchange.trained import Trained
from saescale.trainers.preprocess import normalise
from saescale.trainers.subjects.subject import Subject, get_subject

HOOK = "resid"
AT_A_TIME = 16  # contexts
TOLERANCE = 1e-3


class Hooked(HookedRootModule):  # type: ignore[misc]
    """The subject as SAEBench calls models. `preprocessed`: what it reads at the site are rows of unit norm."""

    def __init__(self, subject: Subject, site: Site, preprocessed: bool = False) -> None:
        super().__init__()
        self.subject, self.site, self.preprocessed = subject, site, preprocessed
        self.resid = HookPoint()
        self.setup()

    def forward(self, tokens: Tensor, stop_at_layer: int | None = None, **ignored: Any) -> tuple[Tensor, Tensor] | None:
        if stop_at_layer is not None:
            stream = self.subject.run(tokens, [self.site]).resid[0]
            self.resid(normalise(stream) if self.preprocessed else stream)
            return None
        logits = self.subject.run(tokens, [], {self.site: self.resid}, logits=True).logits
        assert logits is not None
        following = tokens[:, 1:].long()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), following, reduction="none")
        return logits.float(), loss


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
    """What stands in for SAELens' ActivationsStore: contexts in their order, in batches of one size."""

    def __init__(self, contexts: list[Contexts]) -> None:
        ids = torch.cat([part.ids for part in contexts])
        self.number = len(ids) // AT_A_TIME
        assert len(ids) == self.number * AT_A_TIME, (
            "SAEBench takes the mean over batches, so they have to be of one size"
        )
        self._batches = iter(ids.split(AT_A_TIME))

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
    manifest = source.manifest
    subject = get_subject(manifest.subject, None, str(manifest.created_with.get("computed_in", "auto")), None, False)
    # All held-out rows, which are whole contexts.
    everything = trained._replace(cell=trained.cell.model_copy(update={"heldout_rows": source.rows("heldout")}))
    ours = _by_name("core", core.measure(everything, source, None))
    prepared = downstream_loss.prepare(source, subject)
    ours |= _by_name("loss", downstream_loss.measure(trained, source, subject, prepared))
    return [*_of_losses(trained, source, subject, ours), *_of_rows(trained, source, subject, ours)]


def _of_losses(trained: Trained, source: ActivationStore, subject: Subject, ours: dict[str, float]) -> list[Line]:
    contexts = list(heldout_contexts(source, subject, downstream_loss.TOKENS))
    dropped = _dropped(contexts)
    sae, model, batches = exported(trained), Hooked(subject, source.site), Batches(contexts)
    kwargs = {"compute_kl": True, "compute_ce_loss": True, "ignore_tokens": dropped,
              "exclude_special_tokens_from_reconstruction": True}  # fmt: skip
    theirs = saebench.get_downstream_reconstruction_metrics(
        sae, model, batches, n_batches=batches.number, eval_batch_size_prompts=0,
        **kwargs,
    )  # fmt: skip
    # The same of every token, to leave out the last of each context, which has no next one.
    kl = []
    for part in contexts:
        of_tokens = saebench.get_recons_loss(sae, model, part.ids, None, **kwargs)["kl_div_with_sae"]
        kl.append(of_tokens[:, :-1][part.keep[:, :-1]])
    return [
        Line("ce", ours["loss.ce"], "ce_loss_with_sae", theirs["ce_loss_with_sae"], True),
        Line("ce_original", ours["loss.ce_original"], "ce_loss_without_sae", theirs["ce_loss_without_sae"], True),
        Line("ce_zero", ours["loss.ce_zero"], "ce_loss_with_ablation", theirs["ce_loss_with_ablation"], not dropped),
        Line("recovered_zero", ours["loss.recovered_zero"], "ce_loss_score", theirs["ce_loss_score"], not dropped),
        Line("kl", ours["loss.kl"], "kl_div_with_sae, tokens with a next one", float(torch.cat(kl).mean()), True),
        Line("kl", ours["loss.kl"], "kl_div_with_sae", theirs["kl_div_with_sae"], False),
    ]


def _of_rows(trained: Trained, source: ActivationStore, subject: Subject, ours: dict[str, float]) -> list[Line]:
    contexts = list(heldout_contexts(source, subject))
    found = []
    for preprocessed in (True, False):
        theirs, of_latents = saebench.get_sparsity_and_variance_metrics(
            exported(trained, preprocessed), Hooked(subject, source.site, preprocessed),
            (batches := Batches(contexts)), n_batches=batches.number, compute_l2_norms=True,
            compute_sparsity_metrics=True, compute_variance_metrics=True, compute_featurewise_density_statistics=True,
            eval_batch_size_prompts=0, model_kwargs={}, ignore_tokens=_dropped(contexts),
        )  # fmt: skip
        density = np.array(of_latents["feature_density"])
        where = "preprocessed rows" if preprocessed else "raw rows"
        found += [
            Line("l0", ours["core.l0"], f"l0, {where}", theirs["l0"], True),
            Line("dead", ours["core.dead"], f"feature_density = 0, {where}", float((density == 0).mean()), True),
            Line("dense_1", ours["core.dense_1"], f"feature_density > 0.01, {where}",
                 float((density > 0.01).mean()), True),
            Line("cosine", ours["core.cosine"], f"cossim, {where}", theirs["cossim"], preprocessed),
            Line("explained_variance_zero", ours["core.explained_variance_zero"], f"explained_variance, {where}",
                 theirs["explained_variance"], preprocessed),
            Line("explained_variance", ours["core.explained_variance"], f"explained_variance_legacy, {where}",
                 theirs["explained_variance_legacy"], False),
        ]  # fmt: skip
    return found


def _dropped(contexts: list[Contexts]) -> set[int]:
    """The tokens that rows of the store leave out, which SAEBench leaves out by what they are."""
    dropped = {int(token) for part in contexts for token in part.ids[~part.keep].unique()}
    for part in contexts:
        assert bool((torch.isin(part.ids, torch.tensor(sorted(dropped))) == ~part.keep).all())
    return dropped


def _by_name(prefix: str, measured: Any) -> dict[str, float]:
    found: list[Measurement] = [each for each in measured if not each.at]
    return {f"{prefix}.{each.metric}": each.value for each in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("cell")
    arguments = parser.parse_args()
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
