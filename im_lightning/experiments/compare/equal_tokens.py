"""Arms of a comparison at equal supervised tokens and equal optimiser steps.

An arm's rows are chosen from the candidates by one of the methods of `select_subset` until the supervised tokens are
there (±1 %), permuted by the seed, and split in order into as many batches as there are steps. So arms of short and of
long rows see the same number of tokens and make the same number of steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from im_lightning.errors import RequestError, message
from im_lightning.sampling.selection.select import METHODS, NEED_RULE, TOLERANCE, choose_rows, take_tokens
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.run.run_folder import RunInputs

GIVEN = "given"
"""The arm whose order the caller gives (`order=`)."""

FULL = "full"
"""The arm of all candidate rows, whatever their tokens, with as many tokens per step as the others: more steps."""


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
        supervised_tokens: Response tokens with their end markers to train on, per epoch.
        steps: Optimiser steps per epoch.
        arm: A method of `select_subset` (weighted, top, random, …), full, or given.
        rule: A published rule's name or a rule file; with one, rows without a prediction are out of every arm.
        order: Row numbers for the arm "given".
        candidates: Row numbers of the data that arms may choose from; by default all.
        accumulate: Micro-batches per step, as the Trainer's accumulate_grad_batches.
        key: What names this arm in the study's ledger.
        weighting: Of the arm "weighted"; auto, tilt, softmax, rank or top.
        strength: Of a tilt.
        seed: Decides draws, ties and the order of training.
        template: auto, alpaca or chat.
        max_length: Tokens per example; longer ones are cut.
        eval_batch_tokens: Tokens per evaluation batch, padding included.
        cache_dir: Score store.
        format: auto, alpaca, sharegpt, messages or prompt-response.
        force: Apply a rule fitted with another base model, template or indicator models.
        on_bad_row: error or quarantine.

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
        candidates: list[int] | None = None,
        accumulate: int = 1,
        key: str | None = None,
        weighting: str = "auto",
        strength: float = 1.0,
        seed: int = 0,
        template: str = "auto",
        max_length: int = 1024,
        eval_batch_tokens: int = 8192,
        cache_dir: str | None = None,
        format: str = "auto",
        force: bool = False,
        on_bad_row: str = "error",
    ) -> None:
        if arm not in (*METHODS, GIVEN, FULL):
            names = ", ".join((*METHODS, GIVEN, FULL))
            raise RequestError(message("arm", f"there is no {arm!r}", f"use one of {names}"))
        if (arm == GIVEN) != (order is not None):
            raise RequestError(message("order", f"it does not go with arm {arm!r}", "pass order with arm='given' only"))
        if arm in NEED_RULE and rule is None:
            raise RequestError(message(f"arm {arm!r}", "it needs a rule and none was given", "pass rule="))
        super().__init__(
            data, eval_data, model, rule, scores, weighting="uniform", purpose="compare", template=template,
            max_length=max_length, eval_batch_tokens=eval_batch_tokens, seed=seed, cache_dir=cache_dir, format=format,
            force=force, on_bad_row=on_bad_row,
        )  # fmt: skip
        self.candidates, self.accumulate, self.key = candidates, accumulate, key
        self.arm, self.order, self.arm_weighting, self.arm_strength = arm, order, weighting, strength
        self.supervised_tokens, self.steps = supervised_tokens, steps

    def _take(self, chosen: RunInputs) -> None:
        """Replaces "all rows equally" by the arm's rows."""
        rows, report = self._arm_rows(chosen)
        if self.arm == FULL:
            tokens = int(self.encoded.tokens(rows).sum())
            self.steps = max(1, round(tokens * self.steps / self.supervised_tokens))
        self.batches = split_in_order(rows, self.steps * self.accumulate)
        self.hparams["batch_size"] = len(self.batches[0])  # what the run's record gives as rows per micro-batch
        weights = np.zeros(len(self.pool))
        weights[rows] = 1.0 / len(rows)
        made = replace(chosen.weights, weights=weights, report={**chosen.weights.report, **report})
        design = {
            "kind": "equal tokens",
            "arm": self.arm,
            "seed": self.choice.seed,
            "key": self.key,
            "candidates": int(self._usable(chosen).sum()),
            "supervised_tokens": int(self.encoded.tokens(rows).sum()),
            "supervised_tokens_wanted": self.supervised_tokens,
            "steps": self.steps,
            "rows": sorted(rows.tolist()),
        }
        super()._take(replace(chosen, weights=made, rows=rows, design=design))

    def _arm_rows(self, chosen: RunInputs) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """The arm's rows, permuted by the seed, and what the weighting said."""
        table = chosen.table
        if table is None:  # cannot be: `scores` is required
            raise RequestError(message("scores", "the candidates have no score table", "pass scores="))
        usable = self._usable(chosen)
        rows, report = np.flatnonzero(usable), dict[str, Any]()
        tokens = np.zeros(len(usable), dtype=np.int64)
        tokens[rows] = self.encoded.tokens(rows)
        if tokens.sum() < (1 - TOLERANCE) * self.supervised_tokens:
            cause = f"{len(rows)} candidate rows hold {tokens.sum()} supervised tokens, and every arm needs "
            remedy = "lower the tokens, or give more candidates"
            raise RequestError(message(f"arm {self.arm!r}", f"{cause}{self.supervised_tokens}", remedy))
        if self.arm == FULL:
            taken = rows
        elif self.order is not None:
            order = np.asarray(self.order, dtype=np.int64)
            order = order[usable[order]]
            found = take_tokens(order, tokens[order], self.supervised_tokens)
            if found is None:
                cause = f"its order holds {tokens[order].sum()} supervised tokens of the {self.supervised_tokens} asked"
                raise RequestError(message(f"arm {self.arm!r}", cause, "lower the tokens, or give a longer order"))
            taken = found
        else:
            chosen_rows = choose_rows(
                table, chosen.rule, None, self.arm, self.choice.seed, self.arm_weighting, self.arm_strength,
                eligible=usable, budget_tokens=self.supervised_tokens, tokens=tokens, cache_dir=self._options.cache_dir,
            )  # fmt: skip
            taken, report = chosen_rows.rows, chosen_rows.report
        taken = np.random.default_rng([self.choice.seed, 1]).permutation(taken)
        return taken, {"method": self.arm, **report}

    def _usable(self, chosen: RunInputs) -> NDArray[np.bool_]:
        """bool [N]: candidates with all their scores, the same in every arm."""
        usable = chosen.weights.eligible.copy()
        if chosen.table is not None:
            usable &= np.isfinite(chosen.table.matrix(chosen.table.indicators)).all(axis=1)
        if self.candidates is not None:
            usable &= np.isin(np.arange(len(usable)), self.candidates)
        return usable

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
