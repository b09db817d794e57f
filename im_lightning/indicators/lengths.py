"""`length_input`, `length_output`: tokens of instruction (with its input) and of response, by the base tokenizer.

Without special tokens and template, before any truncation (the paper's Len). An empty response has length 0. Of a
response with calls or reasoning all counts that the template has the model write; a pool that holds such has an
identity of its own.
"""

from __future__ import annotations

import numpy as np

from im_lightning.indicators.base import Features, Indicator, Scores, register_indicator


class _Length(Indicator):
    needs = ("tokens",)
    attribute = ""

    def compute(self, features: Features) -> Scores:
        encoded = features.encoded or []
        values = np.array([getattr(e, self.attribute) for e in encoded], dtype=np.float64)
        return Scores(values, [None] * len(values))


@register_indicator("length_input")
class LengthInput(_Length):
    """Tokens of the last user turn."""

    attribute = "length_input"


@register_indicator("length_output")
class LengthOutput(_Length):
    """Tokens of the last response."""

    attribute = "length_output"
