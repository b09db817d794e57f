"""Do two ways of running the same subsets rank them alike? Runs seen early and at their end; two base models.

The unit is the subset: the log losses of its repeats are averaged first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from im_lightning._utils.files import plain
from im_lightning.errors import RequestError, message
from im_lightning.ledger.curve import STOPPED, at_point, read_points, stopped_text
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.regime import run_names
from im_lightning.rule.validation.univariate import FEWEST, pearson, spearman_interval


@dataclass(frozen=True)
class RankAgreement:
    """How alike two measurements rank the same subsets.

    Args:
        subsets: How many.
        spearman: Rank correlation; NaN under three subsets, or where either measurement is constant.
        low, high: Its 95 % interval (`spearman_interval`); NaN under four subsets.
        pairs: Share of the pairs of subsets that both order alike, a tie counting half; NaN without a pair.
    """

    subsets: int
    spearman: float
    low: float
    high: float
    pairs: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not known is None, for JSON has no NaN."""
        return dict(plain(asdict(self)))

    def __str__(self) -> str:
        """`Spearman 0.93 (95 % interval 0.50 to 0.99) over 12 subsets, 88 % of their pairs ordered alike`."""
        over = f"over {self.subsets} subset{'s' if self.subsets != 1 else ''}"
        if math.isnan(self.spearman):
            return f"not known {over}"
        interval = f" (95 % interval {self.low:.2f} to {self.high:.2f})"
        if math.isnan(self.low):
            interval = f" (no interval: it takes {FEWEST} subsets)"
        return f"Spearman {self.spearman:.2f}{interval} {over}, {100 * self.pairs:.0f} % of their pairs ordered alike"


def rank_agreement(x: ArrayLike, y: ArrayLike) -> RankAgreement:
    """Agreement of two measurements of the same n subsets, [n] both.

    >>> str(rank_agreement([1, 2, 3, 4, 5], [1, 2, 3, 5, 4]))
    'Spearman 0.90 (95 % interval -0.17 to 1.00) over 5 subsets, 90 % of their pairs ordered alike'
    """
    from scipy.stats import rankdata

    a, b = (np.asarray(values, dtype=np.float64) for values in (x, y))
    rho = pearson(rankdata(a), rankdata(b)) if len(a) > 2 else math.nan
    orders = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in combinations(range(len(a)), 2)]
    pairs = float(np.mean(orders) + 1) / 2 if orders else math.nan
    return RankAgreement(len(a), rho, *spearman_interval(rho, len(a)), pairs)


def subset_losses(records: Iterable[RunRecord], evaluation: str) -> dict[str, float]:
    """Subset → mean log loss of its runs on an evaluation set, of those that have a loss there."""
    by_subset: dict[str, list[float]] = {}
    for record in records:
        if record.has_loss(evaluation):
            by_subset.setdefault(record.subset_key, []).append(math.log(record.loss(evaluation)))
    return {key: float(np.mean(losses)) for key, losses in by_subset.items()}


def agreement_of(one: Mapping[str, float], other: Mapping[str, float]) -> RankAgreement:
    """Agreement over the subsets that both have (subset → value)."""
    shared = [key for key in one if key in other]
    return rank_agreement([one[key] for key in shared], [other[key] for key in shared])


def seen_at(records: Sequence[RunRecord], point: float) -> list[RunRecord]:
    """The runs as they were at a point; complete ones without it are left out, others stay as they are.

    Raises:
        RequestError: `point` is none, or no complete designed run has it.
    """
    read_points("--at", point)
    seen = [(r if r.status != "complete" else at_point(r, point)) for r in records]
    kept = [r for r in seen if r is not None]
    if any(r.status == "complete" and r.purpose == "designed" for r in kept) or not records:
        return kept
    measured = {p["steps"] for r in records for p in r.curve.get("points", ())}
    measured |= {r.regime[STOPPED]["step"] for r in records if STOPPED in r.regime}
    steps = f"; there are points at the steps {', '.join(map(str, sorted(measured)))}" if measured else ""
    remedy = f"make runs that record it (--mining.eval_at={point:g}) or stop there (im-lightning sweep --stop-at)"
    raise RequestError(message(f"--at {point:g}", f"no complete designed run has this point{steps}", remedy))


def early_note(point: float, every: Sequence[RunRecord], used: Sequence[RunRecord], evaluation: str) -> str:
    """What a fit at an early point was made of, and how far that point agrees with the end.

    Args:
        point: As asked for.
        every: The ledger's runs, as they are.
        used: Those of the fit, as they were at the point.
        evaluation: The evaluation loss fitted.
    """
    whole = {r.run_id: r for r in every}
    full = [r for r in used if not stopped_text(whole[r.run_id])]
    without = [r for r in every if r.status == "complete" and r.purpose == "designed" and at_point(r, point) is None]
    ends = [whole[r.run_id] for r in full]
    left = f"; left out, without that point: {run_names(without)}" if without else ""
    counts = (
        f"{len(used) - len(full)} runs {stopped_text(used[0])}, {len(full)} full runs as their curves have them there"
    )
    found = agreement_of(subset_losses(full, evaluation), subset_losses(ends, evaluation))
    return f"Fitted at an early point ({point:g}): {counts}{left}. How it agrees with the full runs' ends: {found}."
