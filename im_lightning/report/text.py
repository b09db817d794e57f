"""Text of the report: data that may be hostile made harmless, numbers as the commands print them."""

from __future__ import annotations

import re
from typing import Any

from im_lightning._utils.numbers import NONE, number_or_dash

REPLACED = "\N{REPLACEMENT CHARACTER}"
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """The text without what neither UTF-8, HTML nor XML can hold (NUL, control characters, lone surrogates).

    Escaping is the template's; this is for what no escape can express. Each such character becomes U+FFFD.
    """
    return _NO_TEXT.sub(REPLACED, text.replace("\r\n", "\n").replace("\r", "\n"))


def label(text: Any, most: int = 24) -> str:
    """A name for a figure or a cell: one line, without marks that turn the direction of writing.

    Of a longer one than `most` characters both ends stay, since names often differ in the last ones only.
    """
    out = " ".join(_DIRECTION.sub(REPLACED, clean(str(text))).split())
    if len(out) <= most:
        return out
    tail = most // 3
    return f"{out[: most - 1 - tail]}…{out[-tail:]}"


def reading(value: Any) -> str:
    """A value of an indicator: `0.1164`, `17.92`, `17,816`."""
    shown = number_or_dash(value, ".4g")
    return f"{value:,.0f}" if shown != NONE and 1e4 <= abs(value) < 1e12 else shown


def p_value(value: Any) -> str:
    """`0.012`, or `<0.001`."""
    shown = number_or_dash(value, ".3f")
    return "<0.001" if shown != NONE and value < 0.001 else shown


def interval(low: Any, high: Any, form: str = ".3g") -> str:
    """`-0.464, -0.115`, or a dash where it is not known."""
    return NONE if number_or_dash(low) == NONE or number_or_dash(high) == NONE else f"{low:{form}}, {high:{form}}"


def percent(value: Any, digits: int = 0) -> str:
    """`84 %`."""
    shown = number_or_dash(value)
    return shown if shown == NONE else f"{100 * value:.{digits}f} %"


def count(value: int | float, one: str, many: str = "") -> str:
    """`1 run`, `2,000 runs`."""
    return f"{value:,.0f} {one if value == 1 else many or one + 's'}"


def short(value: float) -> str:
    """A number on an axis: `0.25`, `12`, `3k`, `2M`."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def shortened(text: str, most: int) -> tuple[str, int]:
    """(The cleaned text, at most `most` characters of it; how many characters it has in full)."""
    return clean(text[: most + 1])[:most] if len(text) > most else clean(text), len(text)
