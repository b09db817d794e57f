"""`mtld`: lexical diversity of a response (measure of textual lexical diversity, McCarthy & Jarvis 2010).

The text is walked with a running type/token ratio; when it falls below 0.72 a factor is counted and the ratio starts
again; the rest counts (1 - TTR) / (1 - 0.72). MTLD = tokens / factors, the mean of the forward and the backward walk.
Unstable under about 50 tokens. Texts in scripts without spaces between words (Chinese, Japanese, Thai, …) have none:
what stands between two spaces there is no word.

Whether a ratio of exactly 0.72 ends a factor differs between tools: "strict" (`<`, Jarvis's advice) is the default,
"lexicalrichness" (`<=`, the paper's tool, with its tokenizer) the other.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from im_lightning.data.example import Example
from im_lightning.errors import RequestError, message
from im_lightning.indicators._mtld_batch import JOINT, THRESHOLD, Walks, joined_texts, mtld_of_walks
from im_lightning.indicators.base import EMPTY_RESPONSE, Features, Indicator, Missing, Scores, register_indicator

NO_WORDS = "no words in the response"
NO_SPACES = "written without spaces between words"
UNSPACED = 0.1
"""Share of such letters from which a response has no words that could be counted."""
MODES = ("strict", "lexicalrichness")
_TEXTS = 2500  # cut into words at once: they fit a processor's cache
_MOST = 40_000  # walked through at once
_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_NO_SPACES = re.compile(  # Thai, Lao, Tibetan, Myanmar, Khmer, kana, Han
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]"
)
_DIGITS = re.compile(r"[0-9]+")
_LEXICALRICHNESS = str.maketrans({**dict.fromkeys(string.punctuation, " "), "–": "", "—": "", "-": ""})


def words(text: str, mode: str = "strict") -> list[str]:
    """Lower-cased words: letters and digits, with inner apostrophes and hyphens; or lexicalrichness 0.5's tokens.

    >>> words("The dog's well-known _bone_, No. 7")
    ['the', "dog's", 'well-known', 'bone', 'no', '7']
    >>> words("The dog's well-known _bone_, No. 7", "lexicalrichness")
    ['the', 'dog', 's', 'wellknown', 'bone', 'no']
    """
    if mode == "strict":
        return _WORD.findall(text.lower())
    if mode == "lexicalrichness":  # digits and dashes vanish, other ASCII punctuation separates
        return _DIGITS.sub("", text.lower()).translate(_LEXICALRICHNESS).split()
    raise _unknown(mode)


def mtld(tokens: Sequence[str], mode: str = "strict") -> float:
    """MTLD of a token sequence, at least one token long.

    Returns:
        Tokens per factor. A text without a repeated word has no factor: its own length.

    >>> round(mtld("a b c d e f g h i j j".split()), 2)
    22.44
    """
    if mode not in MODES:
        raise _unknown(mode)
    if not tokens:
        raise Missing("no words")
    inclusive = mode == "lexicalrichness"
    forward = _factors(tokens, inclusive)
    backward = _factors(reversed(tokens), inclusive)
    n = len(tokens)
    return (n / forward + n / backward) / 2


def _factors(tokens: Iterable[str], inclusive: bool) -> float:
    """Factors of one walk; 1 where there is none."""
    factors = 0
    types: set[str] = set()
    add = types.add
    count = 0
    ratio = 1.0
    for token in tokens:
        add(token)
        count += 1
        ratio = len(types) / count
        if ratio < THRESHOLD or (inclusive and ratio == THRESHOLD):
            factors += 1
            types.clear()
            count = 0
    total = factors + ((1 - ratio) / (1 - THRESHOLD) if count else 0.0)
    return total or 1.0


def _unknown(mode: str) -> RequestError:
    return RequestError(message(f"mtld mode {mode!r}", "is not known", f"give one of {', '.join(MODES)}"))


def _fold_strict(character: str) -> str:
    if character == "’":
        return JOINT
    return "".join(c if _WORD.match(c) else " " for c in character.lower())


def _fold_lexicalrichness(character: str) -> str:
    if character in "–—":
        return ""
    return "".join(" " if c.isspace() else c for c in character.lower())


_FOREIGN = bytes(range(128, 256))  # `_FOLD` has left only letters of them
_SPACE = b"\0\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f "
_LETTERS = {
    "strict": b"0123456789abcdefghijklmnopqrstuvwxyz" + _FOREIGN,
    "lexicalrichness": bytes(b for b in range(128) if b not in _SPACE + string.punctuation.encode()) + _FOREIGN,
}
_FOLD = {"strict": _fold_strict, "lexicalrichness": _fold_lexicalrichness}


def mtld_of_texts(texts: Sequence[str], mode: str = "strict") -> NDArray[np.float64]:
    """MTLD of n texts, float64 [n], exactly `mtld(words(text, mode), mode)` of each; NaN for a text without words."""
    if mode not in MODES:
        raise _unknown(mode)
    return np.concatenate([np.empty(0), *(_together(texts[i : i + _MOST], mode) for i in range(0, len(texts), _MOST))])


def _together(texts: Sequence[str], mode: str) -> NDArray[np.float64]:
    """Parts of the texts are cut into words side by side, most of it without the interpreter's lock; the walks, which
    need it at every step, are taken by all of them at once."""
    parts = [texts[start : start + _TEXTS] for start in range(0, len(texts), _TEXTS)]
    workers = min(len(parts), os.cpu_count() or 1)
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            cut = list(pool.map(partial(_cut, mode=mode), parts))
    else:
        cut = [_cut(part, mode) for part in parts]
    values = np.full(len(texts), np.nan)
    found = mtld_of_walks([walks for walks, _, _ in cut], inclusive=mode == "lexicalrichness")
    for part, (_, order, odd), value in zip(range(len(parts)), cut, found, strict=True):
        start = part * _TEXTS
        values[start + order] = value
        for position in odd:
            tokens = words(texts[start + position], mode)
            if tokens:
                values[start + position] = mtld(tokens, mode)
    return values


def _cut(texts: Sequence[str], mode: str) -> tuple[Walks, NDArray[np.int64], list[int]]:
    """The walks through the texts, which text each is, and those left out (see `joined_texts`)."""
    joined, order, odd = joined_texts(texts, _FOLD[mode])
    inner = b"'-" + JOINT.encode()
    if mode == "lexicalrichness":
        joined, inner = joined.translate(None, b"0123456789-"), b""
    return Walks.of(joined, _LETTERS[mode], inner), np.array(order, dtype=np.int64), odd


def has_no_spaces(text: str) -> bool:
    """Whether more than `UNSPACED` of its letters are of scripts that put no space between words.

    >>> has_no_spaces("天空是蓝色的"), has_no_spaces("The sky (天空) is blue because air scatters blue light more.")
    (True, False)
    """
    if text.isascii() or not _NO_SPACES.search(text):
        return False
    return len(_NO_SPACES.findall(text)) > UNSPACED * sum(map(str.isalpha, text))


class _MTLD(Indicator):
    mode = "strict"

    def refuse(self, example: Example) -> str | None:
        return NO_SPACES if has_no_spaces(example.response) else None

    def score(self, example: Example) -> float:
        if not example.response:
            raise Missing(EMPTY_RESPONSE)
        if reason := self.refuse(example):
            raise Missing(reason)
        tokens = words(example.response, self.mode)
        if not tokens:
            raise Missing(NO_WORDS)
        return mtld(tokens, self.mode)

    def compute(self, features: Features) -> Scores:
        responses = [example.response for example in features.examples]
        values = mtld_of_texts(responses, self.mode)
        reasons: list[str | None] = [None] * len(responses)
        for position in np.flatnonzero(np.isnan(values)):
            reasons[position] = NO_WORDS if responses[position] else EMPTY_RESPONSE
        for place, example in enumerate(features.examples):
            if reason := self.refuse(example):
                values[place], reasons[place] = np.nan, reason
        return Scores(values, reasons)


@register_indicator("mtld")
class MTLD(_MTLD):
    """MTLD of the last response; a ratio must fall below 0.72."""


@register_indicator("mtld_lexicalrichness")
class MTLDLexicalRichness(_MTLD):
    """The same as the package lexicalrichness computes it: its tokens, and a ratio of exactly 0.72 is low enough."""

    mode = "lexicalrichness"
