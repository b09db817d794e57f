"""Answers against reference outputs, without a judge: exact match and ROUGE-L, by instruction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from im_lightning._utils.optional import require
from im_lightning.data.example import Example
from im_lightning.errors import RequestError, message
from im_lightning.experiments.answers.prompts import by_prompt
from im_lightning.experiments.answers.win_rate import ONE


@dataclass(frozen=True)
class Mean:
    """A mean over instructions with the half-width of its 95 % t interval."""

    value: float
    half_width: float
    instructions: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        from scipy import stats

        numbers = np.asarray(values, dtype=np.float64)
        n = len(numbers)
        if n < 2:
            return cls(float(numbers[0]) if n else math.nan, math.nan, n)
        return cls(float(numbers.mean()), float(stats.t.ppf(0.975, n - 1) * stats.sem(numbers)), n)

    @property
    def text(self) -> str:
        if not self.instructions:
            return "not known (no instruction)"
        if math.isnan(self.half_width):
            return f"{self.value:.3f} (no interval: {ONE})"
        return f"{self.value:.3f} ± {self.half_width:.3f}"


METRICS = ("exact_match", "rouge_l")


def reference_scores(
    answers: Sequence[Example], references: Sequence[Example], name: str
) -> dict[str, dict[str, float]]:
    """Metric → prompt id → score: of an answer the best over the references, of several answers the mean.

    Exact match is of texts but for white space; ROUGE-L is rouge-score's F measure, without stemming.

    Raises:
        RequestError: no answer has a reference.
    """
    scorer = require("rouge_score.rouge_scorer", "api", "ROUGE-L").RougeScorer(["rougeL"])
    known = {prompt: [one.response for one in found] for prompt, found in by_prompt(references).items()}
    out: dict[str, dict[str, float]] = {metric: {} for metric in METRICS}
    for prompt, found in by_prompt(answers).items():
        if prompt not in known:
            continue
        texts = [one.response for one in found]
        exact = [any(text.split() == reference.split() for reference in known[prompt]) for text in texts]
        rouge = [max(scorer.score(reference, text)["rougeL"].fmeasure for reference in known[prompt]) for text in texts]
        out["exact_match"][prompt], out["rouge_l"][prompt] = float(np.mean(exact)), float(np.mean(rouge))
    if not out["rouge_l"]:
        cause = "none of its prompts has a reference"
        raise RequestError(message(name, cause, "name references of the same evaluation set (--references)"))
    return out


def compared(a: Mapping[str, Mapping[str, float]], b: Mapping[str, Mapping[str, float]] | None) -> dict[str, Any]:
    """Metric → means of A, of B, and of their difference, paired by instruction."""
    out: dict[str, Any] = {}
    for metric in METRICS:
        out[metric] = {"a": Mean.of(list(a[metric].values()))}
        if b is not None:
            common = [prompt for prompt in a[metric] if prompt in b[metric]]
            out[metric]["b"] = Mean.of(list(b[metric].values()))
            out[metric]["difference"] = Mean.of([a[metric][p] - b[metric][p] for p in common])
    return out
