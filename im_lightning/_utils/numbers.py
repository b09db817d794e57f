"""Numbers as texts, the same in tables, sentences and pages."""

from __future__ import annotations

import math
from typing import Any

NONE = "–"
"""Where there is no number."""


def number_or_dash(value: Any, form: str = ".3g") -> str:
    """The number, or a dash where there is none."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    return format(value, form)


def half_width(value: float, digits: int = 3) -> str:
    """Half of an interval: `± 0.123`, or nothing."""
    return "" if math.isnan(value) else f"± {value:.{digits}f}"


def p_text(value: float) -> str:
    """A p in a sentence or a comparison: `0.012`, `< 0.001`."""
    return "not known" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def number_or_nothing(value: float, form: str) -> str:
    """The number, or nothing where it is not known."""
    return "" if math.isnan(value) else format(value, form)
