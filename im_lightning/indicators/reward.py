"""`reward`: what a reward model thinks of a response, the paper's Rew.

The raw logit of the whole conversation. Its scale is the reward model's own: values and coefficients of one model say
nothing about another's.
"""

from __future__ import annotations

import numpy as np

from im_lightning.data.example import Example
from im_lightning.indicators.base import (
    EMPTY_RESPONSE,
    Answers,
    Features,
    Indicator,
    Missing,
    Scores,
    register_indicator,
)

NO_PROMPT = "nothing before the response"
NOT_FINITE = "the model's logit is not finite"


def finite_scores(answers: Answers | None, values: np.ndarray | None = None) -> Scores:
    """The logits (or `values` made of them) as scores; a logit that is not finite is a reason."""
    if answers is None:
        raise ValueError("the answers on these examples were not computed")
    found = np.array(answers.logits if values is None else values, dtype=np.float64)
    wrong = ~np.isfinite(answers.logits)
    found[wrong] = np.nan
    return Scores(found, [NOT_FINITE if one else None for one in wrong], list(answers.notes))


@register_indicator("reward")
class Reward(Indicator):
    """The reward model's raw logit, no sigmoid."""

    needs = ("reward",)

    def judged(self, example: Example) -> Example:
        if not example.response:
            raise Missing(EMPTY_RESPONSE)
        if not example.history:
            raise Missing(NO_PROMPT)
        return example

    def compute(self, features: Features) -> Scores:
        return finite_scores(features.answers)
