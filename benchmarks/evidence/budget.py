"""What a budget buys: numbers of runs of every kind, from what each costs in full runs of the base.

A full run finetunes on n rows in one epoch, T tokens of them, and reads the E tokens of its evaluation rows once:
3T + E forward passes of a token. Budgets are numbers of full runs: a fifth of sixty are twelve.
"""

from __future__ import annotations

from dataclasses import dataclass

from im_lightning.ledger.curve import at_point
from im_lightning.ledger.record import RunRecord
from im_lightning.models.cost import operations

SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)
ANCHORS, TWINS, BLOCKS = 12, (4, 12), (8, 16)
"""Of anchors the most; of twins the fewest and the most; of blocks those of a small budget (five regressors + 3, the
fewest) and of a larger one."""
SCALE_PASSES = 8
"""Evaluations of every twin's mixture that finding the scale of merged updates is reckoned to take."""


def affordable(budget: float, price: float, fixed: float = 0.0, most: int | None = None) -> int:
    """How many things of a price the budget buys beside what is fixed; all in full runs.

    >>> affordable(12, 1.0), affordable(12, 0.31, fixed=4), affordable(3, 1.0, fixed=5), affordable(60, 0.1, most=60)
    (12, 25, 0, 60)
    """
    count = max(0, int((budget - fixed) / price + 1e-9))
    return count if most is None else min(count, most)


def anchors(budget: float) -> int:
    """Full runs on the real base to the end, which say at what level the losses of cheaper runs end: a third of the
    budget, from 1 to 12.

    >>> [anchors(budget) for budget in (3, 6, 12, 30, 60)]
    [1, 2, 4, 10, 12]
    """
    return max(1, min(ANCHORS, int(budget / 3 + 1e-9)))


@dataclass(frozen=True)
class Prices:
    """What things cost, in full runs.

    Args:
        trained: Tokens that a full run trains on, T.
        read: Tokens of its evaluation, E.
        steps: Its optimiser steps.
        small: Parameters of the smaller base over those of the base.
    """

    trained: float
    read: float
    steps: int
    small: float = 1.0

    @property
    def look(self) -> float:
        """An evaluation alone."""
        return self.read / (3 * self.trained + self.read)

    def run(self, rows: float = 1.0) -> float:
        """A run of a share of the rows, evaluated once at its end.

        >>> Prices(trained=256, read=120, steps=32).run(), round(Prices(256, 120, 32).run(0.25), 3)
        (1.0, 0.351)
        """
        return (3 * rows * self.trained + self.read) / (3 * self.trained + self.read)

    def stopped(self, point: float) -> float:
        """A run stopped at a share of its steps, evaluated once there."""
        return self.run(max(1, round(point * self.steps)) / self.steps)


@dataclass(frozen=True)
class MergedPlan:
    """Numbers of merged runs: blocks, twins, mixtures that are evaluated."""

    blocks: int
    twins: int
    mixtures: int


def merged_plan(budget: float, prices: Prices, block_rows: float, most: int) -> MergedPlan | None:
    """What a budget buys of merged runs; None where it does not even buy as many mixtures as twins or regressors + 3.

    Args:
        budget: In full runs.
        prices: Of runs and evaluations.
        block_rows: Rows of a block over those of a run.
        most: Mixtures at most.
    """
    twins = max(TWINS[0], min(TWINS[1], int(budget / 3 + 1e-9)))
    blocks = BLOCKS[0] if twins == TWINS[0] else BLOCKS[1]
    fixed = blocks * prices.run(block_rows) + twins
    fixed += SCALE_PASSES * twins * prices.look if block_rows != 1 else 0.0
    mixtures = affordable(budget, prices.look, fixed, most)
    return MergedPlan(blocks, twins, mixtures) if mixtures >= max(twins, BLOCKS[0]) else None


def flops(record: RunRecord, point: float | None = None) -> float:
    """Operations of a run, evaluated once, at its end or at a point where it would have been stopped; what looking at
    its curve took is left out."""
    looks = len(record.curve.get("points", ())) + 1
    seen = record if point is None else at_point(record, point)
    if seen is None:
        raise ValueError(f"run {record.run_id} has no point {point}")
    c = record.compute
    return operations(c["parameters"], read=c["tokens_evaluated"] / looks, trained=seen.compute["tokens_trained"])
