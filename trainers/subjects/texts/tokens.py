"""Token ids of texts: what spells a special token (`<s>`) in one is text like the rest of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def ids_of_texts(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of each text, int32 [tokens], by a tokenizer of transformers; no special token is among them.

    Where a vocabulary makes one of a text all the same (Unigram and word tokenizers hold it as a word), it is left out.
    """
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **_as_text(tokenizer)
    )
    special = _special_ids(tokenizer)
    found = [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]
    return [ids[~np.isin(ids, special)] for ids in found]


def _as_text(tokenizer: Any) -> dict[str, bool]:
    """How the tokenizer is told; Mistral's own takes all for text and refuses to be told, others may not know it."""
    option = {"split_special_tokens": True}
    try:
        tokenizer("a", **option)
    except (ValueError, TypeError):
        return {}
    return option


def _special_ids(tokenizer: Any) -> np.ndarray:
    """Ids that no text may give, int32: of all special tokens but the unknown one, which stands for text."""
    added = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    special = {*added, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    special |= {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    return np.array(sorted(special), np.int32)
