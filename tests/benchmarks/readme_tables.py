"""The README's tables of benchmarks, made from results/*.json: `python -m tests.benchmarks.readme_tables`."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHOWN = {
    "saescale-bf16": "saescale, bf16 product", "saescale-fp32": "saescale, fp32 product",
    "sparsify-adam": "sparsify 1.3 (Adam)", "saelens-sparse": "SAELens 6.5 (sparse)",
    "dictionary_learning": "dictionary_learning 0.1", "gemm-bf16": "bf16 product alone",
    "gemm-fp32": "fp32 product alone",
}  # fmt: skip


def tables() -> dict[str, str]:
    """Markdown by benchmark."""
    return {name: make(json.loads((RESULTS / f"{name}.json").read_text())) for name, make in _MAKERS.items()}


def _step(result: dict[str, Any]) -> str:
    sizes = result["sizes"]
    head = ["ms a step (speed over the fastest peer; share of the bf16 product's speed)"]
    head += [f"B {s['batch_tokens']:,}, d {s['d_model']}, N {s['n_latents']:,}, k {s['k']}" for s in sizes]
    rows = []
    for name, shown in SHOWN.items():
        if reason := result.get("left_out", {}).get(name):
            rows.append([shown, *([f"left out: {reason}"] + [""] * (len(sizes) - 1))])
            continue
        entries = [next(c for c in size["contenders"] if c["name"] == name) for size in sizes]
        rows.append([shown, *(
            f"{e['median_ms']:,.0f} ({_median(e['speed_over_fastest_peer']):.2f}x"
            + (f"; {_median(e['speed_over_gemm_bf16']):.0%})" if e["speed_over_gemm_bf16"] else ")") for e in entries
        )])  # fmt: skip
    return _markdown(head, rows)


def _auxk(result: dict[str, Any]) -> str:
    steps = result["steps"]
    shares = list(dict.fromkeys(step["dead"] for step in steps))
    columns = list(dict.fromkeys((step["precision"], step["gathered"]) for step in steps))
    head = ["dead latents", "AuxK's pairs a token"]
    head += [f"ms, {precision}" + (", by gathered rows" if gathered else "") for precision, gathered in columns]
    rows = []
    for share in shares:
        here = {(step["precision"], step["gathered"]): step for step in steps if step["dead"] == share}
        cells = [f"{_median(s['seconds']) * 1e3:,.0f} ({s['ratio']:.2f}x)" if s else "" for s in map(here.get, columns)]
        rows.append([f"{share:.0%}", f"{next(iter(here.values()))['pairs_per_token']:.0f}", *cells])
    return _markdown(head, rows)


def _auxk_cuda(result: dict[str, Any]) -> str:
    shares = list(dict.fromkeys(step["dead"] for step in result["steps"]))
    rows = []
    for precision in dict.fromkeys(step["precision"] for step in result["steps"]):
        ratios = [step["ratio"] for step in result["steps"] if step["precision"] == precision]
        rows.append([f"{precision} product", *(f"{ratio:.2f}x" for ratio in ratios)])
    return _markdown(["dead latents", *(f"{share:.0%}" for share in shares)], rows)


def _architectures(result: dict[str, Any]) -> str:
    """Of each architecture milliseconds, and how many times as fast as the fastest peer."""
    ways = {
        "bf16": "saescale, bf16 product", "fp32": "saescale, fp32 product", "dense": "dense reference, fp32",
        "saelens": "SAELens 6.5", "dictionary_learning": "dictionary_learning 0.1",
    }  # fmt: skip
    rows = []
    for name, measured in result["architectures"].items():
        found = {}
        for contender in measured["contenders"]:
            first, _, last = contender["name"].rpartition("-")
            found[last if first == name else first] = contender
        cells = []
        for way in ways:
            if (entry := found.get(way)) is None:
                cells.append("-")
                continue
            over = entry["speed_over_fastest_peer"]
            cells.append(f"{entry['median_ms']:,.0f}" + (f" ({_median(over):.2f}x)" if over else ""))
        rows.append([name, *cells])
    return _markdown(["ms a step (speed over the fastest peer)", *ways.values()], rows)


def _pack(result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    head = [
        f"{result['cells']} cells, {result['tokens']:,} tokens each, {result['precision']}",
        "seconds",
        "one pack is",
    ]
    base = seconds["one pack"]
    return _markdown(head, [[name, f"{s:.1f}", f"{s / base:.2f}x as fast"] for name, s in seconds.items()])


def _quality(result: dict[str, Any]) -> str:
    found = result["found"]
    base = found["dense reference fp32"]["nmse"]
    rows = [[name, f"{f['nmse']:.4f}", f"{f['nmse'] / base - 1:+.2%}"] for name, f in found.items()]
    return _markdown(["trained by", "nmse", "against dense fp32"], rows)


def _soak(result: dict[str, Any]) -> str:
    outcome = result["outcome"]
    kills = ", ".join(f"{outcome['kills'].get(kind, 0)} of a {kind}" for kind in ("worker", "node", "driver"))
    return _markdown(["a sweep of 24 cells under random kills", ""], [
        ["kills survived", f"{outcome['kills_survived']}: {kills}"],
        ["cells lost; with another result, curve or weight",
         f"{outcome['cells_lost']}; {outcome['cells_changed']}"],
        ["steps done twice, at least", f"{outcome['share_done_twice']:.0%}"],
        ["seconds, undisturbed and under kills",
         f"{outcome['seconds_undisturbed']:.0f} and {outcome['seconds_under_kills']:.0f}"],
    ])  # fmt: skip


def _overhead(result: dict[str, Any]) -> str:
    turns = result["turns"]
    seconds = {turn: _median([outcome["training_s"] for outcome in outcomes]) for turn, outcomes in turns.items()}
    rows = [["saescale sweep", f"{seconds['sweep']:.1f}", f"{_median(result['ratio']):.3f}"]]
    rows += [["the same in a plain loop", f"{seconds['plain']:.1f}", "1.000"]]
    return _markdown([f"six cells, {result['tokens']:,} tokens each", "seconds of training", "ratio"], rows)


def _games(result: dict[str, Any]) -> str:
    kinds = {"": result["boards"], "mazes of ": result["mazes"]}
    head = ["random games or mazes a second, so many at once"]
    head += [f"{int(n):,}" for n in result["boards"][0]["games_per_s"]]
    rows = [
        [f"{kind}{one['size']}x{one['size']}", *(f"{rate:,.0f}" for rate in one["games_per_s"].values())]
        for kind, sizes in kinds.items()
        for one in sizes
    ]
    return _markdown(head, rows)


def _cuda(result: dict[str, Any]) -> str:
    """Of each size milliseconds, how many times as fast as the fastest peer, share of the device's rate."""
    shown = {"saescale bf16": "saescale, bf16 product", "saescale fp32": "saescale, fp32 product",
             "plain torch bf16": "plain torch in place of the kernels", "sparsify-adam": "sparsify 1.3 (Adam)",
             "saelens-autocast": "SAELens 6.5 (autocast)", "bf16 encoder product": "bf16 product alone"}  # fmt: skip
    sizes = result["sizes"]
    head = ["ms a step (speed over the fastest peer; share of the FLOP/s of a large bf16 product)"]
    head += [f"B {s['batch_tokens']:,}, d {s['d_model']}, N {s['n_latents']:,}, k {s['k']}" for s in sizes]
    rows = []
    for name, label in shown.items():
        cells = []
        for size in sizes:
            entries = {entry["name"]: entry for entry in size["contenders"]}
            fastest = min((_median(entries[peer]["seconds"]) for peer in entries if "-" in peer), default=None)
            if name not in entries:
                cells.append("-")
                continue
            seconds, used = _median(entries[name]["seconds"]), entries[name]["utilisation"]
            about = [f"{fastest / seconds:.2f}x"] if fastest and used else []
            about += [f"{used:.0%}"] if used else []
            cells.append(f"{seconds * 1e3:.1f}" + (f" ({'; '.join(about)})" if about else ""))
        rows.append([label, *cells])
    return _markdown(head, rows)


