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

from saescale.storage.errors import SaescaleError, SaescaleWarning
from saescale.trainers.subjects.checkpoint import listed

# Tables that models make themselves and that older versions of transformers wrote with the weights.
_TABLE = re.compile(r"(masked_bias|inv_freq|position_ids|causal_mask|(attn|attention)\.bias)$")


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


def read_model(folder: Path, dtype: torch.dtype | str, trust_remote_code: bool) -> Weighted:
    """The model in that arithmetic ("auto": as it is stored).

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
        )
    except UnpicklingError as error:
        raise SaescaleError(
            f"the weights in {folder} are a damaged pickle, or one that holds more than weights and is not read for "
            "safety; save them as safetensors (model.save_pretrained)"
        ) from error
    head = model.base_model_prefix if model.base_model is not model else ""
    missing = sorted(name for name in report["missing_keys"] if not _TABLE.search(name))
    absent = tuple(name for name in missing if head and not name.startswith(f"{head}."))
    unknown = sorted(name for name in report["unexpected_keys"] if not _is_aside(name, model, head))
    reshaped = [
        f"{name} ({list(there)} in the files, {list(wanted)} in the model)"
        for name, there, wanted in sorted(report["mismatched_keys"])
    ]
    faults = [
        (f"the files lack {{}} of the model's weights, which would be random: {listed([*missing])}", missing),
        (f"{{}} weights of the files have no place in the model: {listed(unknown)}", unknown),
        (f"{{}} weights have another shape than config.json says: {listed(reshaped)}", reshaped),
    ]
    if said := [text.format(len(those)) for text, those in faults if set(those) - set(absent)]:
        raise SaescaleError(
            f"{'; '.join(said)}; weights and config.json have to be of one model, saved by save_pretrained of the "
            "model itself (not of a wrapper)"
        )
    return Weighted(model, absent)


def hash_weights(subject: str, weighted: Weighted) -> str:
    """xxh3-128 over names, shapes, types and bytes of all parameters that were read, in the order of their names.

    Raises SaescaleError for one that is not finite; warns of matrices of nothing but zeros.
    """
    digest = xxhash.xxh3_128()
    zeros = []
    for name, parameter in sorted(weighted.model.named_parameters()):
        if name in weighted.absent:
            continue
        data = parameter.detach().contiguous().flatten().cpu()
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


def _is_aside(name: str, model: Any, head: str) -> bool:
    """Whether a weight of the files that found no place is a table, or of another head (a reward, a value)."""
    if _TABLE.search(name):
        return True
    inside = {head, *(child for child, _ in model.base_model.named_children())}
    return bool(head) and name.split(".")[0] not in inside
