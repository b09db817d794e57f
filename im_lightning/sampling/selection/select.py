"""`select_subset`: a fixed number of rows (or tokens) of a pool, by a rule or by a baseline it has to beat.

Rows taken in an order until a budget of rows or tokens is reached; near-duplicates of taken rows are passed over.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from im_lightning._utils.force import Force
from im_lightning._utils.rng import SUBSET_DRAW, generator
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.draws.systematic import Rows, checked_groups
from im_lightning.sampling.selection.by_source import source_phi, source_rule
from im_lightning.sampling.selection.decisions import TOLERANCE, Basket, Decisions
from im_lightning.sampling.selection.methods import BY, TOKENS, Candidates, Method, method_of
from im_lightning.sampling.selection.ranking import SOURCE, Ranking
from im_lightning.sampling.selection.targeted import Targets
from im_lightning.sampling.weights.mixture import check_mixture, mixed
from im_lightning.sampling.weights.quality_weights import RowWeights, Weighting, of_draw, weights_of


@dataclass(frozen=True)
class Selection:
    """Chosen rows."""

    # int64 [n], positions in the table: best first for the ranking methods and "diverse", else in random order
    rows: Rows
    eligible: int  # rows there were to choose from
    # that of `quality_weights` for "weighted" and "diverse" (which adds its own under "diverse"), and the
    # near-duplicates passed over; else {}
    report: dict[str, Any]
    decisions: Decisions


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
    force: Force = False,
    ranking: Ranking | None = None,
    mixture: Mapping[str, float] | None = None,
    prompts: ArrayLike | None = None,
    targets: Targets | None = None,
) -> Rows:
    """Chooses different rows, `budget` of them or as many as hold `budget_tokens`.

    Args:
        table: Scores of the pool, N rows.
        rule: The rule. Where one is given, rows without a prediction are left out whatever the method, so that all
            arms of a comparison choose from the same rows.
        budget: Number of rows, or None with `budget_tokens`.
        method: "weighted": drawn by `quality_weights`; "by-source": likewise by the shares of sources alone, as
            fitted on the rule's runs; "mix" and "mix+rule": likewise by `mixture`; "top" and "worst": predicted best
            and worst; "diverse": facility location over the embeddings, weighted by `quality_weights` where there is a
            rule (`sampling.selection.diverse`); "targeted": nearest to each of `targets` in turn; "random";
            "random-balanced": as many of each source, as far as it goes; "random-tokens": random, by `budget_tokens`;
            "longest": by `length_output`; "lowest-ppl": by `ppl`; "reward": highest; "ifd": highest `ifd` below 1 (rows
            whose response the instruction makes no easier are left out, as in Cherry_LLM).
        seed: Decides the draw and, for the ranking methods, which of equal rows come first.
        weighting, strength, temperature, floor: As in `quality_weights`, for the methods that draw by weight.
        eligible: bool [N], rows that may be chosen.
        budget_tokens: Sum of `tokens` to reach, ± 1 %. A row that would overshoot is passed over.
        tokens: Tokens of each row [N]; by default `length_output`.
        embeddings: One vector per row, float [N, d], perhaps a memory map; by default those that the table's `knn_<i>`
            was calculated from, read from the score store.
        max_similarity: Passes over rows whose cosine with a chosen one is this or more (DEITA uses 0.9).
        cache_dir: The score store.
        force: Risks to accept, as `LinearRule.check` takes them.
        ranking: Columns to rank by, what share of the rows stays, quotas per group. With the default method rows are
            taken in that order; with another its shares and quotas hold. Where they narrow the rows, `budget` may be
            None, for all that stays.
        mixture: Source → share of the rows drawn, for "mix" (each row of a source alike) and "mix+rule" (by the rule's
            weights within each source).
        prompts: One label per row [N], equal for rows of the same prompt (`prompt_groups`): then one row of each is
            taken at most. Draws by weight stay exact (`systematic_sample`, its groups).
        targets: What is wanted, for "targeted": rows nearest to each target in turn. Rows that share a prompt with one
            are left out whatever the method.

    Returns:
        int64, positions in the table: best first for the ranking methods and "diverse", else in random order.

    Raises:
        RequestError: an unknown method, a missing rule, column or embedding, more wanted than can be chosen;
            "weighted" for all rows, which would be no choice; a rule that `LinearRule.check` refuses for the table.

    >>> from im_lightning import ScoreTable
    >>> table = ScoreTable([0, 1, 2], ["a", "b", "c"], [""] * 3, {"length_output": [3.0, 9.0, 5.0]})
    >>> select_subset(table, None, 2, "longest").tolist()
    [1, 2]
    """
    if rule is not None:
        rule.check(table, force)
    return choose_rows(
        table,
        rule,
        budget,
        method,
        seed,
        Weighting(weighting, strength, temperature, floor),
        eligible,
        budget_tokens=budget_tokens,
        tokens=tokens,
        embeddings=embeddings,
        max_similarity=max_similarity,
        cache_dir=cache_dir,
        ranking=ranking,
        mixture=mixture,
        prompts=prompts,
        targets=targets,
    ).rows


def choose_rows(
    table: ScoreTable,
    rule: LinearRule | None,
    budget: int | None,
    method: str = "weighted",
    seed: int = 0,
    weighting: Weighting | None = None,
    eligible: ArrayLike | None = None,
    budget_tokens: int | None = None,
    tokens: ArrayLike | None = None,
    embeddings: NDArray[np.float32] | None = None,
    max_similarity: float | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    ranking: Ranking | None = None,
    mixture: Mapping[str, float] | None = None,
    prompts: ArrayLike | None = None,
    targets: Targets | None = None,
) -> Selection:
    """`select_subset` with what it was chosen from and how."""
    by = None if ranking is None else ranking.by
    columns = [] if ranking is None else ranking.columns
    how = BY if method == "weighted" and by is not None else method_of(method)
    _check(how, rule, budget, budget_tokens, max_similarity, ranking)
    if how.mixture:
        if mixture is None:
            remedy = "pass --mixture (mixture=), as im-lightning mix makes it"
            raise RequestError(message(f"method {how.name}", "it needs a mixture of sources", remedy))
        check_mixture(mixture, table.source)
    if how.targets and targets is None:
        remedy = "pass --target FILE (targets=), examples of what is wanted"
        raise RequestError(message(f"method {how.name}", "it needs targets", remedy))
    groups = None if prompts is None else checked_groups(np.asarray(prompts), len(table))
    usable = np.ones(len(table), dtype=bool) if eligible is None else np.asarray(eligible, dtype=bool)
    decided = Decisions(usable)
    if targets is not None:
        usable = decided.without(usable & ~targets.shared, "a target has its prompt")
    phi = np.empty((len(table), 0)) if rule is None else rule.phi(table)
    predicted = None if rule is None else rule.log_loss(phi)
    if predicted is not None:
        usable = decided.without(usable & np.isfinite(predicted), "the rule has no prediction of it")
    column = None if how.column is None else table.matrix([how.column])[:, 0]
    if column is not None:
        usable = decided.without(usable & how.may(column), f"its {how.column} cannot be chosen by")
    for each in columns:
        found = np.isfinite(table.matrix([each.name])[:, 0])
        usable = decided.without(usable & found, f"it has no {each.name}")
    counts = None
    if budget_tokens is not None:
        lengths = table.matrix([TOKENS])[:, 0] if tokens is None else np.asarray(tokens, dtype=np.float64)
        usable = decided.without(usable & np.isfinite(lengths), f"it has no {TOKENS}")
        counts = np.where(usable, lengths, 0).astype(np.int64)
    vectors = None
    if how.embeddings or max_similarity is not None:
        from im_lightning.sampling.selection.embeddings import checked_vectors, rows_with_vectors, stored_vectors

        vectors = stored_vectors(table, cache_dir) if embeddings is None else checked_vectors(embeddings, len(table))
        usable = decided.without(usable & rows_with_vectors(vectors), "it has no embedding")
    rng, order = generator(seed, purpose=SUBSET_DRAW), None
    if ranking is not None and by is not None:
        order, dropped = ranking.order(table, usable, rng)
        for each, rows in zip(columns, dropped, strict=True):
            usable[rows] = False
            decided.leave_out(rows, f"others rank before it by {each.name}")
    quotas = None if ranking is None else ranking.quotas(table, budget)
    basket = Basket(budget, budget_tokens, counts, vectors, max_similarity, quotas=quotas, prompts=groups)
    eligible_rows, available = int(usable.sum()), basket.most(usable)
    everything = budget is None and budget_tokens is None
    if everything:
        budget = basket.rows = available
    if budget is not None and not 1 <= budget <= available:
        one = "" if groups is None else ", one per prompt"
        cause = f"{available} of {len(table)} rows can be chosen by {how.name} (eligible and with the values it needs"
        cause += f"{one})"
        raise RequestError(message(f"budget={budget}", cause, f"choose a budget from 1 to {available}"))

    def weigh(wanted: int, left: NDArray[np.bool_]) -> RowWeights:
        asked = weighting or Weighting()
        by: LinearRule | None
        if how.by_source and rule is not None:
            own = source_rule(rule)
            by, x = own, source_phi(table.source, own.feature_names_in_)
        else:
            by, x = (rule if how.needs_rule or not how.mixture else None), phi
            asked = replace(asked, weighting="uniform") if by is None else asked
        made = weights_of(x, by, asked, wanted, left)
        if how.mixture and mixture is not None:
            made = mixed(made, table.source, mixture)
        drawn = None if how.embeddings else groups  # of candidates there may be several of a prompt
        if by is not None and (how.mixture or drawn is not None):
            made = of_draw(made, x, by, wanted, drawn)
        return made

    candidates = Candidates(table, usable, basket, predicted, column, weigh, rng, order)
    candidates.targets, candidates.decided = targets, decided
    report = how.take(candidates)
    if not basket.full and not (everything and basket.taken):
        raise _not_full(basket, how.name, available)
    if max_similarity is not None:
        report = {**report, "near_duplicates": {"cosine": max_similarity, "passed_over": len(basket.duplicates)}}
    if groups is not None:
        report = {**report, "one_per_prompt": {"prompts": available, "rows": eligible_rows}}
    decided.close(basket, SOURCE if ranking is None else ranking.group)
    return Selection(np.array(basket.taken, dtype=np.int64), eligible_rows, report, decided)


def _check(
    method: Method,
    rule: LinearRule | None,
    budget: int | None,
    budget_tokens: int | None,
    max_similarity: float | None,
    ranking: Ranking | None,
) -> None:
    """Refuses what cannot be meant, before anything is read."""
    if (
        ranking is not None
        and method is not BY
        and ranking.by is not None
        and not (ranking.keep or ranking.columns[-1].share)
    ):
        cause = f"method {method.name} takes rows in another order, so that it would have no effect"
        raise RequestError(message(f"by={ranking.by}", cause, "say what share stays (--keep), or leave out --method"))
    if method.needs_rule and rule is None:
        remedy = "pass a rule (--rule, a published name or a rule file), or choose by random, longest or lowest-ppl"
        raise RequestError(message(f"method {method.name}", "it needs a rule", remedy))
    if max_similarity is not None and not 0 < max_similarity <= 1:
        cause = "the cosine from which rows are near-duplicates lies above 0, and at 1 at most"
        raise RequestError(message(f"max_similarity={max_similarity}", cause, "give such as 0.9"))
    if method.by_tokens and budget_tokens is None:
        remedy = "pass --budget-tokens (budget_tokens=) or --match SUBSET, or use method random"
        raise RequestError(message(f"method {method.name}", "it is matched on tokens, and none are given", remedy))
    narrowed = (ranking is not None and ranking.narrows) or (method is BY and max_similarity is not None)
    if budget is None and budget_tokens is None and narrowed and not method.weighted:
        return
    if (budget is None) == (budget_tokens is None):
        cause = "there is none" if budget is None else "it is given in rows and in tokens"
        remedy = "pass one of --budget (budget=, rows) and --budget-tokens (budget_tokens=)"
        raise RequestError(message("the budget", cause, remedy))
    if budget_tokens is not None and budget_tokens < 1:
        raise RequestError(message(f"budget_tokens={budget_tokens}", "is less than one token", "give 1 or more"))


def _not_full(basket: Basket, method: str, eligible: int) -> RequestError:
    what = f"budget={basket.rows}" if basket.target is None else f"budget_tokens={basket.target}"
    have = f"{len(basket.taken)} rows" if basket.target is None else f"{basket.total} tokens"
    cause = f"of the {eligible} rows that can be chosen by {method} there are only {have} to take"
    remedy = "lower the budget, or add data"
    counts, target = basket.tokens, basket.target
    if counts is not None and basket.prompts is not None:
        counts = np.append(counts[basket.open(np.arange(len(counts)))], basket.total)
    if target is not None and counts is not None and counts.sum() >= (1 - TOLERANCE) * target:  # in rows too long
        cause = f"the rows taken by {method} hold {basket.total}, and each of the others would overshoot by more than"
        cause, remedy = f"{cause} {TOLERANCE:.0%}", "choose a larger budget, or another seed"
    if basket.over_quota:
        cause, remedy = (
            f"{cause} (of {len(basket.over_quota)} the quota is full)",
            f"{remedy}, or raise --quota (quota=)",
        )
    if basket.prompts is not None:
        cause, remedy = f"{cause}, one per prompt", f"{remedy}, or leave out --one-per-prompt (prompts=)"
    if basket.max_similarity is not None:
        cause += f" ({len(basket.duplicates)} rows are near-duplicates, cosine {basket.max_similarity} or more)"
        remedy += ", or raise max_similarity"
    return RequestError(message(what, cause, remedy))