def _live(result: dict[str, Any]) -> str:
    """Of each way its speed, over stored in the same round, and over a harvest and then training; then the seconds
    until a producer that begins again has the first batch."""
    seconds = dict(result["seconds"])
    seconds["both"] = [h + s for h, s in zip(seconds["harvest"], seconds["stored"], strict=True)]
    shown = {
        "stored": "on the stored rows", "blocks there": "on blocks that are there",
        "live": "on blocks that are made meanwhile", "both": "a harvest, then on its rows",
        "harvest": "a harvest alone",
    }  # fmt: skip
    rows = []
    for name, words in shown.items():
        of_stored = _median([s / v for s, v in zip(seconds["stored"], seconds[name], strict=True)])
        speeds = sorted(result["tokens"] / value for value in seconds[name])
        over = _median([both / value for both, value in zip(seconds["both"], seconds[name], strict=True)])
        rows.append([
            words, f"{_median(speeds):,.0f} ({speeds[0]:,.0f}-{speeds[-1]:,.0f})", f"{of_stored:.2f}x",
            f"{over:.2f}x" if name == "live" else "",
        ])  # fmt: skip
    head = ["", "tokens/s, loading and the first blocks included", "over stored", "over a harvest, then training"]
    begun = [
        [f"{each['tokens_before']:,}", *(f"{_median(each['seconds'][way]):.1f}" for way in ("noted", "from the start"))]
        for each in result["begun_again"]
    ]
    again = ["tokens before the place", "s until the first batch, by the notes", "s without them"]
    return _markdown(head, rows) + "\n\n" + _markdown(again, begun)


