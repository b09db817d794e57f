"""Plans merged runs: blocks of rows to finetune on once, and the mixtures of them to evaluate and, some, to train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from im_lightning.data.overlap.keys import Mask
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.rule.linear_rule import Regressors
from im_lightning.sampling.designs import d_optimal
from im_lightning.sampling.designs.blocks import (
    BLOCKS,
    TWINS,
    Blocks,
    MergedSettings,
    candidate_mixtures,
    designed_blocks,
)
from im_lightning.sampling.rows import Choice, weigh

LEAN = 1.5
"""How much further blocks lean than designed subsets do, since mixtures lie between their blocks."""


@dataclass(frozen=True)
class MergedPlan:
    """Merged runs, planned."""

    blocks: Blocks
    labels: list[str]  # [p] the regressors, as tables write them
    pool_sd: np.ndarray  # float64 [p], sd of each regressor over the eligible rows
    eligible: int  # rows that may be drawn
    ineligible: dict[str, int]  # reason → rows left out
    spread: np.ndarray  # float64 [p], sd of the means of the blocks, in pool sd
    quality: d_optimal.DesignQuality  # of the mixtures' means
    gain: float = math.nan  # not known: there is no design of merged runs at random
    source_runs: dict[str, tuple[int, int]] = field(default_factory=dict)  # mixtures leave no source out on purpose
    without_quota: list[str] = field(default_factory=list)


def plan_merged(
    table: ScoreTable,
    sources: Sequence[str],
    left_out: Mapping[str, Mask],
    runs: int,
    subset_size: int,
    settings: MergedSettings,
    candidates: int | None = None,
    first_seed: int = 0,
    subset_tilt: float = 1.0,
) -> MergedPlan:
    """Chooses blocks and mixtures, for the most informative fit.

    Args:
        table: Scores, in the pool's order, N rows.
        sources: N names.
        left_out: Reason → bool [N], rows that are never trained on.
        runs: Mixtures to evaluate.
        subset_size: Rows of the run that a mixture stands for.
        settings: Blocks, their size, twins.
        candidates: Mixtures to choose from; by default ten per run and at least 500.
        first_seed: Another one gives other blocks and mixtures.
        subset_tilt: Of designed runs; blocks lean `LEAN` times as far.

    Raises:
        RequestError: too few blocks for the regressors, or too few rows for the blocks; numbers that do not fit.
    """
    scored = Regressors.of(table, None)
    count, twins = settings.blocks or BLOCKS, TWINS if settings.twins is None else settings.twins
    block_size = settings.block_size or subset_size
    _refuse(runs, count, twins, scored.names)
    made = weigh(Choice(subset_size=subset_size), len(table), left_out, scored)
    eligible = int(made.eligible.sum())
    # a block has more rows than it is trained on, for twins to draw others from, as far as half of the pool allows
    size = max(block_size, min(2 * subset_size, eligible // (2 * count)))
    if count * size < subset_size:
        cause = f"{count} blocks of {size:,} rows are fewer than the {subset_size:,} rows of a run"
        raise RequestError(message("--block-size", cause, "make the blocks larger, more of them, or smaller runs"))
    tilt = LEAN * subset_tilt
    rows, means = designed_blocks(scored.phi, sources, made.eligible, count, size, tilt, first_seed)
    shares = candidate_mixtures([size] * count, subset_size, candidates or max(500, 10 * runs), first_seed)
    points = shares @ means
    chosen = d_optimal.d_optimal_runs(points, runs).subsets
    first = chosen[d_optimal.d_optimal_runs(points[chosen], twins).subsets] if twins else chosen[:0]
    order = [*first, *(one for one in chosen if one not in set(first.tolist()))]
    names = [f"b{k:02d}" for k in range(count)]
    mixtures = [{n: float(a) for n, a in zip(names, shares[k], strict=True) if a > 0} for k in order]
    held = dict(zip(names, (one.tolist() for one in rows), strict=True))
    pool = scored.phi[made.eligible]
    return MergedPlan(
        blocks=Blocks(table.pool_digest, held, block_size, subset_size, mixtures, twins),
        labels=[scored.transforms[n].label(n) for n in scored.names],
        pool_sd=pool.std(axis=0),
        eligible=eligible,
        ineligible=dict(made.report["ineligible"]),
        spread=means.std(axis=0, ddof=1),
        quality=d_optimal.design_quality(points[order]),
    )


def _refuse(runs: int, blocks: int, twins: int, names: Sequence[str]) -> None:
    least = len(names) + 3
    if blocks < least:
        cause = f"{blocks} blocks are too few for {len(names)} regressors ({', '.join(names)})"
        remedy = f"make {least} blocks or more: they tell as much as so many runs, whatever their mixtures"
        raise RequestError(message("--blocks", cause, remedy))
    if runs < least:
        cause = f"{runs} mixtures are too few for {len(names)} regressors ({', '.join(names)})"
        raise RequestError(message(f"--runs {runs}", cause, f"evaluate {least} mixtures or more"))
    if not 0 <= twins <= runs:
        remedy = f"give 0 to {runs}; a refit needs 4 or more to take merged runs at all, and 12 say something"
        raise RequestError(message(f"--twins {twins}", f"there are {runs} merged runs to have one", remedy))
