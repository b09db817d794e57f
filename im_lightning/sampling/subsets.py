"""`select_subset`: a fixed number of rows of a pool, by a rule or by one of the baselines it has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from im_lightning.errors import RequestError, message
from im_lightning.sampling._random import SUBSET_DRAW, generator
from im_lightning.sampling.systematic import Rows, checked_weights, systematic_sample
from im_lightning.sampling.weights import quality_weights

if TYPE_CHECKING:
    from im_lightning.data.table import ScoreTable
    from im_lightning.rule.linear import LinearRule

METHODS = ("weighted", "top", "worst", "random", "longest", "lowest-ppl")
NEED_RULE = ("weighted", "top", "worst")
_COLUMN = {"longest": "length_output", "lowest-ppl": "ppl"}


@dataclass(frozen=True)
class Selection:
    """Chosen rows.

    Args:
        rows: int64 [budget], positions in the table: best first for the ranking methods, else in random order.
        eligible: Rows there were to choose from.
        report: That of `quality_weights` for "weighted", else {}.
    """

    rows: Rows
    eligible: int
    report: dict[str, Any]


def select_subset(
    table: ScoreTable,
    rule: LinearRule | None,
    budget: int,
    method: str = "weighted",
    seed: int = 0,
    weighting: str = "auto",
    strength: float = 1.0,
    temperature: float = 1.0,
    floor: float = 0.0,
    eligible: ArrayLike | None = None,
) -> Rows:
    """Chooses `budget` different rows.

    Args:
        table: Scores of the pool, N rows.
        rule: The rule. Where one is given, rows without a prediction are left out whatever the method, so that all
            arms of a comparison choose from the same rows.
        budget: Number of rows.
        method: "weighted": drawn by `quality_weights`; "top" and "worst": predicted best and worst; "random";
            "longest": by `length_output`; "lowest-ppl": by `ppl`.
        seed: Decides the draw and, for the ranking methods, which of equal rows come first.
        weighting, strength, temperature, floor: As in `quality_weights`, for "weighted".
        eligible: bool [N], rows that may be chosen.

    Returns:
        int64 [budget], positions in the table: best first for the ranking methods, else in random order.

    Raises:
        RequestError: an unknown method, a missing rule or column, more rows wanted than can be chosen; "weighted" for
            all of them, which would be no choice.
    """
    return choose_rows(table, rule, budget, method, seed, weighting, strength, temperature, floor, eligible).rows


def choose_rows(
    table: ScoreTable,
    rule: LinearRule | None,
    budget: int,
    method: str = "weighted",
    seed: int = 0,
    weighting: str = "auto",
    strength: float = 1.0,
    temperature: float = 1.0,
    floor: float = 0.0,
    eligible: ArrayLike | None = None,
) -> Selection:
    """`select_subset` with what it was chosen from and how."""
    if method not in METHODS:
        raise RequestError(message(f"method {method!r}", "it is not known", f"use one of {', '.join(METHODS)}"))
    if method in NEED_RULE and rule is None:
        remedy = "pass a rule (--rule, a published name or a rule file), or choose by random, longest or lowest-ppl"
        raise RequestError(message(f"method {method}", "it needs a rule", remedy))
    usable = np.ones(len(table), dtype=bool) if eligible is None else np.asarray(eligible, dtype=bool)
    predicted = None if rule is None else rule.predict(table)
    key = np.zeros(len(table))
    if predicted is not None:
        usable = usable & np.isfinite(predicted)
        key = {"top": predicted, "worst": -predicted}.get(method, key)
    if method in _COLUMN:
        column = table.matrix([_COLUMN[method]])[:, 0]
        usable = usable & np.isfinite(column)
        key = -column if method == "longest" else column
    rows = np.flatnonzero(usable)
    if not 1 <= budget <= len(rows):
        cause = f"{len(rows)} of {len(table)} rows can be chosen by {method} (eligible and with the values it needs)"
        raise RequestError(message(f"budget={budget}", cause, f"choose a budget from 1 to {len(rows)}"))

    rng = generator(seed, purpose=SUBSET_DRAW)
    if method == "weighted":
        if budget == len(rows):
            cause = f"drawing all {len(rows)} rows without replacement takes each once, whatever its weight"
            raise RequestError(
                message(f"budget={budget}", cause, "lower the budget, or train on the whole pool as it is")
            )
        result = quality_weights(table, rule, weighting, strength, temperature, floor, budget, usable)
        drawn = systematic_sample(checked_weights(result.weights), budget, rng)
        return Selection(drawn, len(rows), result.report)
    rng.shuffle(rows)  # then a stable sort: equal rows come in random order, not in that of the file
    if method != "random":
        rows = rows[np.argsort(key[rows], kind="stable")]
    return Selection(rows[:budget], len(rows), {})
