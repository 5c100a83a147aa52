"""Benchmarks leave out what a machine cannot do, and say so."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from saescale.trainers.preprocess import measure_centre
from tests.benchmarks import bench_step, harness, readme_tables
from tests.benchmarks.ours import training_cell
from tests.benchmarks.protocol import Size, unit_rows


def test_bf16_is_left_out_in_words_where_the_cpu_has_no_hardware_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(harness, "_product_seconds", lambda x, W: 1.0 if x.dtype.itemsize == 4 else 47.0)
    monkeypatch.setattr(bench_step, "peers_python", lambda venv: Path(sys.executable))

    def measure(size: Any, arguments: Any, python: Path) -> dict[str, Any]:
        measured.extend(arguments.contenders)
        entries = [
            {"name": name, "median_ms": 10.0, "speed_over_fastest_peer": [2.0], "speed_over_gemm_bf16": None}
            for name in arguments.contenders
        ]
        return {**size._asdict(), "contenders": entries}

    monkeypatch.setattr(bench_step, "_measure", measure)
    monkeypatch.setattr(sys, "argv", ["bench_step", "--sizes", "64,32,128,4", "--out", str(tmp_path / "step.json")])
    bench_step.main()
    assert measured == ["saescale-fp32", *bench_step.PEERS, "gemm-fp32"]
    reason = "no hardware for bfloat16: its product takes 47 times as long as the float32 one on this CPU"
    assert reason in " ".join(capsys.readouterr().out.split())

    result = json.loads((tmp_path / "step.json").read_text())
    assert result["left_out"] == {"saescale-bf16": reason, "gemm-bf16": reason}
    table = readme_tables._step(result).splitlines()
    assert f"| saescale, bf16 product | left out: {reason} |" in table
    assert "| saescale, fp32 product | 10 (2.00x) |" in table


def test_the_inputs_of_benchmarks_are_not_the_first_weights() -> None:
    size = Size(64, 256, 128, 4)
    inputs = torch.cat(unit_rows(size))
    W_dec = training_cell(size, measure_centre(inputs), "fp32", 8).sae.params["W_dec"]
    # Six standard deviations of the cosine of two random rows.
    assert float((inputs @ W_dec.T).abs().max()) < 6 / 16
