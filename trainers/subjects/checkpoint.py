"""A folder with a Hugging Face model, looked over before anything is built from it: what is missing, damaged or none of
a language model is named by its file. Small files are read whole, of weights the headers: milliseconds, no torch."""

import json
import struct
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from saescale.storage.errors import SaescaleError

CONFIG, ADAPTER = "config.json", "adapter_config.json"
# In the order in which transformers looks for them: in one file or, by an index, in several.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.bpe.model", "*.tiktoken",
    "tekken.json", "tokenizer_config.json",
)  # fmt: skip
SMALL_FILES = (*TOKENIZERS, "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.bpe")

# Weights as other programs name and lay them out: Mistral's and Meta's own, Flax, TensorFlow, llama.cpp.
_NOT_TRANSFORMERS = ("consolidated*", "*.pth", "*.msgpack", "*.h5", "*.gguf")
_LFS = b"version https://git-lfs.github.com/spec"
_HEADER_BYTES_MOST = 100_000_000  # what safetensors takes


class Checkpoint(NamedTuple):
    """The subject `name` in `folder`."""

    name: str
    folder: Path

    def refusal(self, what: str) -> SaescaleError:
        return SaescaleError(f"cannot load the subject {self.name}: {what}")

    def check_small_files(self) -> None:
        """Raises SaescaleError unless a configuration and a tokenizer are there and no file is a mere pointer."""
        tokenizers = [name for name in self.check_config() if any(fnmatch(name, pattern) for pattern in TOKENIZERS)]
        for name in tokenizers:
            self._refuse_pointer(name)
        if not tokenizers:
            raise self.refusal(
                f"{self.folder} holds no tokenizer (tokenizer.json, tokenizer.model or vocab files); save that of the "
                "model there: tokenizer.save_pretrained(folder)"
            )

    def check_config(self) -> list[str]:
        """The names of all files. Raises SaescaleError unless a configuration of a model is among them."""
        names = self._names()
        if not names:
            raise self.refusal(f"{self.folder} is empty; give the folder that save_pretrained wrote")
        if ADAPTER in names:
            self._refuse_adapter()
        if CONFIG not in names:
            raise self.refusal(self._without_config(names))
        config = self._read_json(CONFIG)
        if not isinstance(config.get("model_type"), str) and "auto_map" not in config:
            raise self.refusal(f"{self.folder / CONFIG} names no model_type: it is not a transformers model's")
        return names

    def check_weights(self) -> None:
        """Raises SaescaleError unless all files with weights are there, each as long as its header says."""
        names = self.weight_files()
        if not names:
            raise self.refusal(self._without_weights())
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise self.refusal(
                f"{self.folder} lacks {listed(missing)} of the {len(names)} files with weights that its index names; "
                "copy or download them again"
            )
        for name in names:
            self._check_size(name)

    def weight_files(self) -> list[str]:
        """The files with weights that transformers will read, from the index where there are several."""
        for name in WEIGHTS:
            if not (self.folder / name).is_file():
                continue
            if not name.endswith(".json"):
                return [name]
            files = self._read_json(name).get("weight_map")
            if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
                raise self.refusal(f"{self.folder / name} has no weight_map of names of files: it is damaged")
            if outside := [file for file in files.values() if Path(file).name != file]:
                raise self.refusal(f"{self.folder / name} names {outside[0]!r}, which does not lie in its folder")
            return sorted(set(files.values()))
        return []

    # --- steps

    def _names(self) -> list[str]:
        try:
            return sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return []  # of the hub, nothing was to be fetched
        except OSError as error:
            raise self._unreadable(self.folder, error) from error

    def _refuse_adapter(self) -> None:
        base = self._read_json(ADAPTER).get("base_model_name_or_path") or "the model that it was trained on"
        raise self.refusal(
            f"{self.folder} holds an adapter ({ADAPTER}), whose weights change those of {base}; merge both "
            "(peft: model.merge_and_unload().save_pretrained(folder)) and give that folder"
        )

    def _without_config(self, names: list[str]) -> str:
        if any(fnmatch(name, "*.gguf") for name in names):
            return f"{self.folder} holds a GGUF file and no {CONFIG}; give a model in transformers' own format"
        below = sorted(path.parent for path in self.folder.glob("*/config.json"))
        below += sorted(path.parent for path in self.folder.glob("snapshots/*/config.json"))
        hint = f"did you mean hf:{below[-1]}?" if below else "give the folder that save_pretrained wrote"
        return f"{self.folder} holds no {CONFIG}; {hint}"

    def _without_weights(self) -> str:
        names = self._names()
        for name in WEIGHTS:
            if (self.folder / name).is_dir():
                return f"{self.folder / name} is a folder where a file with weights should be; put the file there"
        if own := [name for name in names if any(fnmatch(name, pattern) for pattern in _NOT_TRANSFORMERS)]:
            return (
                f"{self.folder} holds weights in a format that transformers does not read ({listed(own)}); give the "
                "model.safetensors, or model-*.safetensors with their index, of the same model"
            )
        return (
            f"{self.folder} holds no weights (model.safetensors or pytorch_model.bin, or an index of several files), "
            f"but {listed(names)}"
        )

    def _read_json(self, name: str) -> dict[str, Any]:
        self._refuse_pointer(name)
        path = self.folder / name
        try:
            found = json.loads(path.read_bytes())
        except OSError as error:
            raise self._unreadable(path, error) from error
        except (ValueError, RecursionError) as error:
            raise self.refusal(f"{path} is damaged: not JSON ({' '.join(str(error).split())})") from error
        if not isinstance(found, dict):
            raise self.refusal(f"{path} is damaged: it holds no JSON object")
        return found

    def _refuse_pointer(self, name: str) -> None:
        path = self.folder / name
        try:
            with path.open("rb") as file:
                start = file.read(len(_LFS))
        except OSError as error:
            raise self._unreadable(path, error) from error
        if start == _LFS:
            raise self.refusal(f"{path} is a Git LFS pointer, not the file; run git lfs pull in {self.folder}")

    def _unreadable(self, path: Path, error: OSError) -> SaescaleError:
        return self.refusal(f"{path} cannot be read ({error.strerror})")

    def _check_size(self, name: str) -> None:
        self._refuse_pointer(name)
        if not name.endswith(".safetensors"):
            return  # a pickle says itself that it ends too early
        path = self.folder / name
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(8)
                header_size = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_BYTES_MOST + 1
                if header_size > min(_HEADER_BYTES_MOST, size - 8):
                    raise self.refusal(f"{path} ({size:,} bytes) is truncated or no safetensors file; copy it again")
                header = json.loads(file.read(header_size))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            wanted = 8 + header_size + max(ends, default=0)
        except OSError as error:
            raise self._unreadable(path, error) from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise self.refusal(f"{path} is damaged: its header is not that of a safetensors file") from error
        if size != wanted:
            fault = "truncated" if size < wanted else "too long"
            raise self.refusal(
                f"{path} is {fault}: {size:,} bytes, {wanted:,} by its header; copy or download it again"
            )


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Of each tensor of a safetensors file that was checked its type ("F32", "I8", ...) and shape."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: (each["dtype"], each["shape"]) for name, each in header.items() if name != "__metadata__"}


def listed(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" ... and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
