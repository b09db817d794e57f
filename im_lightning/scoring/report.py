"""The coverage report: per indicator what was scored, what is missing and why, what was cut, and how long it took.

Seconds and operations per pass are also noted in a file beside the table, over all calls that wrote it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from im_lightning._utils.files import parse_json, plain, write_json
from im_lightning.indicators.base import Scores
from im_lightning.models.cost import Cost, total
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


def cost_path(table: str | Path) -> Path:
    """`scores.parquet` → `scores.parquet.cost.json`."""
    return Path(f"{table}.cost.json")


def note_cost(table: str | Path, steps: Iterable[Step]) -> None:
    """Adds the passes of one scoring to the file beside the table; one that found everything in the store adds none."""
    known = _read(table)
    for step in steps:
        known[step.label] = known.get(step.label, Cost()) + Cost(step.flops, step.seconds)
    seconds = {label: round(cost.seconds, 3) for label, cost in known.items()}
    write_json(cost_path(table), plain({"seconds": seconds, "flops": {n: cost.flops for n, cost in known.items()}}))


def read_cost(table: str | Path) -> Cost | None:
    """What scoring took in all; None where nothing was noted. Notes of earlier versions have seconds alone."""
    known = _read(table)
    return total(known.values()) if known else None


def _read(table: str | Path) -> dict[str, Cost]:
    try:
        value = parse_json(cost_path(table).read_bytes())
        flops = value.get("flops", {})
        found = {label: (flops.get(label), float(seconds)) for label, seconds in value["seconds"].items()}
        return {str(n): Cost(math.nan if f is None else float(f), s) for n, (f, s) in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # none was noted, or the file is not ours
