"""A model whose circuit is known since it was made by hand, and what slow, obvious code computes of it.

Two layers of attention, two heads each, no MLP that does anything: GPT-2 whose stream has places for the token (0 to
11), the position (12 to 31), the token before (32 to 43) and what is foreseen (44 to 55). Head 0.0 writes the token
before; head 1.0 looks for a place whose token before is the token at hand, and foresees what stands there. The other
two heads look at something and write nothing.
"""

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from saescale.trainers.subjects.transformer import Transformer

TOKENS, POSITIONS, WIDTH, HEADS = 12, 20, 64, 2
SHARP = 2.0  # what is looked for is found, and gradients do not vanish yet
TOKEN, POSITION, BEFORE, FORESEEN = 0, TOKENS, TOKENS + POSITIONS, 2 * TOKENS + POSITIONS


class ByHand(Transformer):
    bos_token_id = 0


def by_hand() -> ByHand:
    config = GPT2Config(
        vocab_size=TOKENS, n_positions=POSITIONS, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_inner=1, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    wide = WIDTH // HEADS
    for parameter in model.parameters():
        parameter.zero_()
    for norm in (block.ln_1 for block in model.transformer.h):
        norm.weight.fill_(1.0)
    model.transformer.ln_f.weight.fill_(1.0)
    model.transformer.wte.weight[range(TOKENS), range(TOKEN, TOKEN + TOKENS)] = 1.0
    model.transformer.wpe.weight[range(POSITIONS), range(POSITION, POSITION + POSITIONS)] = 1.0
    first, second = (block.attn for block in model.transformer.h)
    for place in range(POSITIONS - 1):  # the query of place t + 1 meets the key of place t
        first.c_attn.weight[POSITION + place + 1, place] = SHARP
        first.c_attn.weight[POSITION + place, WIDTH + place] = SHARP
    for token in range(TOKENS):
        first.c_attn.weight[TOKEN + token, 2 * WIDTH + token] = 1.0
        first.c_proj.weight[token, BEFORE + token] = 0.3
        first.c_attn.weight[TOKEN + token, wide + token] = 2.0  # head 0.1 looks for the same token
        first.c_attn.weight[TOKEN + token, WIDTH + wide + token] = 2.0
        second.c_attn.weight[TOKEN + token, token] = SHARP
        second.c_attn.weight[BEFORE + token, WIDTH + token] = SHARP
        second.c_attn.weight[TOKEN + token, 2 * WIDTH + token] = 1.0
        second.c_proj.weight[token, FORESEEN + token] = 2.0
        model.lm_head.weight[token, FORESEEN + token] = 1.5
    return ByHand("by hand", model, "by hand")


def recomputed(model: torch.nn.Module, ids: list[int], put: dict[tuple[int, int], np.ndarray] | None = None) -> tuple:
    """Logits [length, vocabulary] of one prompt, and what each head gives, {(layer, head): [length, width]}: place by
    place in float64, with what is `put` in the place of what a head gives."""
    weights = {name: parameter.double().numpy() for name, parameter in model.named_parameters()}
    stream = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][: len(ids)]
    wide, given = WIDTH // HEADS, {}
    for layer in range(2):
        block = f"transformer.h.{layer}"
        normed = _norm(stream, weights[f"{block}.ln_1.weight"], weights[f"{block}.ln_1.bias"])
        everything = normed @ weights[f"{block}.attn.c_attn.weight"] + weights[f"{block}.attn.c_attn.bias"]
        added = np.tile(weights[f"{block}.attn.c_proj.bias"], (len(ids), 1))
        for head in range(HEADS):
            mine = slice(head * wide, (head + 1) * wide)
            query, key, value = (everything[:, part * WIDTH : (part + 1) * WIDTH][:, mine] for part in range(3))
            out = np.zeros((len(ids), wide))
            for here in range(len(ids)):
                scores = np.array([query[here] @ key[there] / np.sqrt(wide) for there in range(here + 1)])
                attention = np.exp(scores - scores.max())
                out[here] = sum(a * value[there] for there, a in enumerate(attention / attention.sum()))
            out = out if put is None else put.get((layer, head), out)
            given[layer, head] = out
            added += out @ weights[f"{block}.attn.c_proj.weight"][mine]
        stream = stream + added
    final = _norm(stream, weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"])
    return final @ weights["lm_head.weight"].T, given


def _norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * weight + bias
