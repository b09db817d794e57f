"""Numbers as texts, the same in tables, sentences and pages; Holm's correction of p values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

NONE = "–"
"""Where there is no number."""


def number_or_dash(value: Any, form: str = ".3g") -> str:
    """The number, or a dash where there is none."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    text = format(value, form)
    return text if float(text.replace(",", "").rstrip("%") or 0) else text.removeprefix("-")  # no -0.00


def half_width(value: float) -> str:
    """Half of an interval: `± 0.123`, or nothing."""
    return "" if math.isnan(value) else f"± {value:.3f}"


def p_text(value: float) -> str:
    """A p in a sentence or a comparison: `0.012`, `< 0.001`."""
    return "not known" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def number_or_nothing(value: float, form: str) -> str:
    """The number, or nothing where it is not known."""
    return "" if math.isnan(value) else format(value, form)


def number_or_why(value: float, infinite: str) -> dict[str, Any]:
    """A number for JSON, which has neither NaN nor infinity: with the reason where there is none.

    >>> number_or_why(1.5, "never"), number_or_why(math.inf, "never")
    ({'value': 1.5}, {'value': None, 'reason': 'never'})
    """
    if math.isfinite(value):
        return {"value": value}
    return {"value": None, "reason": "not known" if math.isnan(value) else infinite}


def time_text(seconds: float) -> str:
    """`40 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down corrected p values (Scandinavian Journal of Statistics 6, 1979); NaN stay NaN and do not count.

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    import numpy as np

    values = np.asarray(p, dtype=np.float64)
    corrected = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    steps = values[order] * (len(order) - np.arange(len(order)))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected
