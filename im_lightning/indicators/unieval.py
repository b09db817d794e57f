"""`naturalness`, `coherence`, `understandability`: UniEval's questions about a response in a dialogue.

The questions are those of `maszhongming/UniEval` (utils.py, task "dialogue"). The response is the last one; the
dialogue history is every turn before it, separated by newlines and ended by two.
"""

from __future__ import annotations

import numpy as np

from im_lightning.data.example import Example
from im_lightning.indicators.base import EMPTY_RESPONSE, Features, Indicator, Missing, Scores, register_indicator
from im_lightning.indicators.reward import NO_PROMPT, finite_scores
from im_lightning.models.unieval import Question


class _Dialogue(Indicator):
    needs = ("unieval",)
    question = ""
    with_history = False

    def judged(self, example: Example) -> Question:
        if not example.response:
            raise Missing(EMPTY_RESPONSE)
        history = None
        if self.with_history:
            if not example.history:
                raise Missing(NO_PROMPT)
            history = "\n".join(turn.content for turn in example.history) + "\n\n"
        return Question(f"question: {self.question} </s> response: ", example.response, history)

    def compute(self, features: Features) -> Scores:
        """sigmoid(logit(Yes) - logit(No)), from 0 to 1."""
        logits = features.answers.logits if features.answers is not None else np.empty(0)
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.exp(-np.logaddexp(0.0, -logits))
        return finite_scores(features.answers, values)


@register_indicator("naturalness")
class Naturalness(_Dialogue):
    """Whether the response is natural."""

    question = "Is this a natural response in the dialogue?"


@register_indicator("coherence")
class Coherence(_Dialogue):
    """Whether the response fits the dialogue history."""

    question = "Is this a coherent response given the dialogue history?"
    with_history = True


@register_indicator("understandability")
class Understandability(_Dialogue):
    """Whether the response can be understood."""

    question = "Is this an understandable response in the dialogue?"
