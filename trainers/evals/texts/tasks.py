"""Binary tasks whose truth is computed from text: what is true of a token, or of where it stands.

| task | true where |
|---|---|
| `space` | the token begins with a space |
| `newline` | it has a line break |
| `capital` | its first letter is a capital |
| `capitals` | it has two letters or more, all of them capitals |
| `digit` | it has a digit |
| `punctuation` | it is of punctuation and symbols alone, spaces apart |
| `bracket` | it has a bracket, of whichever kind |
| `underscore` | it has an underscore |
| `short`, `long` | it has one character, at least six characters, spaces apart |
| `vowel` | its first letter is a, e, i, o or u |
| `function_word` | it is an English article, preposition, conjunction, pronoun or auxiliary |
| `ends_s`, `ends_ed`, `ends_ing` | it is of more than three letters and ends so |
| `inside_word` | it begins with a letter and the token before it ends with one |
| `word_ends` | it ends with a letter, and the next token does not go on with one |
| `after_newline`, `after_digit`, `after_punctuation` | the token before it is what those names say |
| `after_capital`, `after_function_word` | and so here |
| `before_newline`, `before_digit`, `before_punctuation` | the next token is |
| `before_capital`, `before_function_word` | and so here |
| `sentence_start` | it has a letter, and the nearest visible character before it is `.`, `!` or `?` |
| `indented` | its line begins with two spaces or more |
| `in_parentheses` | more `(` than `)` were before it in the context |
| `in_quotes` | the number of `"` before it in its line is odd |
| `repeated` | the same token was before it in the context |
| `repeated_pair` | it was before it in the context behind the same token |
| `early`, `late` | it is in the first, the last quarter of the context |
| `frequent` | its token is one of the most frequent that make up half of the text |
| `once` | its token is nowhere else in the text |

The text is that of the held-out contexts. A word that a token holds a part of only is judged by that part. Before the
first token of a context is nothing.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence

import numpy as np

_FUNCTION_WORDS = {
    "a", "an", "the", "this", "that", "these", "those", "of", "in", "on", "at", "by", "for", "from", "to", "with",
    "as", "into", "and", "or", "but", "if", "than", "then", "so", "not", "no", "it", "its", "he", "she", "they",
    "we", "you", "i", "his", "her", "their", "our", "your", "is", "are", "was", "were", "be", "been", "being",
    "has", "have", "had", "do", "does", "did", "can", "could", "will", "would", "shall", "should", "may", "might",
    "must", "which", "who", "what", "when", "where",
}  # fmt: skip
_BRACKETS = set("()[]{}<>")
_QUARTER = 4


def text_tasks(contexts: Sequence[np.ndarray], texts: Mapping[int, str]) -> dict[str, list[np.ndarray]]:
    """Of each task where it is true, bool [length] for each of `contexts`, ids int32 [length]; `texts` says what ids
    spell (texts.token_texts)."""
    ids, counts = np.unique(np.concatenate([*contexts]), return_counts=True)
    of_token = {name: np.array([rule(texts[i]) for i in ids.tolist()]) for name, rule in _OF_TOKEN.items()}
    # The rarest of them completes the half.
    order = np.argsort(-counts, kind="stable")
    before = np.concatenate([[0], np.cumsum(counts[order])[:-1]])
    frequent = np.zeros(len(ids), bool)
    frequent[order[before < counts.sum() / 2]] = True
    of_token |= {"frequent": frequent, "once": counts == 1}
    found: dict[str, list[np.ndarray]] = {}
    for context in contexts:
        place = np.searchsorted(ids, context)
        own = {name: values[place] for name, values in of_token.items()}
        spelt = [texts[i] for i in context.tolist()]
        for name, values in {**own, **_of_neighbours(own), **_of_context(context, spelt)}.items():
            if not name.startswith("_"):
                found.setdefault(name, []).append(values)
    return found


def _first_letter(text: str) -> str:
    return next((c for c in text if c.isalpha()), "")


def _is_punctuation(text: str) -> bool:
    visible = text.strip()
    return bool(visible) and all(unicodedata.category(c)[0] in "PS" for c in visible)


def _ends(text: str, ending: str) -> bool:
    word = text.strip().lower()
    return len(word) > max(3, len(ending)) and word.isalpha() and word.endswith(ending)


_OF_TOKEN: dict[str, Callable[[str], bool]] = {
    "space": lambda text: text.startswith(" "),
    "newline": lambda text: "\n" in text,
    "capital": lambda text: _first_letter(text).isupper(),
    "capitals": lambda text: sum(c.isalpha() for c in text) > 1 and text.isupper(),
    "digit": lambda text: any(c.isdigit() for c in text),
    "punctuation": _is_punctuation,
    "bracket": lambda text: bool(_BRACKETS & set(text)),
    "underscore": lambda text: "_" in text,
    "short": lambda text: len(text.strip()) == 1,
    "long": lambda text: len(text.strip()) >= 6,
    "vowel": lambda text: _first_letter(text).lower() in set("aeiou"),
    "function_word": lambda text: text.strip().lower() in _FUNCTION_WORDS,
    "ends_s": lambda text: _ends(text, "s"),
    "ends_ed": lambda text: _ends(text, "ed"),
    "ends_ing": lambda text: _ends(text, "ing"),
    "_begins_letter": lambda text: text[:1].isalpha(),
    "_ends_letter": lambda text: text[-1:].isalpha(),
}
_AROUND = ("newline", "digit", "punctuation", "capital", "function_word")


def _of_neighbours(own: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """From what is true of each token of a context."""
    before = {name: np.concatenate([[False], values[:-1]]) for name, values in own.items()}
    behind = {name: np.concatenate([values[1:], [False]]) for name, values in own.items()}
    return {
        "inside_word": own["_begins_letter"] & before["_ends_letter"],
        "word_ends": own["_ends_letter"] & ~behind["_begins_letter"],
        **{f"after_{name}": before[name] for name in _AROUND},
        **{f"before_{name}": behind[name] for name in _AROUND},
    }


def _of_context(ids: np.ndarray, spelt: Sequence[str]) -> dict[str, np.ndarray]:
    names = "sentence_start", "indented", "in_parentheses", "in_quotes", "repeated", "repeated_pair", "early", "late"
    found = {name: np.zeros(len(ids), bool) for name in names}
    seen: set[int] = set()
    pairs: set[tuple[int, int]] = set()
    visible, line, depth = "", "", 0
    for i, (token, text) in enumerate(zip(ids.tolist(), spelt, strict=True)):
        found["sentence_start"][i] = visible in tuple(".!?") and bool(_first_letter(text))
        found["indented"][i] = (line + text).startswith("  ") and "\n" not in text
        found["in_parentheses"][i] = depth > 0
        found["in_quotes"][i] = line.count('"') % 2 == 1
        found["repeated"][i] = token in seen
        found["early"][i], found["late"][i] = i < len(ids) / _QUARTER, i >= len(ids) * (1 - 1 / _QUARTER)
        if i:
            pair = int(ids[i - 1]), token
            found["repeated_pair"][i] = pair in pairs
            pairs.add(pair)
        seen.add(token)
        visible = text.strip()[-1:] or visible
        line = (line + text).rpartition("\n")[2]
        depth = max(0, depth + text.count("(") - text.count(")"))
    return found
