"""Where things are in a transformers model: its text model, its blocks, the longest context that it takes."""

from typing import Any, NamedTuple

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


class Parts(NamedTuple):
    """Of a block: what mixes the outputs of its heads, which are its input side by side, [batch, length, heads x
    width]; and what gives that of its MLP, None where it has none that is a module of its own."""

    mixing: nn.Module
    mlp: nn.Module | None


MIXING = ("o_proj", "c_proj", "out_proj", "dense", "wo")
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


def find_parts(name: str, blocks: nn.ModuleList) -> list[Parts]:
    """The parts of every block, by the names that models of transformers give them.

    Raises SaescaleError where a block has none that are called so.
    """
    found = []
    for number, block in enumerate(blocks):
        children = dict(block.named_children())
        attention = next((children[each] for each in ATTENTION if each in children), None)
        inner = {} if attention is None else dict(attention.named_modules())
        mixing = next((inner[each] for each in MIXING if each in inner), None)
        # GPT-Neo has its attention one module deeper.
        mixing = mixing or next((inner[f"attention.{each}"] for each in MIXING if f"attention.{each}" in inner), None)
        if attention is None or mixing is None:
            raise SaescaleError(
                f"{name}: cannot tell where the heads of block {number} are, which has {', '.join(children)}; this "
                "layout is not supported"
            )
        found.append(Parts(mixing, next((children[each] for each in MLP if each in children), None)))
    return found


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
