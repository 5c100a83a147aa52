"""A Hugging Face model with the weights of its files: each of them in its place and none that is random."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import transformers
import xxhash
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from saescale.storage.errors import SaescaleError, SaescaleWarning, one_line
from saescale.trainers.subjects.checkpoint import CONFIG, Checkpoint, listed, read_header
from saescale.trainers.subjects.spread import Spread, weight_of

# Tables that models make themselves and that older versions of transformers wrote with the weights.
_TABLE = re.compile(r"(masked_bias|inv_freq|position_ids|causal_mask)$")
_MASK = re.compile(r"(attn|attention)\.bias$")  # of GPT-2 and its like: one in four dimensions; of others, a weight
# What models of images or sound have beside their language model, blocks and all.
_OTHER_SENSE = re.compile(r"(.+_)?(vision|visual|image|audio|speech)(_.+)?$")


class Weighted(NamedTuple):
    """A model; `absent` are weights of its head that its files lack, which are random and must not be used."""

    model: Any
    absent: tuple[str, ...]


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """The configuration. Raises SaescaleError where it is none of a causal language model."""
    found, _ = PretrainedConfig.get_config_dict(folder)
    if found.get("model_type") not in CONFIG_MAPPING and "auto_map" not in found:
        raise SaescaleError(
            f"transformers {transformers.__version__} knows no model_type {found.get('model_type')!r}; a newer version "
            "may (pip install -U transformers)"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise SaescaleError(f"{config.model_type} is an encoder-decoder model; a subject is a causal language model")
    _auto_class(config)
    return config


def read_model(
    folder: Path, dtype: torch.dtype | str, trust_remote_code: bool, spread: Spread | None = None
) -> Weighted:
    """The model in that arithmetic ("auto": as it is stored), `spread` over several devices or whole in memory.

    Raises SaescaleError that names weights which the model has and the files lack, or the files have and the model
    lacks, or that are of another shape. Heads are put aside: a site needs none.
    """
    build = _auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))
    try:
        model, report = build.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with names
            **({} if spread is None else spread.options),
        )
    except UnpicklingError as error:
        raise SaescaleError(
            f"the weights in {folder} are a damaged pickle, or one that holds more than weights and is not read for "
            "safety; save them as safetensors (model.save_pretrained)"
        ) from error
    except Exception as error:
        if fault := _fault_of_config(build, folder, trust_remote_code):
            raise SaescaleError(f"{folder / CONFIG} cannot be used ({fault})") from error
        raise
    head = model.base_model_prefix if model.base_model is not model else ""
    missing = sorted(name for name in report["missing_keys"] if not _TABLE.search(name))
    absent = tuple(name for name in missing if head and not name.startswith(f"{head}."))
    stored = _stored(folder)
    unknown = sorted(name for name in report["unexpected_keys"] if not _is_aside(name, model, head, stored))
    quantised = getattr(model.config, "quantization_config", None) is not None
    whole = [] if quantised else _whole_numbers(model, head, stored)
    reshaped = [
        f"{name} ({list(there)} in the files, {list(wanted)} in the model)"
        for name, there, wanted in sorted(report["mismatched_keys"])
    ]
    faults = [
        (f"the files lack {{}} of the model's weights, which would be random: {listed([*missing])}", missing),
        (f"{{}} weights of the files have no place in the model: {listed(unknown)}", unknown),
        (f"{{}} weights have another shape than config.json says: {listed(reshaped)}", reshaped),
        (
            f"{{}} weights are whole numbers where the model computes with fractions, quantised by something that "
            f"config.json does not say (no quantization_config): {listed(whole)}",
            whole,
        ),
    ]
    if said := [text.format(len(those)) for text, those in faults if set(those) - set(absent)]:
        raise SaescaleError(
            f"{'; '.join(said)}; weights and config.json have to be of one model, saved by save_pretrained of the "
            "model itself (not of a wrapper)"
        )
    return Weighted(model, absent)


def read_identified(
    subject: str,
    folder: Path,
    dtype: torch.dtype,
    fingerprint: str | None = None,
    trust_remote_code: bool = False,
    spread: Spread | None = None,
) -> tuple[Weighted, str]:
    """The model in that arithmetic, and what identifies its weights: a hash of them as they are stored, unless
    `fingerprint` is known. Raises what `read_model` and `hash_weights` raise."""
    found = read_model(folder, dtype if fingerprint else "auto", trust_remote_code, spread)
    fingerprint = fingerprint or hash_weights(subject, found)
    if found.model.dtype != dtype:
        # Loaded again rather than cast: a cast would round buffers (rotary frequencies) as well.
        del found
        found = read_model(folder, dtype, trust_remote_code, spread)
    return found, fingerprint


def hash_weights(subject: str, weighted: Weighted) -> str:
    """xxh3-128 over names, shapes, types and bytes of all parameters that were read, in the order of their names.

    Raises SaescaleError for one that is not finite; warns of matrices of nothing but zeros.
    """
    digest = xxhash.xxh3_128()
    zeros = []
    for name, parameter in sorted(weighted.model.named_parameters()):
        if name in weighted.absent:
            continue
        data = weight_of(weighted.model, name).contiguous().flatten().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(data.view(torch.uint8).numpy().data)
        if data.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) and len(data):
            low, high = (float(value) for value in data.aminmax())
            if not (abs(low) < float("inf") and abs(high) < float("inf")):
                raise SaescaleError(f"the weight {name} holds NaN or infinity; the files are damaged")
            if parameter.ndim > 1 and low == high == 0:
                zeros.append(name)
    if zeros:
        warnings.warn(
            f"{subject}: {len(zeros)} weights are all zeros, as after a download that was cut short: {listed(zeros)}",
            SaescaleWarning,
            stacklevel=2,
        )
    return f"xxh3-128:{digest.hexdigest()}"


def _auto_class(config: Any) -> Any:
    """What builds the model: for text, or for images and text where there is no other."""
    own = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise SaescaleError(
        f"transformers has no causal language model of the type {config.model_type!r}; a subject is one"
    )


def _fault_of_config(build: Any, folder: Path, trust_remote_code: bool) -> str | None:
    """Why there is no model of that configuration, whatever its weights; None where there is."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            build.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        if isinstance(error, KeyError):  # a value that one of transformers' tables lacks
            keys = [key for key, value in config.to_dict().items() if error.args == (value,)]
            return f"{keys[0]} is {error}, which transformers does not know" if keys else f"KeyError: {error}"
        return one_line(error)
    return None


