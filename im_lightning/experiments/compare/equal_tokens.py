"""Arms of a comparison at equal supervised tokens and equal optimiser steps.

An arm's rows are chosen from the candidates by one of the methods of `select_subset` until the supervised tokens are
there (±1 %), permuted by the seed, and split in order into as many batches as there are steps. So arms of short and of
long rows see the same number of tokens and make the same number of steps.

Which rows of the pool are the candidates of each seed is drawn before (`candidate_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from im_lightning.errors import RequestError, message
from im_lightning.sampling.selection.decisions import TOLERANCE, take_tokens
from im_lightning.sampling.selection.methods import METHODS
from im_lightning.sampling.selection.select import choose_rows
from im_lightning.sampling.selection.targeted import Targets
from im_lightning.sampling.weights.quality_weights import Weighting
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.run.run_folder import RunInputs

GIVEN = "given"
"""The arm whose order the caller gives (`order=`)."""

FULL = "full"
"""The arm of all candidate rows, whatever their tokens, with as many tokens per step as the others: more steps."""


POOL_DRAWS = ("auto", "folds", "same")
FOLD_TOKENS = 2
"""Times the tokens of an arm that a fold must hold before "auto" splits the pool."""


def settle_pool_draw(how: str, pool_tokens: float, tokens: int, seeds: int) -> str:
    """The draw that "auto" means: folds where each holds twice an arm's tokens, else the same rows for all seeds.

    Raises:
        RequestError: an unknown draw, or the bootstrap of earlier versions.
    """
    if how == "bootstrap":
        cause = "its seeds share rows, and a rule of noise alone came out significant in 17 % of comparisons of 5 seeds"
        remedy = "use folds: fewer --seeds or --tokens, or a larger pool, make room for them"
        raise RequestError(message("--pool-draw bootstrap", cause, remedy))
    if how not in POOL_DRAWS:
        raise RequestError(message("pool_draw", f"there is no {how!r}", f"use one of {', '.join(POOL_DRAWS)}"))
    if how != "auto":
        return how
    return "folds" if pool_tokens >= FOLD_TOKENS * tokens * seeds else "same"


def candidate_rows(
    how: str, rows: int, index: int, seeds: int, seed: int, prompts: NDArray[np.int64] | None = None
) -> list[int] | None:
    """Candidate rows of one seed of a comparison.

    Args:
        how: "folds": the index-th of `seeds` disjoint random parts; "same": all; "bootstrap", of earlier versions: the
            different rows among as many drawn with replacement as there are (about 63 %).
        rows: Rows of the pool.
        index: Which of the seeds, from 0.
        seeds: How many there are.
        seed: Decides the draw.
        prompts: The prompt of each row; then rows of one prompt are in one fold, unless they are more than a fold.

    Returns:
        Row numbers, ascending; None for all.
    """
    if how == "same":
        return None
    if how == "folds":
        order = np.random.default_rng([seed, 3]).permutation(rows)
        if prompts is None:
            return np.sort(np.array_split(order, seeds)[index]).tolist()
        many = np.bincount(prompts)[prompts] > rows / seeds  # a prompt that all rows have by nature is no bond
        code = np.where(many, prompts.max() + 1 + np.arange(rows), prompts)[order]
        first = np.full(code.max() + 1, rows)
        np.minimum.at(first, code, np.arange(rows))
        place = np.sort(first[code])  # a prompt stands where its first row does
        ends = np.cumsum([len(part) for part in np.array_split(order, seeds)])
        fold = np.searchsorted(ends, np.searchsorted(place, place), side="right")
        return np.sort(order[np.argsort(first[code], kind="stable")][fold == index]).tolist()
    return np.unique(np.random.default_rng([seed + index, 4]).integers(0, rows, rows)).tolist()


def split_in_order(rows: NDArray[np.int64], steps: int) -> list[list[int]]:
    """The rows, in order, in `steps` batches whose sizes differ by one at most.

    Raises:
        RequestError: fewer rows than steps.
    """
    if not 1 <= steps <= len(rows):
        cause = f"the arm has {len(rows)} rows, and every step needs one"
        raise RequestError(message(f"steps={steps}", cause, "raise supervised_tokens or lower steps"))
    return [part.tolist() for part in np.array_split(rows, steps)]


def check_held(method: str, tokens: NDArray[np.int64], wanted: int) -> None:
    """Refuses candidate rows of so many tokens each that do not hold those of an arm.

    Raises:
        RequestError: says how many they hold.
    """
    if tokens.sum() < (1 - TOLERANCE) * wanted:
        cause = f"{len(tokens)} candidate rows hold {tokens.sum()} supervised tokens, and every arm needs {wanted}"
        raise RequestError(message(f"arm {method!r}", cause, "lower the tokens, or give more candidates"))


@dataclass(frozen=True)
class Arm:
    """What one arm of a comparison takes.

    Args:
        supervised_tokens: Response tokens with their end markers to train on, per epoch.
        steps: Optimiser steps per epoch.
        method: A method of `select_subset` (weighted, top, random, …), full, or given.
        order: Row numbers for the method "given".
        candidates: Row numbers of the data that arms may choose from; by default all.
        accumulate: Micro-batches per step, as the Trainer's accumulate_grad_batches.
        key: What names this arm in the study's ledger.
        weighting: Of methods that draw by the rule's weights.
        mixture: Source → share, of methods that draw by a mixture.
        targets: What is wanted, for targeted; rows that share a prompt with one are in no arm.
        one_per_prompt: Whether of rows that share a prompt one at most is taken.
    """

    supervised_tokens: int
    steps: int
    method: str = "random"
    order: list[int] | None = None
    candidates: list[int] | None = None
    accumulate: int = 1
    key: str | None = None
    weighting: Weighting = field(default_factory=Weighting)
    mixture: dict[str, float] | None = None
    targets: Targets | None = None
    one_per_prompt: bool = False


class EqualTokensDataModule(InstructMiningDataModule):
    """One arm of a comparison: rows by its method until its tokens (±1 %), in as many batches as steps, one epoch.

    Runs under it are recorded with purpose "compare" and never enter a refit. One process only.

    Args:
        arm: What it takes.
        options: Of `InstructMiningDataModule`: `data`, the candidate rows, from which every arm takes its own;
            `scores`, a table that holds them; `eval_data`, `model`, `rule`, `seed`, ….

    Raises:
        RequestError: an unknown method, one without what it needs, or candidates that do not hold enough tokens.
    """

    def __init__(self, arm: Arm, **options: Any) -> None:
        method = METHODS.get(arm.method)
        if method is None and arm.method not in (GIVEN, FULL):
            names = ", ".join((*METHODS, GIVEN, FULL))
            raise RequestError(message("arm", f"there is no {arm.method!r}", f"use one of {names}"))
        if (arm.method == GIVEN) != (arm.order is not None):
            cause = f"it does not apply to arm {arm.method!r}"
            raise RequestError(message("order", cause, "pass order with arm='given' only"))
        if method is not None and method.needs_rule and options.get("rule") is None:
            raise RequestError(message(f"arm {arm.method!r}", "it needs a rule and none was given", "pass rule="))
        super().__init__(**options, weighting="uniform", purpose="compare")
        self.arm, self.steps = arm, arm.steps

    def _take(self, chosen: RunInputs) -> None:
        """Replaces "all rows equally" by the arm's rows."""
        rows, report = self._arm_rows(chosen)
        arm, tokens = self.arm, int(self.encoded.tokens(rows).sum())
        if arm.method == FULL:
            self.steps = max(1, round(tokens * arm.steps / arm.supervised_tokens))
        self.batches = split_in_order(rows, self.steps * arm.accumulate)
        self.hparams["batch_size"] = len(self.batches[0])  # what the run's record gives as rows per micro-batch
        weights = np.zeros(len(self.pool))
        weights[rows] = 1.0 / len(rows)
        made = replace(chosen.weights, weights=weights, report={**chosen.weights.report, **report})
        design = {
            "kind": "equal tokens",
            "arm": arm.method,
            "seed": self.choice.seed,
            "key": arm.key,
            "candidates": int(self._usable(chosen).sum()),
            "supervised_tokens": tokens,
            "supervised_tokens_wanted": arm.supervised_tokens,
            "steps": self.steps,
            "rows": sorted(rows.tolist()),
        }
        super()._take(replace(chosen, weights=made, rows=rows, design=design))

    def _arm_rows(self, chosen: RunInputs) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """The arm's rows, permuted by the seed, and what the weighting said."""
        table = chosen.table
        if table is None:  # cannot be: `scores` is required
            raise RequestError(message("scores", "the candidates have no score table", "pass scores="))
        arm, wanted, usable = self.arm, self.arm.supervised_tokens, self._usable(chosen)
        rows, report = np.flatnonzero(usable), dict[str, Any]()
        tokens = np.zeros(len(usable), dtype=np.int64)
        tokens[rows] = self.encoded.tokens(rows)
        check_held(arm.method, tokens[rows], wanted)
        if arm.method == FULL:
            taken = rows
        elif arm.order is not None:
            order = np.asarray(arm.order, dtype=np.int64)
            order = order[usable[order]]
            found = take_tokens(order, tokens[order], wanted)
            if found is None:
                cause = f"its order holds {tokens[order].sum()} supervised tokens of the {wanted} asked"
                raise RequestError(message(f"arm {arm.method!r}", cause, "lower the tokens, or give a longer order"))
            taken = found
        else:
            chosen_rows = choose_rows(
                table,
                chosen.rule,
                None,
                arm.method,
                self.choice.seed,
                arm.weighting,
                usable,
                budget_tokens=wanted,
                tokens=tokens,
                cache_dir=self._options.cache_dir,
                mixture=arm.mixture,
                prompts=self.pool.prompts if arm.one_per_prompt else None,
                targets=arm.targets,
            )
            taken, report = chosen_rows.rows, chosen_rows.report
        taken = np.random.default_rng([self.choice.seed, 1]).permutation(taken)
        return taken, {"method": arm.method, **report}

    def _usable(self, chosen: RunInputs) -> NDArray[np.bool_]:
        """bool [N]: candidates with all their scores, the same in every arm."""
        usable = chosen.weights.eligible.copy()
        if chosen.table is not None:
            usable &= np.isfinite(chosen.table.matrix(chosen.table.indicators)).all(axis=1)
        if self.arm.candidates is not None:
            usable &= np.isin(np.arange(len(usable)), self.arm.candidates)
        if self.arm.targets is not None:
            usable &= ~self.arm.targets.shared
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
