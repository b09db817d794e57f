"""Arms of a comparison at equal supervised tokens and equal optimiser steps.

An arm is an order of the candidate rows: drawn by the rule's weights, best first, random, …. Its rows are taken in that
order until the supervised tokens are there (±1 %), permuted by the seed, and split in order into as many batches as
there are steps. So arms of short and of long rows see the same number of tokens and make the same number of steps.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from im_lightning.data.table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.rule.linear import LinearRule
from im_lightning.sampling.subsets import METHODS, NEED_RULE, choose_rows
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.inputs import Chosen

TOLERANCE = 0.01
"""Share by which an arm's supervised tokens may miss the number asked for."""

GIVEN = "given"
"""The arm whose order the caller gives (`order=`)."""


def take_tokens(
    order: NDArray[np.int64], tokens: NDArray[np.int64], target: int, tolerance: float = TOLERANCE
) -> NDArray[np.int64] | None:
    """Rows in order until `target` supervised tokens, give or take `tolerance`.

    A row that would overshoot is passed over; so only the last few rows can be out of order.

    Args:
        order: int64 [n], rows.
        tokens: int64 [n], supervised tokens of each of them.
        target: Tokens to reach.
        tolerance: Share of the target.

    Returns:
        int64 [k], a part of `order`; None if it does not hold enough tokens.
    """
    low, high = math.ceil(target * (1 - tolerance)), math.floor(target * (1 + tolerance))
    taken, total = [], 0
    for row, count in zip(order.tolist(), tokens.tolist(), strict=True):
        if total + count <= high:
            taken.append(row)
            total += count
        if total >= low:
            return np.array(taken, dtype=np.int64)
    return None


def split_in_order(rows: NDArray[np.int64], steps: int) -> list[list[int]]:
    """The rows, in order, in `steps` batches whose sizes differ by one at most.

    Raises:
        RequestError: fewer rows than steps.
    """
    if not 1 <= steps <= len(rows):
        cause = f"the arm has {len(rows)} rows, and every step needs one"
        raise RequestError(message(f"steps={steps}", cause, "raise supervised_tokens or lower steps"))
    return [part.tolist() for part in np.array_split(rows, steps)]


