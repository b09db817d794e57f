"""The ways to evidence: what each buys for a budget, its rule, and what that predicts of held-out runs.

All rules are fitted by `fit_rule` with method "auto" on the five indicators of the text, unless another is named.
Runs of cheaper kinds end at other losses: their rules' predictions are moved by the mean by which full runs on the
base, a third of the budget and at most twelve, end elsewhere. Merged runs are moved by their twins (`rule.kinds`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.evidence.budget import Prices, affordable, anchors, flops, merged_plan
from benchmarks.evidence.playground import PER_ROW, POINTS, Playground
from benchmarks.evidence.quality import Floats
from im_lightning._utils.hashing import digest_json
from im_lightning.errors import RequestError
from im_lightning.experiments.transfer.result import Runs
from im_lightning.ledger.record import RunRecord
from im_lightning.models.cost import Cost, total
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule

REFERENCE = "full runs"


class World(Protocol):
    """Runs that were made once and are then bought from, and what they cost.

    Args:
        out: Folder of the rules.
        evaluation: What rules predict.
        indicators: Of the text; every way has them.
        designed: Full runs that ways buy from; `tests`: those that the rules of all ways are tested on.
        prices: In full runs; `mean_flops`: operations of a full run.
        run_seconds: (base or small, point of the stop) → processor seconds of a run.
    """

    @property
    def out(self) -> Path: ...
    @property
    def evaluation(self) -> str: ...
    @property
    def indicators(self) -> Sequence[str]: ...
    @property
    def designed(self) -> list[RunRecord]: ...
    @property
    def tests(self) -> list[RunRecord]: ...
    @property
    def prices(self) -> Prices: ...
    @property
    def mean_flops(self) -> float: ...
    @property
    def run_seconds(self) -> dict[tuple[str, float | None], float]: ...
    def scoring(self, name: str) -> Cost:
        """What an indicator of rows cost."""


@dataclass(frozen=True)
class Bought:
    """What a way made of a budget.

    Args:
        what: In words.
        cost: Of it all, without what every way needs (the scores of the text's indicators).
        evaluation: What is predicted.
        rule: Where there is one.
        path: Its file.
        anchors: Full runs on the base that say where losses end; none where the rule's own runs do.
        ranked_by: Indicator whose mean ranks datasets, where there is no rule.
        why: Why there is neither.
        agreement: Spearman of merged runs with their twins.
    """

    what: str
    cost: Cost
    evaluation: str = ""
    rule: LinearRule | None = None
    path: Path | None = None
    anchors: Sequence[RunRecord] = ()
    ranked_by: str = ""
    why: str = ""
    agreement: float | None = None

    def predictions(self, records: Sequence[RunRecord]) -> Floats | None:
        """Predicted log losses of n runs, float64 [n]; of a ranking by an indicator its means, sign reversed."""
        if self.ranked_by:
            return -np.array([r.phi_means[self.ranked_by] for r in records])
        if self.rule is None:
            return None
        level = 0.0
        if self.anchors:
            ends = log_losses(self.anchors, self.evaluation)
            level = float(np.mean(ends - predicted(self.rule, self.anchors)))
        return predicted(self.rule, records) + level


def log_losses(records: Sequence[RunRecord], evaluation: str) -> Floats:
    """float64 [n]."""
    return np.log([r.loss(evaluation) for r in records])


def predicted(rule: LinearRule, records: Sequence[RunRecord]) -> Floats:
    """A rule's log losses of n runs, from what they were trained on."""
    found = Runs(records, {}).predicted(rule)
    return np.array([found[r.subset_key] for r in records])


def full(world: World, budget: float) -> Bought:
    """Fewer full runs."""
    runs = world.designed[: affordable(budget, 1.0, most=len(world.designed))]
    return fitted(world, f"{len(runs)} full", _full_cost(world, runs), runs)


def short(point: float, name: str | None, world: World, budget: float) -> Bought:
    """Runs stopped early, some of which go on to the end; beside an indicator of rows, what that leaves."""
    scores = Cost() if name is None else world.scoring(name)
    budget -= scores.flops / world.mean_flops
    if budget < 1:
        return Bought("", Cost(), why="its scores alone cost more")
    k = anchors(budget)
    n = k + affordable(budget, world.prices.stopped(point), k, len(world.designed) - k)
    ends, rest = world.designed[:k], world.designed[k:n]
    stops = Cost(sum(flops(r, point) for r in rest), world.run_seconds["base", point] * len(rest))
    what = f"{'scores, ' if name else ''}{k} full, {len(rest)} stopped at {point:g}"
    indicators = [*world.indicators, *([name] if name else [])]
    cost = scores + _full_cost(world, ends) + stops
    return fitted(world, what, cost, world.designed[:n], ends, at=point, indicators=indicators)


def smaller(point: float | None, world: Playground, budget: float) -> Bought:
    """Runs on the smaller base, to the end or stopped early, and some on the base."""
    k, prices = anchors(budget), world.prices
    price = prices.small * (1.0 if point is None else prices.stopped(point))
    n = affordable(budget, price, k, len(world.smaller))
    ends, runs = world.designed[:k], world.smaller[:n]
    cost = Cost(sum(flops(r, point) for r in runs), world.run_seconds["small", point] * n)
    what = f"{k} full, {n} small" + ("" if point is None else f", stopped at {point:g}")
    return fitted(world, what, _full_cost(world, ends) + cost, runs, ends, at=point)


def merged(world: Playground, budget: float) -> Bought:
    """Small blocks, their mixtures, and twins."""
    rows = world.sizes.block_rows / world.settings.subset_rows
    plan = merged_plan(budget, world.prices, rows, world.settings.runs)
    if plan is None:
        return Bought("", Cost(), why="blocks and twins alone cost more")
    blocks, twins, mixed = world.merged(plan)
    cost = Cost(sum(flops(r) for r in (*blocks, *twins, *mixed)), world.seconds[world.merged_name(plan)])
    what = f"{plan.blocks} blocks, {plan.twins} twins, {plan.mixtures} mixtures"
    return fitted(world, what, cost, [*twins, *mixed])


def per_row(name: str, alone: bool, world: World, budget: float) -> Bought:
    """An indicator of rows, alone or beside the others, and as many full runs as it leaves; where that is too few for a
    rule, its mean ranks. One of the text, which every way has, costs nothing more."""
    cost = world.scoring(name) if name in PER_ROW else Cost()
    price = cost.flops / world.mean_flops
    if price > budget:
        return Bought("", Cost(), why="its scores alone cost more")
    runs = world.designed[: affordable(budget, 1.0, price, len(world.designed))]
    what = f"scores, {len(runs)} full" if name in PER_ROW else f"{len(runs)} full"
    if alone and len(runs) <= 3 and name in PER_ROW:  # a rule of one regressor takes four
        return Bought(what if runs else "scores", cost + _full_cost(world, runs), world.evaluation, ranked_by=name)
    indicators = [name] if alone else [*world.indicators, name]
    return fitted(world, what, cost + _full_cost(world, runs), runs, indicators=indicators)


WAYS: dict[str, Callable[[Any, float], Bought]] = {
    REFERENCE: full,
    "full runs, ppl alone": partial(per_row, "ppl", True),
    **{f"stopped at {point:g}": partial(short, point, None) for point in POINTS},
    "smaller base": partial(smaller, None),
    "smaller base, stopped at 0.2": partial(smaller, 0.2),
    "merged runs": merged,
    **{f"{name} alone": partial(per_row, name, True) for name in PER_ROW},
    **{f"with {name}": partial(per_row, name, False) for name in PER_ROW},
    **{f"stopped at 0.2, with {name}": partial(short, 0.2, name) for name in PER_ROW},
}
"""Name → what it makes of a world and a budget in full runs; some need the whole playground."""
FINETUNED = (
    *(REFERENCE, "stopped at 0.2", "smaller base", "merged runs"),
    *(how.format(name) for how in ("{} alone", "with {}", "stopped at 0.2, with {}") for name in PER_ROW),
)
"""The ways by whose weights rows are drawn and finetuned on."""


def _full_cost(world: World, runs: Sequence[RunRecord]) -> Cost:
    return total(Cost(flops(r), world.run_seconds["base", None]) for r in runs)


def fitted(
    world: World,
    what: str,
    cost: Cost,
    runs: Sequence[RunRecord],
    ends: Sequence[RunRecord] = (),
    at: float | None = None,
    indicators: Sequence[str] | None = None,
) -> Bought:
    """With the rule of these runs, kept by what decides it; without one where a fit refuses them."""
    names = list(indicators or world.indicators)
    path = world.out / "rules" / f"{digest_json([[r.run_id for r in runs], at, names])}.json"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        options: dict[str, Any] = {"method": "auto", "evaluation": world.evaluation, "permutations": 0, "bootstrap": 0}
        try:
            fit_rule(runs, indicators=names, at=at, name=what, **options).save(path)
        except RequestError as error:
            return Bought(what, cost, why=str(error).partition(". Fix: ")[0].removeprefix("refit: "))
    rule = LinearRule.load(path)
    return Bought(what, cost, world.evaluation, rule, path, ends, agreement=rule.metrics_.kinds.get("spearman"))
