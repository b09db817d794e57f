"""Plans designed runs of a scored pool: which subset seeds to finetune on, and what a fit on them could tell.

Uses the data module's own functions for eligibility, regressors and draws, so that a planned subset is the one that a
run with its `subset_seed` trains on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from im_lightning._utils.progress import progress
from im_lightning.data.overlap.keys import Mask
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.rule.linear_rule import Regressors
from im_lightning.rule.validation.cross_validation import FEWEST_TESTS, HELD_OUT_SHARE, fewest_training
from im_lightning.rule.validation.diagnostics import constant_columns
from im_lightning.sampling.designs import d_optimal
from im_lightning.sampling.designs.subsets import DEFAULT_TILT, VERSION, DesignedSubset, DesignPool
from im_lightning.sampling.rows import Choice, weigh


@dataclass(frozen=True)
class DesignPlan:
    """Designed runs, planned."""

    labels: list[str]  # [p] the regressors, as tables write them
    pool_sd: np.ndarray  # float64 [p], sd of each regressor over the eligible rows
    eligible: int  # rows that may be drawn
    ineligible: dict[str, int]  # reason → rows left out
    # the different subsets, one per run that is no repeat; their `design["seed"]` is the `subset_seed`
    subsets: list[DesignedSubset]
    repeats: list[DesignedSubset]  # those of them that are made again with another training seed
    candidates: tuple[int, int]  # how many subsets there were to choose from, and the first seed of these
    quality: d_optimal.DesignQuality  # what a fit on these runs can tell
    gain: float  # how many times as many runs with seeds as they come would tell as much
    source_runs: dict[str, tuple[int, int]]  # source → (subsets without it, subsets of which it is at least half)
    without_quota: list[str]  # sources for which the runs are too few to test the rule on them unseen

    @property
    def runs(self) -> list[DesignedSubset]:
        """The subset of each run, repeats last."""
        return [*self.subsets, *self.repeats]


def plan_runs(
    table: ScoreTable,
    sources: Sequence[str],
    left_out: Mapping[str, Mask],
    runs: int,
    subset_size: int,
    repeats: int | None = None,
    candidates: int | None = None,
    first_seed: int = 0,
    subset_tilt: float = DEFAULT_TILT,
    subset_mixture: Mapping[str, float] | None = None,
) -> DesignPlan:
    """Chooses the subset seeds of designed runs.

    Args:
        table: Scores, in the pool's order, N rows.
        sources: N names.
        left_out: Reason → bool [N], rows that are never trained on (`data.overlap.keys.left_out`).
        runs: Runs to make.
        subset_size: Rows of each.
        repeats: How many of the runs repeat a subset with another training seed; by default `d_optimal.repeats_of`.
        candidates: Subsets to choose from; by default ten per run and at least 500.
        first_seed: Candidates are the subset seeds from this one on.
        subset_tilt, subset_mixture: As the data module's.

    Raises:
        RequestError: too few runs for the regressors; no eligible rows; no regressor that varies.
    """
    count = max(500, 10 * runs) if candidates is None else candidates
    if count < 1:
        raise RequestError(message(f"--candidates {count}", "there is nothing to choose from", "draw 500 or so"))
    mixture = None if subset_mixture is None else dict(subset_mixture)
    scored = Regressors.of(table, None)
    names, phi = scored.names, scored.phi
    repeats = d_optimal.repeats_of(runs, len(names)) if repeats is None else repeats
    made = weigh(Choice(subset_size=subset_size), len(table), left_out, scored)
    _refuse_too_few(runs, repeats, names)
    pool = DesignPool(phi, sources, made.eligible)
    drawn = []
    with progress("candidate subsets", count, "subsets") as bar:
        for k in range(count):
            drawn.append(pool.draw(subset_size, first_seed + k, mixture, subset_tilt, VERSION))
            bar.advance()
    means = np.array([d.design["mean_shift"] for d in drawn])
    means[:, constant_columns(phi[pool.rows])] = 0.0  # exactly: what rounding leaves there is no information
    shares = np.array([list(d.design["source_shares"].values()) for d in drawn])
    wishes = np.concatenate([shares == 0, shares >= HELD_OUT_SHARE], axis=1)
    least = (
        _source_quota(wishes, runs - repeats, len(names)) if mixture is None else np.zeros(wishes.shape[1], dtype=int)
    )
    chosen = d_optimal.d_optimal_runs(means, runs, repeats, wishes, least)
    at_random = d_optimal.random_log_det(means, runs, repeats)
    subsets = [drawn[at] for at in chosen.subsets]
    fulfilled = dict(
        zip(map(str, pool.names), wishes[chosen.subsets].sum(axis=0).reshape(2, -1).T.tolist(), strict=True)
    )
    return DesignPlan(
        labels=[scored.transforms[n].label(n) for n in names],
        pool_sd=phi[pool.rows].std(axis=0),
        eligible=len(pool.rows),
        ineligible=dict(made.report["ineligible"]),
        subsets=subsets,
        repeats=[drawn[at] for at in chosen.repeats],
        candidates=(count, first_seed),
        quality=d_optimal.design_quality(means[chosen.runs]),
        gain=d_optimal.relative_efficiency(chosen.log_det, at_random, int((means.std(axis=0) > 0).sum())),
        source_runs={name: (without, most) for name, (without, most) in fulfilled.items()},
        without_quota=[
            name
            for name, (without, most) in fulfilled.items()
            if without < fewest_training(len(names)) or most < FEWEST_TESTS
        ],
    )


def _source_quota(wishes: np.ndarray, subsets: int, regressors: int) -> np.ndarray:
    """How many subsets have to be without each source, and how many at least half of it: int [2 K].

    What a test on the unseen source needs; a subset is at least half of one source, so where there are too many sources
    for that those get a quota which most candidates serve.
    """
    train, test = fewest_training(regressors), FEWEST_TESTS
    sources = wishes.shape[1] // 2
    least = np.zeros(2 * sources, dtype=np.int64)
    possible = (wishes[:, :sources].sum(axis=0) >= train) & (wishes[:, sources:].sum(axis=0) >= test)
    for source in np.argsort(-wishes[:, sources:].sum(axis=0), kind="stable"):
        if (
            possible[source]
            and sources > 1
            and 2 * train <= subsets
            and 4 * (least[sources:].sum() + test) <= 3 * subsets
        ):
            least[[source, sources + source]] = train, test
    return least


def _refuse_too_few(runs: int, repeats: int, names: Sequence[str]) -> None:
    least = len(names) + 3
    if runs - repeats < least:
        cause = f"{runs - repeats} different subsets are too few for {len(names)} regressors ({', '.join(names)})"
        remedy = f"make {least + repeats} runs or more; 5 per regressor is a good start"
        raise RequestError(message(f"--runs {runs}", cause, remedy))
