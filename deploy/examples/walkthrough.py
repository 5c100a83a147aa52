"""From a run directory to the text that a latent fires on, in cells (# %%) for a notebook or an editor.

As a script: `python deploy/examples/walkthrough.py RUN STORE`.
"""

# %% What a sweep left behind: tables (Arrow, `.to_pandas()` where pandas is installed), fits, trained SAEs.
import sys

import numpy as np
import torch

import saescale
from saescale.trainers.harvest.retrace import heldout_places
from saescale.trainers.preprocess import to_tensor
from saescale.trainers.subjects.subject import get_subject

# In a notebook, whose own arguments are none of these, name your own here.
given = [] if "ipykernel" in sys.modules else sys.argv[1:]
RUN, STORE = given if len(given) == 2 else ("runs/quickstart", "stores/smollm2-135m-l22")

run = saescale.open_run(RUN)
results = [row for row in run.results.to_pylist() if row["status"] == "done"]
for row in sorted(results, key=lambda row: row["nmse"]):
    print(f"{row['architecture']} N = {row['n_latents']}, k = {row['k']}: nmse {row['nmse']:.4f}")

# %% The SAE with the lowest nmse. It takes activations as the subject gives them.
best = min(results, key=lambda row: row["nmse"])
trained = run.load(**{name: best[name] for name in ("n_latents", "k", "architecture", "seed")})

# %% Held-out rows of the store that it was trained on, as a tensor [rows, d_model].
store = saescale.open_store(STORE)
rows = min(store.rows("heldout"), 8_192)
activations = to_tensor(store.heldout(rows).act, store.dtype)

# %% Its latents: the active ones of each row alone, most active first.
sparse = trained.encode_sparse(activations)
x_hat = trained.reconstruct(activations)
left = (activations - x_hat).norm(dim=1) / activations.float().norm(dim=1)
print(f"\n{(sparse.indices >= 0).sum(dim=1).float().mean():.1f} of {best['n_latents']} latents are active on a row")
print(f"what is left of a row: {left.median():.3f} of its norm (median)")

# %% One latent to look at: the strongest among those that fire on less than one row in fifty.
fires = torch.zeros(best["n_latents"]).scatter_add_(
    0, sparse.indices.clamp_min(0).flatten(), (sparse.values > 0).float().flatten()
)
strongest = torch.zeros(best["n_latents"]).scatter_reduce_(
    0, sparse.indices.clamp_min(0).flatten(), sparse.values.flatten(), reduce="amax"
)
rare = (fires > 0) & (fires < max(rows / 50, 2))
latent = int(strongest.where(rare, torch.zeros(())).argmax() if rare.any() else strongest.argmax())
activity = (sparse.values * (sparse.indices == latent)).sum(dim=1)  # [rows]
print(f"\nlatent {latent} fires on {int(fires[latent])} of {rows} rows")

# %% The rows on which it is most active, back in the contexts that they were in.
subject = get_subject(store.subject, dtype="float32")
places = heldout_places(store, subject, rows)
AROUND = 8  # tokens shown on either side

for row in activity.topk(min(10, int((activity > 0).sum()))).indices.tolist():
    ids, at = places.contexts[places.context[row]], int(places.pos[row])
    before, token, after = np.split(ids[max(at - AROUND, 0) : at + AROUND + 1], [min(at, AROUND), min(at, AROUND) + 1])
    words = [subject.tokenizer.decode(part) for part in (before, token, after)]
    print(f"{float(activity[row]):7.3f}  " + "{}[{}]{}".format(*(repr(word)[1:-1] for word in words)))
