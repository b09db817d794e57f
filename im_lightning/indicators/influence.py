"""`loss_drop` and `gradient_similarity`: what a row has to do with named target rows, by two cheap experiments.

`loss_drop` finetunes the base model shortly on the targets and asks by how much the row's loss fell: what learning the
targets teaches about the row. `gradient_similarity` is first-order influence (TracIn, Pruthi et al. 2020; LESS, Xia et
al. 2024): how far a small step on the row goes in the direction that lowers the targets' loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning.indicators.base import Features, Indicator, Reference, Scores, register_indicator
from im_lightning.indicators.likelihood import joined, perplexity

NO_LOSS = "the base model predicts the response with certainty"
NO_GRADIENT = "no gradient of this row"
NO_TARGET = "the targets' mean gradient is zero or not finite"
_ROWS = 4096  # compared at a time


@register_indicator("ppl_tuned")
class TunedPerplexity(Indicator):
    """`ppl` under the base model after a short finetune on the target rows (`models.low_rank`)."""

    needs = ("tuned",)

    def compute(self, features: Features) -> Scores:
        return perplexity(features.examples, features.tuned, features.encoded)


@register_indicator("loss_drop")
class LossDrop(Indicator):
    """1 - loss after / loss before, the losses in nats per response token: the share of the row's loss that a short
    finetune on the targets took away; below 0 where it rose.
    """

    needs = ()
    derived_from = ("ppl", "ppl_tuned")

    def derive(self, columns: Mapping[str, Scores]) -> Scores:
        before, after = columns["ppl"], columns["ppl_tuned"]
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = np.log(before.values)
            values = np.where(loss > 0, 1.0 - np.log(after.values) / loss, np.nan)
        reasons = [a or b for a, b in zip(before.reasons, after.reasons, strict=True)]
        for position in np.flatnonzero(np.isnan(values)):
            reasons[position] = reasons[position] or NO_LOSS
        return Scores(values, reasons, joined(before.notes, after.notes))


@register_indicator("gradient_similarity")
class GradientSimilarity(Indicator):
    """Cosine of the row's gradient (`models.row_gradients`) with that of the targets' loss (mean over tokens)."""

    needs = ("gradient",)
    pool_dependent = True

    @classmethod
    def compute_pool(
        cls,
        group: Sequence[Any],
        vectors: NDArray[np.float32],
        device: str = "cpu",
        counts: NDArray[np.int64] | None = None,
        reference: Reference | None = None,
    ) -> list[Scores]:
        if reference is None:
            raise ValueError("the gradients of the targets were not computed")
        there = np.isfinite(reference.vectors).all(axis=1)
        target = np.asarray(reference.vectors[there], dtype=np.float64).T @ reference.counts[there]
        size = np.linalg.norm(target)
        values = np.full(len(vectors), np.nan)
        for start in range(0, len(vectors), _ROWS):  # they may be a memory map
            part = np.asarray(vectors[start : start + _ROWS], dtype=np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                values[start : start + _ROWS] = part @ target / (np.linalg.norm(part, axis=1) * size)
        if not (np.isfinite(size) and size > 0):
            return [Scores(np.full(len(vectors), np.nan), [NO_TARGET] * len(vectors)) for _ in group]
        reasons = [NO_GRADIENT if missing else None for missing in np.isnan(values)]
        return [Scores(values.copy(), list(reasons)) for _ in group]
