"""Which rows a run trains on: eligibility, weights, the fixed subset. Pure functions of table, rule and options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from im_lightning._utils.rng import SUBSET_DRAW, generator
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.indicators.hat_basis import pool_knots
from im_lightning.indicators.transforms import Transform, default_regressors, default_transforms, phi_matrix
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.designs.subsets import designed_subset
from im_lightning.sampling.draws.systematic import checked_weights, systematic_sample
from im_lightning.sampling.weights.quality_weights import quality_weights


@dataclass(frozen=True)
class Choice:
    """The options that decide which rows a run trains on; the data module's arguments of the same names.

    With `subset_size` the run is a designed one, whatever else a recipe says: see `settled`.
    """

    rule: str | None
    budget: int | None
    weighting: str
    strength: float
    temperature: float
    floor: float
    resample_each_epoch: bool
    replacement: bool
    subset_size: int | None
    subset_seed: int | None
    subset_mixture: dict[str, float] | None
    subset_tilt: float
    seed: int

    def __post_init__(self) -> None:
        if not self.designed and (self.subset_seed is not None or self.subset_mixture is not None):
            raise RequestError(message("subset_seed", "there is no subset_size to draw", "pass subset_size= as well"))
        for name in ("budget", "subset_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(message(name, f"it is {value}", "give at least one row, or leave it out"))

    def settled(self) -> Choice:
        """The options that count: under a designed run rule, budget and ways of drawing are left aside."""
        if not self.designed:
            return self
        return replace(self, rule=None, budget=None, resample_each_epoch=False, replacement=False)

    @property
    def designed(self) -> bool:
        """Whether the rows are a designed subset, made for a fit of a rule."""
        return self.subset_size is not None

    @property
    def uniform(self) -> bool:
        """Whether all eligible rows weigh the same."""
        return self.weighting == "uniform" or self.rule is None

    @property
    def weighting_inputs(self) -> dict[str, Any]:
        """What the weights of the pool depend on; a designed subset has none."""
        if self.designed:
            return {"method": "designed"}
        if self.uniform:
            return {"method": "uniform"}
        names = ("weighting", "strength", "temperature", "floor", "budget")
        return {name: getattr(self, name) for name in names}

    @property
    def draw_inputs(self) -> dict[str, Any]:
        """What the rows depend on besides the weights."""
        if self.designed:
            seed = self.seed if self.subset_seed is None else self.subset_seed
            return {
                "kind": "designed", "size": self.subset_size, "subset_seed": seed, "mixture": self.subset_mixture,
                "tilt": self.subset_tilt,
            }  # fmt: skip
        kind = "all" if self.budget is None else "each epoch" if self.every_epoch else "fixed"
        return {"kind": kind, "rows": self.budget, "seed": self.seed, "replacement": self.replacement}

    @property
    def every_epoch(self) -> bool:
        return self.resample_each_epoch or self.replacement


def regressors(table: ScoreTable, rule: LinearRule | None) -> dict[str, Transform]:
    """φ of every indicator of the table: the rule's own where it has one, else the defaults on this pool."""
    known = {} if rule is None else {n: t for n, t in rule.indicator_transforms.items() if n in table.indicators}
    rest = [name for name in table.indicators if name not in known]
    return {**known, **default_transforms(table, rest)}


def knots(table: ScoreTable, transforms: Mapping[str, Transform], rule: LinearRule | None) -> dict[str, list[float]]:
    """Knots of every indicator's hats: an additive rule's own, else quantiles of this pool."""
    known = {} if rule is None else rule.knots
    return {**pool_knots(table, {n: t for n, t in transforms.items() if n not in known}), **known}


def used_regressors(table: ScoreTable, rule: LinearRule | None) -> list[str]:
    """The regressors a run is about: the rule's, else the paper's where present, else all of the table."""
    if rule is not None:
        return list(rule.feature_names_in_)
    return default_regressors(table.indicators) or list(table.indicators)


def used_phi(table: ScoreTable, rule: LinearRule | None) -> tuple[list[str], np.ndarray]:
    """The p indicators of `used_regressors` and their φ, float64 [N, p]; a row that lacks one is all NaN."""
    names = used_regressors(table, rule)
    if rule is None:
        return names, phi_matrix(table, default_transforms(table, names))
    return names, rule.phi(table)


@dataclass(frozen=True)
class Weighted:
    """weights float64 [N] (0 for ineligible rows), eligible bool [N], report JSON-like."""

    weights: np.ndarray
    eligible: np.ndarray
    report: dict[str, Any]


