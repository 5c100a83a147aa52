"""Whether the same work still gives the same bits: the tiny quickstart, and packs with AuxK and Multi-TopK at work.

    python -m tests.same_bits             # compares with tests/same_bits.json; exits with 1 where a bit differs
    python -m tests.same_bits --record    # a change of numbers on purpose: record anew, and say why in the commit

A change of structure leaves numbers alone: run this before its first move and after its last. Every shard of the
activation store, weight, point of a curve and result is compared, times aside. The libraries are told to compute alike
on every x86 processor with AVX2 and on one thread; where a record of another kind of processor differs all the same,
the environment below is what to look at, so record at the commit before and compare at yours.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_suffix(".json")
# Read when the libraries load, so this script starts itself again with them.
ALIKE = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2,+fma",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
TIMES = ("wall_s", "tokens_per_s")  # of results and curves: what no two runs share


def quickstart(folder: Path) -> Iterator[tuple[str, str]]:
    """Store and cells of `saescale quickstart --tiny`, in float32."""
    from saescale.cluster.front.quickstart import quickstart_steps
    from saescale.cluster.front.recipes import TINY
    from saescale.cluster.sweep.driver import run_sweep
    from saescale.scaling.laws.settings import FitSettings
    from saescale.storage.store import ActivationStore
    from saescale.trainers.harvest.conduct import harvest
    from tests.cluster.conftest import Recorder

    made = quickstart_steps(TINY, str(folder / "run"), "off")
    store = str(folder / "store")
    harvest(made.harvest.model_copy(update={"out": store, "compute_dtype": "float32"}))
    for shard in ActivationStore.open(store).manifest.shards:
        yield f"store {shard.name}", shard.xxh3
    train = made.sweep.train.model_copy(update={"precision": "fp32"})
    spec = made.sweep.model_copy(update={"store": store, "train": train})
    outcome = run_sweep(spec, Recorder(), settings=FitSettings(0))
    yield from run_digests(outcome.run.url)


def packs(folder: Path) -> Iterator[tuple[str, str]]:
    """A pack of cells most of whose latents die, so that AuxK works on few and on many dead latents."""
    from saescale.storage.store import ActivationStore
    from saescale.trainers.cell import Cell, EvalSpec
    from saescale.trainers.training.train import PackJob, train_pack
    from tests.trainers.synthetic import D_MODEL, sparse_rows, write_store

    store = ActivationStore.open(write_store(str(folder / "known"), sparse_rows(16_384, 0), sparse_rows(2_048, 1)))
    shared = {
        "store": store.fingerprint, "d_model": D_MODEL, "tokens": 16_384, "batch_tokens": 256, "lr": 3e-3,
        "dead_after_tokens": 1_024, "ema": 0.9,
    }  # fmt: skip
    cells = [
        Cell.model_validate(shared | own)
        for own in (
            {"n_latents": 64, "k": 3, "settings": {"k_aux": 16}},
            {"n_latents": 512, "k": 2, "settings": {"k_aux": 8}},  # dead latents beyond 8 k_aux: the sparse way
            {"n_latents": 256, "k": 4, "settings": {"k_aux": 64, "multi_topk": True}},
            {"n_latents": 128, "k": 3, "seed": 1},
        )
    ]
    run = str(folder / "pack")
    job = PackJob(
        cells=cells, store=store.url, run=run, sweep="bits", eval=EvalSpec(tokens=2_048, every_tokens=4_096), threads=1
    )
    outcome = train_pack(job)
    dead = {row["n_latents"]: row["dead_fraction"] for row in outcome.results}
    assert min(dead[512] - 0.3, dead[256]) > 0, f"AuxK had little to do here: {dead}"
    yield from run_digests(run)


def run_digests(run: str) -> Iterator[tuple[str, str]]:
    """What every cell of a run directory came to, under names that do not depend on how cells are named."""
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    for folder in sorted(Path(run, "cells").iterdir()):
        result = json.loads((folder / "result.json").read_text())
        assert result["status"] == "done", result
        cell = f"n {result['n_latents']} k {result['k']} seed {result['seed']}"
        for name, tensor in sorted(load_file(folder / "sae.safetensors").items()):
            yield f"{cell}: {name}", digest(tensor.tobytes())
        curve = pq.read_table(folder / "curve.parquet").to_pylist()
        measured = ("step", "tokens", "nmse", "train_nmse", "l0", "dead_fraction", "dead_fraction_long", "lr")
        yield f"{cell}: curve", digest(_text([{key: row[key] for key in measured} for row in curve]))
        yield f"{cell}: flops", digest(_text([result["flops"], result["flops_dense"], *(r["flops"] for r in curve)]))
        kept = ("nmse", "l0", "dead_fraction", "dead_fraction_long", "tokens", "lr", "d_model", "subject", "site")
        yield f"{cell}: result", digest(_text({key: result[key] for key in kept}))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _text(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True).encode()


def measure() -> dict[str, str]:
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="saescale-bits-") as folder:
        for part in (packs, quickstart):
            found |= {f"{part.__name__}, {name}": value for name, value in part(Path(folder))}
    return found


def compare(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What differs, a line each."""
    names = sorted({*recorded, *found})
    return [
        f"{name}: {recorded.get(name, 'not recorded')} -> {found.get(name, 'not made')}"
        for name in names
        if recorded.get(name) != found.get(name)
    ]


def main() -> int:
    if any(os.environ.get(name) != value for name, value in ALIKE.items()):
        command = [sys.executable, "-m", "tests.same_bits", *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | ALIKE, check=False).returncode
    import torch

    torch.set_num_threads(1)
    found = measure()
    if "--record" in sys.argv:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        print(f"recorded {len(found)} digests in {RECORD}")
        return 0
    differences = compare(json.loads(RECORD.read_text()), found)
    print("\n".join(differences) or f"{len(found)} digests, no bit differs")
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
