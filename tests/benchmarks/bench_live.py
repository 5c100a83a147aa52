"""Benchmark (f): a live source beside the stored blocks, as tokens/s that one pack trains on.

    python -m tests.benchmarks.bench_live                     on the CPU: about two minutes
    python -m tests.benchmarks.bench_live --device cuda       on a GPU; no Ray, no network

The subject is a Llama with random weights and a small tokenizer, the corpus random words, both made in a temporary
folder. In each round the same pack trains three times on the same rows: on the store of a harvest; through the live
source with all blocks there, which is what its way of reading costs by itself; and on blocks that are made meanwhile,
in a thread of the same process or, with --producer process, in one beside it, with room for a few windows.

Every time is of the whole: loading the subject, the held-out rows, the first blocks, but nothing is compiled (a round
before the others does that). One cannot ask a live source for more than the slower of the two gives, the subject or the
training, and where both share one device hardly for more than one after the other gives: the last column compares that.

A second table has the seconds that a producer which begins again takes until somebody can train on, far into a corpus:
with the notes of where blocks begin there (trainers/harvest/live_places.py), and without, when it tokenizes all before.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saescale.storage.live import open_source, read_making
from saescale.storage.source import Order
from saescale.trainers.cell import Cell, EvalSpec
from saescale.trainers.device import set_threads
from saescale.trainers.harvest.conduct import harvest
from saescale.trainers.harvest.live import live_here
from saescale.trainers.harvest.live_corpus import Pass
from saescale.trainers.harvest.live_places import PLACES, Places
from saescale.trainers.harvest.live_spec import LiveSpec
from saescale.trainers.harvest.make_shard import Harvester
from saescale.trainers.harvest.room import Room
from saescale.trainers.subjects.texts.text import corpus_digest
from saescale.trainers.training.train import PackJob, train_pack
from tests.benchmarks.harness import BenchmarkError, console, machine, quartiles, run, show_table, write_result

# d_model, blocks of the subject, the layer, tokens, context, contexts at a time, rows of a block, N, k, batch, cells
SIZES = {
    "cpu": (128, 4, 2, 98_304, 64, 32, 4_096, 1_024, 16, 1_024, 1),
    "cuda": (1_024, 8, 5, 1_048_576, 128, 256, 32_768, 16_384, 32, 4_096, 2),
}
NAMES = ("d_model", "depth", "layer", "tokens", "context", "contexts", "block_rows", "n", "k", "batch", "cells")
HELDOUT, WINDOW, ROOM_WINDOWS = 8_192, 4, 3
FAR, SHARES = 16, (0.5, 0.95)  # times the tokens of the corpus that a producer begins again in, and how far into it


def main() -> None:
    arguments = _arguments()
    where = machine() | {"device": _device(arguments.device)}
    size = dict(zip(NAMES, SIZES[arguments.device], strict=True))
    if arguments.tokens:
        size["tokens"] = arguments.tokens
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="saescale-", dir=arguments.folder) as folder:
        spec = _spec(folder, size)
        for number in range(arguments.rounds + 1):  # the first warms up: kernels are compiled, files are cached
            for name, seconds in _round(spec, size, Path(folder, str(number)), arguments.producer).items():
                found.setdefault(name, []).append(seconds)
            shutil.rmtree(Path(folder, str(number)))
            console.print(f"round {number}: " + ", ".join(f"{name} {s[-1]:.1f} s" for name, s in found.items()))
        taken = spec.tokens * (2 * size["d_model"] + 12)
        begun = _begin_again(folder, size, arguments.restarts) if arguments.restarts else []
    seconds = {name: values[1:] or values for name, values in found.items()}
    _show(seconds, size, spec, taken)
    result = {
        "machine": where, **size, "window_blocks": WINDOW, "max_bytes": spec.max_bytes, "stored_bytes": taken,
        "producer": arguments.producer, "rounds": arguments.rounds, "seconds": seconds, "begun_again": begun,
    }  # fmt: skip
    console.print(f"wrote {os.path.relpath(write_result('live', result, arguments.out))}")


def _show(seconds: dict[str, list[float]], size: dict[str, int], spec: LiveSpec, taken: int) -> None:
    rows = []
    for name, values in seconds.items():
        low, median, high = quartiles([size["tokens"] / value for value in values])
        of_stored = quartiles([s / v for s, v in zip(seconds["stored"], values, strict=True)])[1]
        after = [h + s for h, s in zip(seconds["harvest"], seconds["stored"], strict=True)]
        of_both = quartiles([b / v for b, v in zip(after, values, strict=True)])[1]
        rows.append([name, f"{median:,.0f}", f"{low:,.0f}-{high:,.0f}", f"{of_stored:.0%}", f"{of_both:.2f}x"])
    show_table(
        "{tokens:,} tokens, d {d_model}, {cells} cells of N {n:,}, batch {batch:,}".format(**size),
        ["", "tokens/s", "quartiles", "of stored", "over harvest, then stored"],
        rows,
        f"on the disk: {taken / 1e6:,.0f} MB stored, at most {spec.max_bytes / 1e6:,.0f} MB live",
    )


def _begin_again(folder: str, size: dict[str, int], rounds: int) -> list[dict[str, Any]]:
    """Seconds until the first batch from there, with and without notes, taking turns."""
    spec = _spec(folder, size | {"tokens": FAR * size["tokens"]})
    url = str(Path(folder, "again"))
    with live_here(spec, url):
        pass
    _note_all(spec, url)
    found = []
    for share in SHARES:
        batch = int(share * spec.tokens) // size["batch"]
        seconds: dict[str, list[float]] = {"noted": [], "from the start": []}
        for way in list(seconds) * rounds:
            if way == "from the start":
                Path(url, PLACES).rename(Path(folder, "away"))
            stream, began = open_source(url).batches(Order("train", 0, size["batch"]), batch), time.perf_counter()
            with stream, live_here(spec, url) as live:
                next(stream)
                seconds[way].append(time.perf_counter() - began)
            live.clear()
            if way == "from the start":
                shutil.rmtree(Path(url, PLACES), ignore_errors=True)
                Path(folder, "away").rename(Path(url, PLACES))
        found.append({"tokens_before": batch * size["batch"], "seconds": seconds})
        shown = ", ".join(f"{way} {quartiles(each)[1]:.1f} s" for way, each in seconds.items())
        console.print(f"begun again after {batch * size['batch']:,} tokens: {shown}")
    return found


def _note_all(spec: LiveSpec, url: str) -> None:
    """Where all blocks begin, as a producer that made them has noted it."""
    harvest_spec = spec.harvest(url, reads_text=True)
    with tempfile.TemporaryDirectory() as spool:
        harvester = Harvester([harvest_spec], spool, "auto")
        reading = Pass(harvest_spec, harvester.facts, None, Places(url, corpus_digest(harvest_spec.corpus)))
        while reading.next_block < spec.tokens // spec.block_rows:
            reading.add(harvester.tokenize(reading.next()))


def _round(spec: LiveSpec, size: dict[str, int], folder: Path, producer: str) -> dict[str, float]:
    """Seconds of each way."""
    stored = str(folder / "stored")
    began = time.perf_counter()
    harvest(spec.harvest(stored, reads_text=True))
    found = {"harvest": time.perf_counter() - began}
    # The store through the eyes of a live source that has nothing left to make.
    with live_here(spec, stored):
        began = time.perf_counter()
        _train(stored, size, folder / "there")
        found["blocks there"] = time.perf_counter() - began
    Path(stored, "live.json").unlink()
    began = time.perf_counter()
    _train(stored, size, folder / "run")
    found["stored"] = time.perf_counter() - began
    live, began = str(folder / "live"), time.perf_counter()
    with _produced(spec, live, producer):
        _train(live, size, folder / "live-run")
        found["live"] = time.perf_counter() - began
    return found


def _train(url: str, size: dict[str, int], run_url: Path) -> None:
    source = open_source(url)
    cells = [
        Cell(
            store=source.identity, d_model=source.d_model, n_latents=size["n"], k=size["k"], tokens=size["tokens"],
            batch_tokens=size["batch"], lr=1e-3, dead_after_tokens=10**7, seed=seed,
        )
        for seed in range(size["cells"])
    ]  # fmt: skip
    evaluated = EvalSpec(tokens=HELDOUT, every_tokens=size["tokens"])
    threads = 1 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else None  # of two, for the other is the subject's
    train_pack(
        PackJob(
            cells=cells, store=url, run=str(run_url), sweep="bench", eval=evaluated, checkpoint_every_s=1e6,
            threads=threads,
        )
    )  # fmt: skip


@contextmanager
def _produced(spec: LiveSpec, url: str, producer: str) -> Iterator[None]:
    """While the blocks of the live source are made, as soon as one can stream from it."""
    if producer == "thread":
        with live_here(spec, url):
            yield
        return
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    process = spawn.Process(target=_produce, args=(spec, url, stop))
    process.start()
    while not Path(url, "live.json").exists():
        time.sleep(0.05)
        if not process.is_alive():
            making = read_making(url)
            raise BenchmarkError(f"the producer ended: {making.error if making else process.exitcode}")
    try:
        yield
    finally:
        stop.set()
        process.join()


def _produce(spec: LiveSpec, url: str, stop: Any) -> None:
    with live_here(spec, url):
        stop.wait()


def _spec(folder: str, size: dict[str, int]) -> LiveSpec:
    heldout = HELDOUT // size["context"] * size["context"]
    given = {
        "subject": _subject(folder, size), "layer": size["layer"], "corpus": _corpus(folder, size),
        "tokens": size["tokens"], "heldout_tokens": heldout, "context_length": size["context"],
        "batch_contexts": size["contexts"],
        "block_rows": size["block_rows"], "row_group_rows": 8_192, "window_blocks": WINDOW, "max_bytes": 2**60,
    }  # fmt: skip
    spec = LiveSpec.model_validate(given)
    room = Room(spec, spec.harvest(folder, reads_text=True), size["d_model"])
    return spec.model_copy(update={"max_bytes": room.beside + ROOM_WINDOWS * WINDOW * room.block})


def _subject(folder: str, size: dict[str, int]) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from saescale.trainers.subjects.texts.text import python_prose

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8_192, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(python_prose(), trainer)
    where = str(Path(folder, "subject"))
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(where)
    torch.manual_seed(0)
    width = size["d_model"]
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8_192,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=size["depth"],
            num_attention_heads=max(1, width // 64),
            num_key_value_heads=max(1, width // 64),
            max_position_embeddings=2 * size["context"],
        )
    ).save_pretrained(where)
    return f"hf:{where}"


def _corpus(folder: str, size: dict[str, int]) -> str:
    """Documents of about 400 words each, drawn with the frequencies that they have in prose."""
    from saescale.trainers.subjects.texts.text import python_prose

    words = np.array(" ".join(python_prose()).split())
    rng = np.random.default_rng(0)
    where = Path(folder, "corpus.jsonl")
    with where.open("w") as file:
        for _ in range(1 + (size["tokens"] + 16 * HELDOUT) // 400):
            file.write(json.dumps({"text": " ".join(rng.choice(words, 400))}) + "\n")
    return str(where)


def _device(wanted: str) -> str:
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        set_threads(1)
        return "cpu"

    if not torch.cuda.is_available():
        raise BenchmarkError("there is no CUDA device; leave out --device cuda")
    return torch.cuda.get_device_name()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_live",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--producer", choices=["thread", "process"], default="thread")
    parser.add_argument("--tokens", type=int, help="instead of those of the size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--restarts", type=int, default=1, help="rounds of the second table")
    parser.add_argument("--folder", help="where the temporary folder lies")
    parser.add_argument("--out", type=Path, help="the JSON, instead of results/live.json")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
