"""Checkpoints of models that read games of Othello: folders of transformers, files of TransformerLens."""

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from saescale.storage.errors import SaescaleError, one_line
from saescale.trainers.subjects.checkpoint import listed
from saescale.trainers.subjects.othello.board import SIZES
from saescale.trainers.subjects.own_model import gpt2_config, read_folder
from saescale.trainers.subjects.weights import Weighted, hash_weights

# Of TransformerLens: weights that a GPT-2 has a place for, and tables that are no weights.
_PLACED = re.compile(
    r"embed\.W_E|pos_embed\.W_pos|unembed\.[Wb]_U|ln_final\.[wb]"
    r"|blocks\.\d+\.(ln[12]\.[wb]|attn\.[Wb]_[QKVO]|mlp\.[Wb]_(in|out))"
)
_TABLE = re.compile(r"blocks\.\d+\.attn\.(mask|IGNORE)")


def read_checkpoint(name: str, path: Path, dtype: torch.dtype) -> tuple[Any, str]:
    """The model at `path`, and what identifies its weights: a folder that transformers loads, or a state dict of
    TransformerLens (.pth, .pt, .safetensors), such as that of Nanda 2023.

    Raises SaescaleError where there is none, or it cannot be read.
    """
    if path.is_dir():
        return read_folder(name, path, dtype)
    model = _from_transformer_lens(name, _state(name, path))
    return model.to(dtype), hash_weights(name, Weighted(model, ()))


def size_of_board(name: str, model: Any) -> int:
    """The size of the board whose games the model reads, by its vocabulary: a token for each square but the four in
    the middle, and one more (padding, or a pass), which is token 0.

    Raises SaescaleError where there is no such board, or the model cannot read a whole game on it.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    boards = {size * size - 3: size for size in SIZES}
    if vocabulary not in boards:
        known = ", ".join(f"{tokens} ({size}x{size})" for tokens, size in boards.items())
        raise SaescaleError(f"{name} has a vocabulary of {vocabulary} tokens; a board of Othello has {known}")
    size = boards[vocabulary]
    contexts = int(model.config.max_position_embeddings)
    if contexts < size * size - 5:
        raise SaescaleError(
            f"{name} reads at most {contexts} moves, and games on {size}x{size} have {size * size - 5} before the last "
            "one; it is of another board, or was cut"
        )
    return size


def board_config(size: int, n_layers: int, d_model: int, n_heads: int) -> GPT2Config:
    """Of a GPT-2 that reads games on a board of that size."""
    squares = size * size - 4
    return gpt2_config(squares + 1, squares - 1, n_layers, d_model, n_heads)


# --- TransformerLens


def _state(name: str, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SaescaleError(f"cannot load the subject {name}: there is no file or folder {path}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, SafetensorError, EOFError, ValueError) as error:
        raise SaescaleError(f"cannot load the subject {name}: {path} holds no weights ({one_line(error)})") from error
    if not isinstance(state, dict) or "embed.W_E" not in state:
        raise SaescaleError(
            f"cannot load the subject {name}: {path} is no state dict of TransformerLens (it has no embed.W_E); of a "
            "model of transformers give the folder, with its config.json"
        )
    return state


def _require_whole(name: str, state: dict[str, Tensor]) -> None:
    """Raises SaescaleError for weights that have no place in the model, which would be another one without them, and
    where some norms have weights and others lack them."""
    placeless = sorted(key for key in state if not _PLACED.fullmatch(key) and not _TABLE.fullmatch(key))
    if placeless:
        raise SaescaleError(
            f"cannot load the subject {name}: {len(placeless)} weights have no place in a model of pre-norm blocks "
            f"with learned positions: {listed(placeless)}"
        )
    blocks = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    norms = [f"blocks.{block}.ln{n}" for block in sorted(blocks) for n in (1, 2)] + ["ln_final"]
    missing = [f"{norm}.{part}" for norm in norms for part in "wb" if f"{norm}.{part}" not in state]
    if missing and len(missing) < 2 * len(norms):  # all of them: they were folded into the matrices behind
        raise SaescaleError(
            f"cannot load the subject {name}: the state dict lacks {len(missing)} weights of norms and has the others: "
            f"{listed(missing)}"
        )


def _from_transformer_lens(name: str, state: dict[str, Tensor]) -> Any:
    """The same model as a GPT-2 of transformers, in float32: pre-norm blocks with exact GELU, learned positions."""
    _require_whole(name, state)
    try:
        vocabulary, d_model = state["embed.W_E"].shape
        n_layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        n_heads = state["blocks.0.attn.W_Q"].shape[0]
        d_mlp, bias = state["blocks.0.mlp.W_in"].shape[1], state.get("unembed.b_U")
        positions = len(state["pos_embed.W_pos"])
        model: Any = GPT2LMHeadModel(gpt2_config(vocabulary, positions, n_layers, d_model, n_heads, d_mlp))
        weights = {
            "transformer.wte.weight": state["embed.W_E"],
            "transformer.wpe.weight": state["pos_embed.W_pos"],
            "lm_head.weight": state["unembed.W_U"].T,
            **_norm(state, "ln_final", "transformer.ln_f", d_model),
        }
        if bias is not None:
            model.lm_head = nn.Linear(d_model, vocabulary)
            weights["lm_head.bias"] = bias
        for layer in range(n_layers):
            weights |= _block(state, f"blocks.{layer}.", f"transformer.h.{layer}.", d_model)
        model.load_state_dict({key: tensor.float().contiguous() for key, tensor in weights.items()})
    except KeyError as error:
        raise SaescaleError(
            f"cannot load the subject {name}: the state dict of TransformerLens has no {error.args[0]}"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise SaescaleError(
            f"cannot load the subject {name}: the weights do not fit together ({one_line(error)})"
        ) from error
    return model


def _block(state: dict[str, Tensor], there: str, here: str, d_model: int) -> dict[str, Tensor]:
    # Heads lie one after the other in transformers' matrices, which are [inputs, outputs] as TransformerLens' are.
    into = [state[f"{there}attn.W_{which}"].permute(1, 0, 2).reshape(d_model, -1) for which in "QKV"]
    biases = [state[f"{there}attn.b_{which}"].reshape(-1) for which in "QKV"]
    return {
        f"{here}attn.c_attn.weight": torch.cat(into, dim=1),
        f"{here}attn.c_attn.bias": torch.cat(biases),
        f"{here}attn.c_proj.weight": state[f"{there}attn.W_O"].reshape(-1, d_model),
        f"{here}attn.c_proj.bias": state[f"{there}attn.b_O"],
        f"{here}mlp.c_fc.weight": state[f"{there}mlp.W_in"],
        f"{here}mlp.c_fc.bias": state[f"{there}mlp.b_in"],
        f"{here}mlp.c_proj.weight": state[f"{there}mlp.W_out"],
        f"{here}mlp.c_proj.bias": state[f"{there}mlp.b_out"],
        **_norm(state, f"{there}ln1", f"{here}ln_1", d_model),
        **_norm(state, f"{there}ln2", f"{here}ln_2", d_model),
    }


def _norm(state: dict[str, Tensor], there: str, here: str, d_model: int) -> dict[str, Tensor]:
    """Where norms were folded into the matrices behind them ("LNPre"), they have no weights of their own."""
    return {
        f"{here}.weight": state.get(f"{there}.w", torch.ones(d_model)),
        f"{here}.bias": state.get(f"{there}.b", torch.zeros(d_model)),
    }