def weigh(
    choice: Choice, ids: Sequence[str], evaluation_ids: set[str], table: ScoreTable | None, rule: LinearRule | None
) -> Weighted:
    """Eligibility and weights of the pool.

    Rows whose id is in an evaluation set are ineligible, and so are rows without a prediction (given a rule, also
    under uniform weights) or without regressors (for a designed subset); all are counted in the report.

    Raises:
        RequestError: no eligible row; a weighted draw without replacement of the whole pool, which has no effect.
    """
    n = len(ids)
    allowed = np.array([i not in evaluation_ids for i in ids], dtype=bool)
    excluded: dict[str, int] = {"in_evaluation": int((~allowed).sum())}
    known = np.ones(n, dtype=bool)
    if table is not None and (choice.designed or rule is not None):
        known = ~np.isnan(used_phi(table, rule)[1]).any(axis=1)
    excluded["no_prediction"] = int((allowed & ~known).sum())
    eligible = allowed & known
    rows = int(eligible.sum())
    if not rows:
        cause = f"none of its {n} rows is eligible ({excluded['in_evaluation']} are in an evaluation set, "
        cause += f"{excluded['no_prediction']} lack an indicator)"
        raise RequestError(message("the pool", cause, "add data, or score what is missing"))
    _refuse_without_effect(choice, rows)
    if choice.designed or choice.uniform or table is None:
        method = "designed" if choice.designed else "uniform"
        report: dict[str, Any] = {"method": method, "rows": n, "eligible": rows, "ineligible": excluded}
        return Weighted(eligible / rows, eligible, report)
    made = quality_weights(
        table, rule, choice.weighting, choice.strength, choice.temperature, choice.floor,
        None if choice.replacement else choice.budget, allowed,
    )  # fmt: skip
    return Weighted(made.weights, eligible, {**made.report, "ineligible": excluded})


def _refuse_without_effect(choice: Choice, rows: int) -> None:
    if choice.designed or choice.replacement:
        return
    if choice.budget is not None and choice.budget > rows:
        cause = f"the pool has only {rows} eligible rows, and none is drawn twice"
        raise RequestError(
            message(f"budget={choice.budget}", cause, f"pass budget={rows} or less, or replacement=True")
        )
    if choice.uniform or (choice.budget is not None and choice.budget < rows):
        return
    what = "no budget" if choice.budget is None else f"budget={choice.budget}"
    cause = f"all {rows} eligible rows would be drawn once each, so the weights would have no effect"
    remedy = f"pass budget= (rows per epoch, fewer than {rows}), or replacement=True"
    raise RequestError(message(f"weighting {choice.weighting} with {what}", cause, remedy))


@dataclass(frozen=True)
class Drawn:
    """A fixed subset: rows int64 [n], and how they came about (JSON-like)."""

    rows: np.ndarray
    design: dict[str, Any]


def draw_subset(
    choice: Choice,
    weights: np.ndarray,
    eligible: np.ndarray,
    table: ScoreTable | None,
    rule: LinearRule | None,
    sources: Sequence[str],
) -> Drawn | None:
    """The fixed subset of a run, in the order drawn; None where every epoch draws anew or all rows are used.

    Args:
        choice: The options.
        weights: float64 [N].
        eligible: bool [N].
        table: Scores, for a designed subset.
        rule: Whose φ a designed subset is tilted along, if there is one.
        sources: N names.

    Raises:
        RequestError: a designed subset of a pool that was not scored, or one larger than the pool.
    """
    kind = choice.draw_inputs["kind"]
    if kind == "designed":
        if table is None:
            remedy = "pass indicators= or scores="
            raise RequestError(message("subset_size", "a designed subset is tilted along indicators", remedy))
        names, phi = used_phi(table, rule)
        drawn = designed_subset(
            phi, sources, int(choice.subset_size or 0), int(choice.draw_inputs["subset_seed"]), choice.subset_mixture,
            choice.subset_tilt, eligible,
        )  # fmt: skip
        return Drawn(np.asarray(drawn.rows, dtype=np.int64), {**drawn.design, "indicators": names})
    if kind == "fixed":
        rng = generator(choice.seed, purpose=SUBSET_DRAW)
        rows = systematic_sample(checked_weights(weights), int(choice.budget or 0), rng)
        return Drawn(rows, {"kind": "fixed", "seed": choice.seed})
    return None


def source_shares(sources: Sequence[str], exposures: np.ndarray) -> dict[str, float]:
    """Share of each source among what was trained on; exposures [N]."""
    total = float(exposures.sum())
    shares: dict[str, float] = {}
    for row in np.flatnonzero(exposures).tolist():
        shares[sources[row]] = shares.get(sources[row], 0.0) + float(exposures[row])
    return {name: value / total for name, value in sorted(shares.items())} if total else {}
