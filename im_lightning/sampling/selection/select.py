"""`select_subset`: a fixed number of rows (or tokens) of a pool, by a rule or by a baseline it has to beat.

Rows taken in an order until a budget of rows or tokens is reached; near-duplicates of taken rows are passed over.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from im_lightning._utils.rng import SUBSET_DRAW, generator
from im_lightning.errors import RequestError, message
from im_lightning.sampling.draws.systematic import Rows, checked_weights, systematic_sample
from im_lightning.sampling.weights.quality_weights import QualityWeights, quality_weights

if TYPE_CHECKING:
    from im_lightning.data.score_table import ScoreTable
    from im_lightning.rule.linear_rule import LinearRule


TOLERANCE = 0.01
"""Share by which the tokens of a subset may miss the number asked for."""

_BLOCK = 1024  # rows compared with the taken ones at a time


class Basket:
    """What was taken so far.

    Args:
        rows: Rows to take, or None for a budget of tokens.
        target: Tokens to take (± `TOLERANCE`), or None for a budget of rows.
        tokens: int64 [N], tokens per row of the pool; needed with `target`.
        vectors: [N, d], one per row of the pool, perhaps a memory map; needed with `max_similarity`.
        max_similarity: A row whose cosine with a taken row is this or more is passed over (Liu et al. 2024, DEITA).
        tolerance: Share of the target that may be missing or too much.

    Attributes:
        taken: The rows, in the order taken.
        total: Their tokens, 0 where none are counted.
        passed_over: Near-duplicates met.
    """

    def __init__(
        self,
        rows: int | None,
        target: int | None = None,
        tokens: NDArray[np.int64] | None = None,
        vectors: NDArray[np.float32] | NDArray[np.float16] | None = None,
        max_similarity: float | None = None,
        tolerance: float = TOLERANCE,
    ) -> None:
        self.rows, self.target, self.tokens = rows, target, tokens
        self.vectors, self.max_similarity = vectors, max_similarity
        self.taken: list[int] = []
        self.total = 0
        self.passed_over = 0
        self._low = 0 if target is None else math.ceil(target * (1 - tolerance))
        self._high = 0 if target is None else math.floor(target * (1 + tolerance))
        self._kept = np.empty((0, 0), dtype=np.float32)

    @property
    def full(self) -> bool:
        return self.total >= self._low if self.rows is None else len(self.taken) >= self.rows

    def wanted(self, left: NDArray[np.bool_]) -> int:
        """How many of the rows `left` (bool [N]) are likely to fill it; with a margin where tokens are counted."""
        if self.rows is not None:
            return self.rows - len(self.taken)
        if self.tokens is None or self.target is None or not left.any():
            return 1
        mean = max(float(self.tokens[left].mean()), 1e-9)
        return max(1, math.ceil(1.05 * (self.target - self.total) / mean))

    def fill(self, order: Rows) -> None:
        """Takes rows in that order until it is full."""
        if self.rows is not None and self.max_similarity is None:
            self.taken += order[: self.rows - len(self.taken)].tolist()
            return
        for start in range(0, len(order), _BLOCK):
            if self.full:
                return
            block, since = order[start : start + _BLOCK], len(self.taken)
            for row in block[self._unlike(block)].tolist():
                self.offer(row, since)

    def offer(self, row: int, since: int = 0) -> bool:
        """Takes a row unless it is full, the row has too many tokens, or is too similar to one taken (those before
        the first `since` were compared already)."""
        if self.full:
            return False
        count = 0 if self.tokens is None else int(self.tokens[row])
        if self.rows is None and self.total + count > self._high:
            return False
        if self.max_similarity is not None:
            vector = self._unit(np.array([row]))[0]
            if len(self.taken) > since and (self._kept[since : len(self.taken)] @ vector).max() >= self.max_similarity:
                self.passed_over += 1
                return False
            self._keep(vector)
        self.taken.append(row)
        self.total += count
        return True

    def _unlike(self, block: Rows) -> NDArray[np.bool_]:
        """bool [n]: the rows that are no near-duplicate of one taken so far."""
        if self.max_similarity is None or not self.taken:
            return np.ones(len(block), dtype=bool)
        similarity = (self._unit(block) @ self._kept[: len(self.taken)].T).max(axis=1)
        self.passed_over += int((similarity >= self.max_similarity).sum())
        return similarity < self.max_similarity

    def _keep(self, vector: NDArray[np.float32]) -> None:
        n = len(self.taken)
        if n == len(self._kept):
            grown = np.empty((max(64, 2 * n), len(vector)), dtype=np.float32)
            grown[:n] = self._kept[:n] if n else grown[:0]
            self._kept = grown
        self._kept[n] = vector

    def _unit(self, rows: Rows) -> NDArray[np.float32]:
        if self.vectors is None:
            raise RuntimeError("a similarity needs vectors")
        return unit_vectors(self.vectors, rows)


def take_tokens(
    order: Rows, tokens: NDArray[np.int64], target: int, tolerance: float = TOLERANCE
) -> NDArray[np.int64] | None:
    """Rows in order until `target` tokens, give or take `tolerance`.

    A row that would overshoot is passed over; so only the last few rows can be out of order.

    Args:
        order: int64 [n], rows.
        tokens: int64 [n], tokens of each of them.
        target: Tokens to reach.
        tolerance: Share of the target.

    Returns:
        int64 [k], a part of `order`; None if it does not hold enough tokens.
    """
    basket = Basket(None, target, tokens, tolerance=tolerance)
    basket.fill(np.arange(len(order)))
    return order[basket.taken] if basket.full else None


def unit_vectors(vectors: NDArray[np.float32] | NDArray[np.float16], rows: Rows) -> NDArray[np.float32]:
    """The vectors of those rows, scaled to length 1, float32 [n, d]."""
    part = np.asarray(vectors[rows], dtype=np.float32)
    part /= np.sqrt(np.einsum("rd,rd->r", part, part))[:, None]
    return part


METHODS = (
    "weighted", "top", "worst", "random", "random-balanced", "random-tokens", "longest", "lowest-ppl", "ifd", "diverse",
)  # fmt: skip
NEED_RULE = ("weighted", "top", "worst")
TOKENS = "length_output"
"""The column whose sum a budget of tokens is about."""

_COLUMN = {"longest": "length_output", "lowest-ppl": "ppl", "ifd": "ifd"}


@dataclass(frozen=True)
class Selection:
    """Chosen rows.

    Args:
        rows: int64 [n], positions in the table: best first for the ranking methods and "diverse", else in random order.
        eligible: Rows there were to choose from.
        report: That of `quality_weights` for "weighted" and "diverse" (which adds its own under "diverse"), and the
            near-duplicates passed over; else {}.
    """

    rows: Rows
    eligible: int
    report: dict[str, Any]


def select_subset(
    table: ScoreTable,
    rule: LinearRule | None,
    budget: int | None,
    method: str = "weighted",
    seed: int = 0,
    weighting: str = "auto",
    strength: float = 1.0,
    temperature: float = 1.0,
    floor: float = 0.0,
    eligible: ArrayLike | None = None,
    budget_tokens: int | None = None,
    tokens: ArrayLike | None = None,
    embeddings: NDArray[np.float32] | None = None,
    max_similarity: float | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Rows:
    """Chooses different rows, `budget` of them or as many as hold `budget_tokens`.

    Args:
        table: Scores of the pool, N rows.
        rule: The rule. Where one is given, rows without a prediction are left out whatever the method, so that all
            arms of a comparison choose from the same rows.
        budget: Number of rows, or None with `budget_tokens`.
        method: "weighted": drawn by `quality_weights`; "top" and "worst": predicted best and worst; "diverse": facility
            location over the embeddings, weighted by `quality_weights` where there is a rule (`sampling.diverse`);
            "random"; "random-balanced": as many of each source, as far as it goes; "random-tokens": random, by
            `budget_tokens`; "longest": by `length_output`; "lowest-ppl": by `ppl`; "ifd": highest `ifd` below 1 (rows
            whose response the instruction makes no easier are left out, as in Cherry_LLM).
        seed: Decides the draw and, for the ranking methods, which of equal rows come first.
        weighting, strength, temperature, floor: As in `quality_weights`, for "weighted" and "diverse".
        eligible: bool [N], rows that may be chosen.
        budget_tokens: Sum of `tokens` to reach, ± 1 %. A row that would overshoot is passed over.
        tokens: Tokens of each row [N]; by default `length_output`.
        embeddings: One vector per row, float [N, d], perhaps a memory map; by default those that the table's `knn_<i>`
            was calculated from, read from the score store.
        max_similarity: Passes over rows whose cosine with a chosen one is this or more (DEITA uses 0.9).
        cache_dir: The score store.

    Returns:
        int64, positions in the table: best first for the ranking methods and "diverse", else in random order.

    Raises:
        RequestError: an unknown method, a missing rule, column or embedding, more wanted than can be chosen;
            "weighted" for all rows, which would be no choice.

    >>> from im_lightning import ScoreTable
    >>> table = ScoreTable([0, 1, 2], ["a", "b", "c"], [""] * 3, {"length_output": [3.0, 9.0, 5.0]})
    >>> select_subset(table, None, 2, "longest").tolist()
    [1, 2]
    """
    return choose_rows(
        table, rule, budget, method, seed, weighting, strength, temperature, floor, eligible, budget_tokens, tokens,
        embeddings, max_similarity, cache_dir,
    ).rows  # fmt: skip


def choose_rows(
    table: ScoreTable,
    rule: LinearRule | None,
    budget: int | None,
    method: str = "weighted",
    seed: int = 0,
    weighting: str = "auto",
    strength: float = 1.0,
    temperature: float = 1.0,
    floor: float = 0.0,
    eligible: ArrayLike | None = None,
    budget_tokens: int | None = None,
    tokens: ArrayLike | None = None,
    embeddings: NDArray[np.float32] | None = None,
    max_similarity: float | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Selection:
    """`select_subset` with what it was chosen from and how."""
    _check(method, rule, budget, budget_tokens, max_similarity)
    usable = np.ones(len(table), dtype=bool) if eligible is None else np.asarray(eligible, dtype=bool)
    predicted = None if rule is None else rule.predict(table)
    key = np.zeros(len(table))
    if predicted is not None:
        usable = usable & np.isfinite(predicted)
        key = {"top": predicted, "worst": -predicted}.get(method, key)
    if method in _COLUMN:
        column = table.matrix([_COLUMN[method]])[:, 0]
        usable = usable & (column < 1 if method == "ifd" else np.isfinite(column))
        key = column if method == "lowest-ppl" else -column
    counts = None
    if budget_tokens is not None:
        column = table.matrix([TOKENS])[:, 0] if tokens is None else np.asarray(tokens, dtype=np.float64)
        usable = usable & np.isfinite(column)
        counts = np.where(usable, column, 0).astype(np.int64)
    vectors = None
    if method == "diverse" or max_similarity is not None:
        from im_lightning.sampling.selection.embeddings import checked_vectors, rows_with_vectors, stored_vectors

        vectors = stored_vectors(table, cache_dir) if embeddings is None else checked_vectors(embeddings, len(table))
        usable = usable & rows_with_vectors(vectors)
    rows = np.flatnonzero(usable)
    if budget is not None and not 1 <= budget <= len(rows):
        cause = f"{len(rows)} of {len(table)} rows can be chosen by {method} (eligible and with the values it needs)"
        raise RequestError(message(f"budget={budget}", cause, f"choose a budget from 1 to {len(rows)}"))

    rng = generator(seed, purpose=SUBSET_DRAW)
    basket = Basket(budget, budget_tokens, counts, vectors, max_similarity)
    report: dict[str, Any] = {}
    if method in ("weighted", "diverse"):
        how = "uniform" if rule is None else weighting

        def weigh(wanted: int, left: NDArray[np.bool_]) -> QualityWeights:
            return quality_weights(table, rule, how, strength, temperature, floor, wanted, left)

        draw = _draw if method == "weighted" else _cover
        report = draw(basket, weigh, usable, rng)
    else:
        rng.shuffle(rows)  # then a stable sort: equal rows come in random order, not in that of the file
        if method == "random-balanced":
            rows = _in_turn([table.source[at] for at in rows], rows, rng)
        elif not method.startswith("random"):
            rows = rows[np.argsort(key[rows], kind="stable")]
        basket.fill(rows)
    if not basket.full:
        raise _not_full(basket, method, int(usable.sum()))
    if max_similarity is not None:
        report = {**report, "near_duplicates": {"cosine": max_similarity, "passed_over": basket.passed_over}}
    return Selection(np.array(basket.taken, dtype=np.int64), int(usable.sum()), report)


def _check(
    method: str, rule: LinearRule | None, budget: int | None, budget_tokens: int | None, max_similarity: float | None
) -> None:
    """Refuses what cannot be meant, before anything is read."""
    if method not in METHODS:
        raise RequestError(message(f"method {method!r}", "it is not known", f"use one of {', '.join(METHODS)}"))
    if method in NEED_RULE and rule is None:
        remedy = "pass a rule (--rule, a published name or a rule file), or choose by random, longest or lowest-ppl"
        raise RequestError(message(f"method {method}", "it needs a rule", remedy))
    if (budget is None) == (budget_tokens is None):
        cause = "there is none" if budget is None else "it is given in rows and in tokens"
        remedy = "pass one of --budget (budget=, rows) and --budget-tokens (budget_tokens=)"
        raise RequestError(message("the budget", cause, remedy))
    if budget_tokens is not None and budget_tokens < 1:
        raise RequestError(message(f"budget_tokens={budget_tokens}", "is less than one token", "give 1 or more"))
    if method == "random-tokens" and budget_tokens is None:
        remedy = "pass --budget-tokens (budget_tokens=) or --match SUBSET, or use method random"
        raise RequestError(message("method random-tokens", "it is matched on tokens, and none are given", remedy))
    if max_similarity is not None and not 0 < max_similarity <= 1:
        cause = "the cosine from which rows are near-duplicates lies above 0, and at 1 at most"
        raise RequestError(message(f"max_similarity={max_similarity}", cause, "give such as 0.9"))


def _draw(
    basket: Basket, weigh: Callable[[int, NDArray[np.bool_]], QualityWeights], usable: NDArray[np.bool_], rng: Any
) -> dict[str, Any]:
    """Rows by weight. A draw that falls short of its tokens, or loses near-duplicates, goes on with the other rows."""
    left, report = usable.copy(), dict[str, Any]()
    while not basket.full and left.any():
        wanted, available = basket.wanted(left), int(left.sum())
        if wanted >= available:
            if basket.taken:
                break
            cause = f"drawing all {available} rows without replacement takes each once, whatever its weight"
            what = f"budget={wanted}" if basket.target is None else f"budget_tokens={basket.target}"
            raise RequestError(message(what, cause, "lower the budget, or train on the whole pool as it is"))
        result = weigh(wanted, left)
        drawn = systematic_sample(checked_weights(result.weights), wanted, rng)
        basket.fill(drawn)
        left[drawn] = False
        report = report or result.report
    return report


def _cover(
    basket: Basket, weigh: Callable[[int, NDArray[np.bool_]], QualityWeights], usable: NDArray[np.bool_], rng: Any
) -> dict[str, Any]:
    """Rows that cover the others. Where near-duplicates use up the candidates, the rest of the pool gives new ones."""
    from im_lightning.sampling.selection import diverse

    if basket.vectors is None:
        raise RuntimeError("facility location needs vectors")
    left, report = usable.copy(), dict[str, Any]()
    while not basket.full and left.any():
        wanted = min(basket.wanted(left), int(left.sum()))
        result = weigh(wanted, left)
        rows, worth = diverse.draw_candidates(checked_weights(result.weights), wanted, rng)
        neighbours = diverse.neighbours_for(len(rows), wanted)
        graph = diverse.similarity_graph(unit_vectors(basket.vectors, rows), neighbours)
        covering = diverse.facility_location(graph, worth, lambda: basket.full, partial(_offer, basket, rows))
        left[rows] = False
        report = report or {**result.report, "diverse": diverse.describe(len(rows), graph, covering)}
    return report


def _offer(basket: Basket, rows: Rows, candidate: int) -> bool:
    return basket.offer(int(rows[candidate]))


def _in_turn(sources: list[str], rows: Rows, rng: np.random.Generator) -> Rows:
    """The rows, one of each source in turn; a source without more rows is left out of the turns."""
    names, code = np.unique(np.array(sources, dtype=object).astype(str), return_inverse=True)
    by_source = np.argsort(code, kind="stable")
    first = np.searchsorted(code[by_source], np.arange(len(names)))
    turn = np.empty(len(rows), dtype=np.int64)
    turn[by_source] = np.arange(len(rows)) - first[code[by_source]]
    return rows[np.lexsort((rng.permutation(len(names))[code], turn))]


def _not_full(basket: Basket, method: str, eligible: int) -> RequestError:
    what = f"budget={basket.rows}" if basket.target is None else f"budget_tokens={basket.target}"
    have = f"{len(basket.taken)} rows" if basket.target is None else f"{basket.total} tokens"
    cause = f"of the {eligible} rows that can be chosen by {method} there are only {have} to take"
    remedy = "lower the budget, or add data"
    counts, target = basket.tokens, basket.target
    if target is not None and counts is not None and counts.sum() >= (1 - TOLERANCE) * target:  # in rows too long
        cause = f"the rows taken by {method} hold {basket.total}, and each of the others would overshoot by more than"
        cause, remedy = f"{cause} {TOLERANCE:.0%}", "choose a larger budget, or another seed"
    if basket.max_similarity is not None:
        cause += f" ({basket.passed_over} times a row was a near-duplicate, cosine {basket.max_similarity} or more)"
        remedy += ", or raise max_similarity"
    return RequestError(message(what, cause, remedy))