def _mesh(result: dict[str, Any]) -> str:
    """Of the first size."""
    shown = {"select": "selection", "sum_shards": "sums over shards", "gather_replicas": "errors and pairs"}
    size, rows = result["sizes"][0], []
    for name in ("one process", "a mesh of one", "2 shards x 1 replicas", "1 shards x 2 replicas"):
        got = size[name]
        sent = {shown[kind]: count / 2**20 for kind, count in got.get("bytes_per_step", {}).items() if kind in shown}
        rows.append([
            name, f"{got['ms']:.0f}", f"{got['over_alone']:.3f}",
            f"{got['communication_share']:.0%}" if sent else "",
            ", ".join(f"{kind} {count:.2f}" for kind, count in sent.items()),
        ])  # fmt: skip
    head = ["ms a step", "over one process, in the same round", "in collectives", "MiB that a process sends a step"]
    return _markdown(["", *head], rows)


def _mesh_memory(result: dict[str, Any]) -> str:
    sizes = ("latents", "batch", "width")
    found: dict[tuple[str, str], dict[str, str]] = {}
    for each in result["meshes"]:
        peak, predicted = (f"{each[name] / 2**20:,.0f}" for name in ("peak", "predicted"))
        row = found.setdefault((each["architecture"], f"{each['shards']} x {each['replicas']}"), {})
        row[each["size"]] = f"{peak} / {predicted} = {each['ratio']:.2f}"
    rows = [[*names, *(of.get(size, "") for size in sizes)] for names, of in found.items()]
    return _markdown(["peak / predicted, MiB", "shards x replicas", *sizes], rows)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


_MAKERS = {
    "step": _step,
    "architectures": _architectures,
    "auxk": _auxk,
    "pack": _pack,
    "quality": _quality,
    "soak": _soak,
    "overhead": _overhead,
    "games": _games,
    "cuda": _cuda,
    "auxk_cuda": _auxk_cuda,
    "live": _live,
    "mesh-cpu": _mesh,
    "mesh-memory": _mesh_memory,
}


if __name__ == "__main__":
    for name, table in tables().items():
        print(f"{name}\n\n{table}\n")