class _Stored(NamedTuple):
    """A tensor of the files: how many dimensions, and what kind of numbers."""

    ndim: int
    integers: bool
    truths: bool


def _stored(folder: Path) -> dict[str, _Stored]:
    """All tensors of the files, by headers alone."""
    found: dict[str, _Stored] = {}
    for file in Checkpoint(str(folder), folder).weight_files():
        path = folder / file
        if file.endswith(".safetensors"):
            for name, (dtype, shape) in read_header(path).items():
                found[name] = _Stored(len(shape), dtype[0] in "IU", dtype == "BOOL")
            continue
        for name, tensor in torch.load(path, map_location="meta", weights_only=True).items():
            if isinstance(tensor, torch.Tensor):
                kind = tensor.dtype
                truths = kind == torch.bool
                integers = not (truths or kind.is_floating_point or kind.is_complex)
                found[name] = _Stored(tensor.ndim, integers, truths)
    return found


def _whole_numbers(model: Any, head: str, stored: dict[str, _Stored]) -> list[str]:
    """Weights that the files hold as integers and the model as floats: without their scale they say nothing."""
    floats = {name.removeprefix(f"{head}.") for name, each in model.named_parameters() if each.is_floating_point()}
    whole = [name for name, each in stored.items() if each.integers or each.truths]
    return sorted(name for name in whole if name.removeprefix(f"{head}.") in floats)


def _is_aside(name: str, model: Any, head: str, stored: dict[str, _Stored]) -> bool:
    """Whether a weight of the files that found no place is a table, of another head (a reward, a value) or of another
    sense; what names a place inside the blocks, behind whatever prefix, is not."""
    if _TABLE.search(name):
        return True
    if _MASK.search(name) and (mask := stored.get(name)):
        return mask.ndim == 4 or mask.truths
    parts = name.split(".")
    inside = {head, *(child for child, _ in model.base_model.named_children())}
    if not head or parts[0] in inside:
        return False
    if _OTHER_SENSE.match(parts[0]):
        return True
    places = {path for path, _ in model.base_model.named_modules() if "." in path}
    ends = range(2, len(parts) + 1)
    return not any(".".join(parts[start:end]) in places for end in ends for start in range(end - 1))