class EqualTokensDataModule(InstructMiningDataModule):
    """One arm of a comparison: rows by `arm` until `supervised_tokens` (±1 %), in `steps` batches, one epoch.

    Runs under it are recorded with purpose "compare" and never enter a refit. One process only.

    Args:
        data: The candidate rows, from which every arm takes its own.
        eval_data: Evaluation sets: a path, several, or names and paths.
        model: Base model (folder or Hugging Face id).
        scores: Score table that holds the candidates (Parquet).
        supervised_tokens: Response tokens with their end markers to train on.
        steps: Optimiser steps, and batches.
        arm: weighted (drawn by the rule's weights), top, worst, random, longest, lowest-ppl, or given.
        rule: A published rule's name or a rule file; with one, rows without a prediction are out of every arm.
        order: Row numbers for the arm "given".
        weighting: Of the arm "weighted"; auto, tilt, softmax, rank or top.
        strength: Of a tilt.
        seed: Decides draws, ties and the order of training.
        template: auto, alpaca or chat.
        max_length: Tokens per example; longer ones are cut.
        eval_batch_tokens: Tokens per evaluation batch, padding included.
        cache_dir: Score store.

    Raises:
        RequestError: an unknown arm, an arm without what it needs, or candidates that do not hold enough tokens.
    """

    def __init__(
        self,
        data: str | list[str],
        eval_data: str | list[str] | dict[str, str] | None,
        model: str,
        scores: str,
        supervised_tokens: int,
        steps: int,
        arm: str = "random",
        rule: str | None = None,
        order: list[int] | None = None,
        weighting: str = "auto",
        strength: float = 1.0,
        seed: int = 0,
        template: str = "auto",
        max_length: int = 1024,
        eval_batch_tokens: int = 8192,
        cache_dir: str | None = None,
    ) -> None:
        if arm not in (*METHODS, GIVEN):
            names = ", ".join((*METHODS, GIVEN))
            raise RequestError(message("arm", f"there is no {arm!r}", f"use one of {names}"))
        if (arm == GIVEN) != (order is not None):
            raise RequestError(message("order", f"it does not go with arm {arm!r}", "pass order with arm='given' only"))
        if arm in NEED_RULE and rule is None:
            raise RequestError(message(f"arm {arm!r}", "it needs a rule and none was given", "pass rule="))
        super().__init__(
            data, eval_data, model, rule, scores, weighting="uniform", purpose="compare", template=template,
            max_length=max_length, eval_batch_tokens=eval_batch_tokens, seed=seed, cache_dir=cache_dir,
        )  # fmt: skip
        self.arm, self.order, self.arm_weighting, self.arm_strength = arm, order, weighting, strength
        self.supervised_tokens, self.steps = supervised_tokens, steps

    def _take(self, chosen: Chosen) -> None:
        """Replaces "all rows equally" by the arm's rows."""
        rows, report = self._arm_rows(chosen)
        self.batches = split_in_order(rows, self.steps)
        self.hparams["batch_size"] = len(self.batches[0])  # what the run's record gives as rows per step
        weights = np.zeros(len(self.pool))
        weights[rows] = 1.0 / len(rows)
        design = {
            "kind": "equal tokens",
            "arm": self.arm,
            "seed": self.choice.seed,
            "supervised_tokens": int(self.encoded.tokens(rows).sum()),
            "supervised_tokens_wanted": self.supervised_tokens,
            "steps": self.steps,
            "rows": sorted(rows.tolist()),
        }
        super()._take(replace(chosen, weights=weights, report={**chosen.report, **report}, rows=rows, design=design))

    def _arm_rows(self, chosen: Chosen) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """The arm's rows, permuted by the seed, and what the weighting said."""
        table = chosen.table
        if table is None:  # cannot be: `scores` is required
            raise RequestError(message("scores", "the candidates have no score table", "pass scores="))
        usable = chosen.eligible & np.isfinite(table.matrix(table.indicators)).all(axis=1)
        n, taken, report = int(usable.sum()), None, dict[str, Any]()
        if self.arm == "weighted":
            taken, report = self._drawn(table, chosen.rule, usable)
        elif self.order is not None:
            order = np.asarray(self.order, dtype=np.int64)
            taken = self._cut(order[usable[order]])
        else:
            taken = self._cut(choose_rows(table, chosen.rule, n, self.arm, self.choice.seed, eligible=usable).rows)
        if taken is None:
            cause = f"arm {self.arm!r} finds no {self.supervised_tokens} supervised tokens among {n} candidate rows"
            raise RequestError(message("supervised_tokens", cause, "lower it, or give more candidates"))
        np.random.default_rng([self.choice.seed, 1]).shuffle(taken)
        return taken, {**report, "method": self.arm if self.arm != "weighted" else report.get("method", self.arm)}

    def _drawn(
        self, table: ScoreTable, rule: LinearRule | None, usable: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64] | None, dict[str, Any]]:
        """The arm "weighted". The first rows of a systematic draw in random order are drawn by the same weights, so a
        draw of a little more than the tokens need is cut. Where it falls short, more rows are drawn from the others and
        appended: a new draw instead would favour draws of long rows."""
        left, order, report = usable.copy(), np.empty(0, dtype=np.int64), dict[str, Any]()
        wanted = 1.05 * self.supervised_tokens
        mean = float(self.encoded.tokens(np.flatnonzero(usable)).mean())
        while (budget := math.ceil(wanted / mean)) < left.sum():
            more = choose_rows(
                table, rule, budget, "weighted", self.choice.seed, self.arm_weighting, self.arm_strength, eligible=left
            )
            order, report = np.concatenate([order, more.rows]), report or more.report
            left[more.rows] = False
            taken = self._cut(order)
            if taken is not None:
                return taken, report
            wanted = 0.2 * self.supervised_tokens
        return None, report

    def _cut(self, order: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return take_tokens(order, self.encoded.tokens(order), self.supervised_tokens)

    def train_dataloader(self) -> DataLoader[Any]:  # type: ignore[override]
        """`steps` batches, the same in every epoch.

        Raises:
            RequestError: several processes; Lightning would give each of them all batches.
        """
        if self._rank()[1] > 1:
            remedy = "run it with devices=1"
            raise RequestError(message("EqualTokensDataModule", "it was given several processes", remedy))
        return DataLoader(self.encoded, batch_sampler=self.batches, collate_fn=self.collate)

    def _say(self, line: str) -> None:
        """Quiet: what a single data module would say of its weights does not hold for an arm."""
