"""The coverage report: per indicator what was scored, what is missing and why, what was cut, and how long it took."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from im_lightning.indicators.base import Scores
from im_lightning.scoring.columns import DistinctPool, Work


@dataclass(frozen=True)
class Covered:
    """One indicator over a pool: rows with a value, those without one by reason, those whose value holds with a
    reservation ("response cut"), and the distinct examples computed now; the others came from the store.
    """

    name: str
    scored: int
    missing: dict[str, int]
    notes: dict[str, int]
    computed: int


@dataclass(frozen=True)
class Step:
    """A pass over the examples or the pool: what it computed, seconds, tokens that went through its model, the share
    of the machine's matmul rate that its useful work reached, where that was measured, and its operations, NaN where
    they are not known.
    """

    label: str
    seconds: float
    tokens: int
    share: float | None = None
    flops: float = 0.0


@dataclass
class Coverage:
    """What a scoring did; `lines` tells it."""

    pool: DistinctPool
    columns: list[Covered] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def add_step(
        self, label: str, seconds: float, tokens: int = 0, share: float | None = None, flops: float = 0.0
    ) -> None:
        self.steps.append(Step(label, seconds, tokens, share, flops))

    def add_column(self, name: str, scores: Scores, work: Work | None) -> None:
        repeats = self.pool.counts()
        missing: Counter[str] = Counter()
        for position in np.flatnonzero(np.isnan(scores.values)):
            missing[scores.reasons[position] or "no reason was recorded"] += int(repeats[position])
        notes: Counter[str] = Counter()
        if scores.notes.count(None) < len(scores.notes):
            for at, note in enumerate(scores.notes):
                if note is not None:
                    notes[note] += int(repeats[at])
        scored = len(self.pool.codes) - sum(missing.values())
        computed = work.computed if work is not None else 0
        self.columns.append(Covered(name, scored, dict(missing.most_common()), dict(notes.most_common()), computed))

    def lines(self) -> list[str]:
        """The report for a person, a line per indicator and pass."""
        n, distinct = len(self.pool.codes), len(self.pool)
        head = f"{n:,} rows" + (f" ({distinct:,} distinct)" if distinct < n else "")
        lines = [f"coverage of {head}:"]
        for c in self.columns:
            parts = [f"{c.scored:,} scored"]
            if c.missing:
                why = ", ".join(f"{reason}: {rows:,}" for reason, rows in c.missing.items())
                parts.append(f"{sum(c.missing.values()):,} missing ({why})")
            if c.notes:
                parts.append(", ".join(f"{note}: {rows:,}" for note, rows in c.notes.items()))
            if c.computed:
                parts.append(f"{c.computed:,} computed now")
            lines.append(f"  {c.name}: {'; '.join(parts)}")
        for s in self.steps:
            rate = f", {s.tokens:,} tokens, {s.tokens / s.seconds:,.0f}/s" if s.tokens and s.seconds else ""
            if s.share is not None and s.share <= 1.0:  # above, other work slowed the measurement
                rate += f", {s.share:.0%} of the measured matmul rate"
            lines.append(f"  computing {s.label}: {s.seconds:,.1f} s{rate}")
        if not self.steps:
            lines.append("  everything was in the store; no model was loaded")
        return lines
