"""The ways to evidence: what each costs, and how well it ranked unseen runs. Another way is another row of `WAYS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from im_lightning.ledger.curve import STOPPED
from im_lightning.ledger.record import MERGED, RunRecord
from im_lightning.models.cost import Cost
from im_lightning.sampling.designs.blocks import BLOCKS, TWINS


@dataclass(frozen=True)
class Workload:
    """What the parts of a plan cost.

    Args:
        rows: Of the pool.
        runs: Designed runs.
        trained: A row once through forward and backward pass.
        read: A row through a forward pass.
        run: One full run, with its evaluation.
        evaluated: An evaluation of one.
        scored: Scoring a row of the pool.
        epochs: Of the finetune that all is for.
    """

    rows: int
    runs: int
    trained: Cost
    read: Cost
    run: Cost
    evaluated: Cost
    scored: Cost
    epochs: int = 1

    @property
    def row(self) -> Cost:
        """A row in the finetune that all is for."""
        return self.trained * self.epochs

    @property
    def everything(self) -> Cost:
        """That finetune, on all rows."""
        return self.row * self.rows


@dataclass(frozen=True)
class Way:
    """A way to evidence, by what it costs.

    Args:
        title: What is made besides scores.
        once: Whatever the pool's size.
        per_row: Of the pool.
        ranks: Spearman of its rule's predictions with sixty unseen full runs on the demo's pool, mean of five generator
            seeds (docs/cost.md): by all of sixty such runs, or what sixty full runs' compute buys of them.
    """

    title: str
    once: Callable[[Workload], Cost]
    per_row: Callable[[Workload], Cost]
    ranks: float = math.nan

    def cost(self, work: Workload) -> Cost:
        """In all."""
        return self.once(work) + self.per_row(work) * work.rows

    def needed(self, work: Workload, budget: float, unit: str) -> float:
        """Times the random rows that chosen rows must be worth to repay it within a budget; inf where none would do."""
        left = 1 - getattr(self.cost(work), unit) / budget
        return math.nan if math.isnan(left) else 1 / left if left > 0 else math.inf

    def pays_above(self, work: Workload, worth: float, unit: str) -> float:
        """Rows of the pool from which it is cheaper than training on everything, for the same loss; inf for none."""
        once, per_row, row = (getattr(c, unit) for c in (self.once(work), self.per_row(work), work.row))
        saved = row * (1 - 1 / worth) - per_row
        return math.nan if math.isnan(saved + once) else once / saved if saved > 1e-9 * row else math.inf


SMALLER, LEVELS = 0.1, 4
"""Of a smaller base's runs: its share of the parameters, and the full runs that set the level of the losses."""
FULL = Way("full runs", lambda w: w.run * w.runs, lambda w: w.scored, 0.96)
SMALL = Way(
    f"runs on a base of a tenth, {LEVELS} full",
    lambda w: w.run * (SMALLER * w.runs) + w.run * LEVELS,
    lambda w: w.scored,
    0.93,
)
SHORT = Way("runs stopped at a fifth", lambda w: (w.run * 0.2 + w.evaluated * 0.8) * w.runs, lambda w: w.scored, 0.88)
MERGED_RUNS = Way(
    f"merged runs ({BLOCKS} blocks, {TWINS} twins)",
    lambda w: w.run * (BLOCKS + TWINS) + w.evaluated * w.runs,
    lambda w: w.scored,
    0.72,
)
PER_ROW = Way("full runs, a gradient per row", FULL.once, lambda w: w.read + w.trained, 0.96)
WAYS = (FULL, SMALL, SHORT, MERGED_RUNS, PER_ROW)


def way_of(records: Sequence[RunRecord]) -> Way:
    """The way in which a ledger's designed runs were made."""
    designed = [r for r in records if r.purpose == "designed"]
    if any(r.kind == MERGED for r in designed):
        return MERGED_RUNS
    return SHORT if any(STOPPED in r.regime for r in designed) else FULL
