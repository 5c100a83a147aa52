"""Where things are in a transformers model: its text model, its blocks, the longest context that it takes."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from saescale.storage.errors import SaescaleError


def text_model(model: Any) -> nn.Module:
    """The part that reads text: of a model for images and text the language model."""
    find = getattr(model, "get_decoder", None)
    found = find() if find is not None else None
    return found if isinstance(found, nn.Module) else model.base_model


def find_blocks(name: str, text: nn.Module, n_layers: int) -> nn.ModuleList:
    """The list of blocks: the one outermost ModuleList with as many members as the model has layers.

    Raises SaescaleError where there is none, or more than one.
    """
    found: dict[str, nn.ModuleList] = {}
    for path, module in text.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and not nested:
            found[path] = module
    if len(found) != 1:
        raise SaescaleError(
            f"{name}: cannot tell where the blocks of {type(text).__name__} are ({len(found)} lists of "
            f"{n_layers} modules: {', '.join(found) or 'none'}); this layout is not supported"
        )
    return next(iter(found.values()))


def find_projection(name: str, block: nn.Module, d_model: int) -> nn.Module:
    """What leads from the neurons of a block's MLP back to the stream: the last matrix of the block that ends at
    d_model, whose inputs they are.

    Raises SaescaleError where no matrix of the block does.
    """
    matrices = [module for module in block.modules() if isinstance(module, nn.Linear | Conv1D)]
    ends = [
        module for module in matrices if (module.nf if isinstance(module, Conv1D) else module.out_features) == d_model
    ]
    if not ends:
        raise SaescaleError(f"{name}: no matrix of {type(block).__name__} leads from neurons to the stream")
    return ends[-1]


def max_positions(config: Any, text: nn.Module | None) -> int | None:
    """The longest context, by the configuration and, given the text model, by its table of positions; None: no limit.

    Tables of RoBERTa's kind begin behind the padding token, those of OPT's kind at an offset: they hold fewer positions
    than rows.
    """
    limits = [getattr(config, "max_position_embeddings", None)]
    for path, module in text.named_modules() if text is not None else ():
        last = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in last or last == "wpe") and "rel" not in last:
            padding = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - getattr(module, "offset", padding))
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=None)
