"""Whether evidence can pay: what scoring and runs cost beside training on everything, and what they would have to gain.

Everything is reckoned per row. Training on P rows costs c·P. Evidence that costs E leaves c·P − E for training on
chosen rows; where these are worth m times as many random rows, they reach what all P reach if m·(P − E/c) ≥ P. So
evidence of `once` + `per_row`·P pays in pools above once / (c·(1 − 1/m) − per_row) rows, and never where that is not
positive. m is what a comparison measured (`compare --curve`), at its size: that it holds at another is an assumption,
and the texts say so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from im_lightning._utils.numbers import number_or_why, time_text
from im_lightning._utils.text_tables import Column, text_table, wrapped
from im_lightning.errors import RequestError, message
from im_lightning.experiments.compare.curve import Multiplier
from im_lightning.experiments.compare.statistics import RULED
from im_lightning.experiments.ways import FULL, WAYS, Way, Workload
from im_lightning.ledger.curve import STOPPED
from im_lightning.ledger.record import TRAINED, RunRecord
from im_lightning.models.cost import Cost, operations

UNITS = {"seconds": "time", "flops": "FLOPs"}
USUAL_RUNS, USUAL_ROWS, EVALUATION_ROWS = 60, 256, 120
"""Designed runs that are comfortable; rows of one where no ledger says; rows of two evaluation sets of sixty."""


@dataclass(frozen=True)
class PlanSettings:
    """What is asked."""

    rows: int
    """Rows of the pool."""
    budget_hours: float | None = None
    """GPU hours for everything: scoring, runs and the finetune itself; by default what a finetune on all rows takes."""
    epochs: int = 1
    """Passes of that finetune over its rows."""
    runs: int = USUAL_RUNS
    """Designed runs."""
    subset_size: int | None = None
    """Rows of a designed run, for one epoch; by default the runs are as most of the ledger's, had they gone on to their
    ends, else of 256 rows."""
    row_tokens: float | None = None
    """Mean tokens of a row of the pool, prompt and template included; by default as in the ledger's runs."""

    def check(self) -> None:
        """Raises a RequestError for sizes that cannot be."""
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                flag = "--" + name.replace("_", "-")
                raise RequestError(message(f"{flag} {value:g}", "it is no size", "give a number above 0"))


def workload(
    settings: PlanSettings,
    records: Sequence[RunRecord],
    parameters: float = math.nan,
    scored: Cost | None = None,
) -> Workload:
    """What the parts cost, as far as it is known.

    Args:
        settings: What is asked.
        records: Runs that were made: their speed, and what one costs.
        parameters: Of the base, where it was named.
        scored: A row's scoring, as it was noted; by default one pass of the base, at the speed of the runs.
    """
    s, rows = settings, [rate for r in records if (rate := _row_rate(r)) is not None]
    trained, read = _medians([rate[0] for rate in rows]), _medians([rate[1] for rate in rows])
    usual = usual_tokens(records)
    scale = 1.0 if s.row_tokens is None or math.isnan(usual) else s.row_tokens / usual
    trained, read = trained * scale, read * scale
    if s.row_tokens is not None and not math.isnan(parameters):
        trained = Cost(operations(parameters, trained=s.row_tokens), trained.seconds)
        read = Cost(operations(parameters, read=s.row_tokens), read.seconds)
    designed = [r for r in records if r.purpose == "designed" and r.kind == TRAINED]
    full = _alike([r for r in designed if STOPPED not in r.regime] or designed)
    evaluated = read * EVALUATION_ROWS
    run = trained * (s.subset_size or USUAL_ROWS) + evaluated
    if full and s.subset_size is None:
        run = _by_unit(np.mean, [_whole(r) for r in full])
        evaluated = _medians([r.cost * _evaluated_share(r) for r in full])
    return Workload(s.rows, s.runs, trained, read, run, evaluated, read if scored is None else scored, s.epochs)


def usual_tokens(records: Sequence[RunRecord]) -> float:
    """Tokens of a row in these runs; NaN where none records them."""
    found = [rate[2] for r in records if (rate := _row_rate(r)) is not None and rate[2]]
    return median(found) if found else math.nan


def _alike(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Those of the commonest length: runs of several lengths are of several regimes, and a fit takes one."""
    lengths = [(r.subset.get("size"), r.regime.get("epochs"), r.regime.get("max_steps")) for r in records]
    usual = Counter(lengths).most_common(1)
    return [r for r, length in zip(records, lengths, strict=True) if length == usual[0][0]]


def _whole(record: RunRecord) -> Cost:
    """What a run took; one that was stopped, had it gone on to its end."""
    at, share = record.regime.get(STOPPED), _evaluated_share(record)
    if not at:
        return record.cost
    share = 0.0 if math.isnan(share) else share
    return record.cost * (share + (1 - share) * at["of"] / at["step"])


def _evaluated_share(record: RunRecord) -> float:
    """Of a run's operations, those of its evaluations; NaN where they were not recorded."""
    trained, read = (record.compute.get(name) for name in ("tokens_trained", "tokens_evaluated"))
    return math.nan if trained is None or read is None else read / max(1, 3 * trained + read)


def _row_rate(record: RunRecord) -> tuple[Cost, Cost, float] | None:
    """Of one run: a row trained on, a row read, and its tokens (0 where they were not recorded); None of no fit."""
    seen = record.subset.get("exposures") or (record.subset.get("size") or 0) * (record.regime.get("epochs") or 1)
    if not seen or not record.steps:
        return None
    tokens = float(record.compute.get("tokens_trained") or 0)
    read, cost = float(record.compute.get("tokens_evaluated") or 0), record.cost
    if not tokens:  # an earlier version's: what evaluation took is in its seconds
        return Cost(math.nan, cost.seconds / seen), Cost(math.nan, cost.seconds / seen / 3), 0.0
    part = cost * (1 / (3 * tokens + read))
    return part * (3 * tokens / seen), part * (tokens / seen), tokens / seen


def _medians(costs: Sequence[Cost]) -> Cost:
    return _by_unit(median, costs)


def _by_unit(average: Callable[[list[float]], Any], costs: Sequence[Cost]) -> Cost:
    """By unit, of those that are known."""
    found = [[v for c in costs if not math.isnan(v := getattr(c, unit))] for unit in ("flops", "seconds")]
    return Cost(*(float(average(values)) if values else math.nan for values in found))


def worth_of(comparison: Mapping[str, Any] | None) -> tuple[Multiplier | None, str]:
    """What rows by the rule's weights are worth in a comparison, or None and what is missing."""
    how = "im-lightning compare … --arms random,weighted --curve --ledger RUNS"
    if comparison is None:
        return None, f"what chosen rows are worth: {how}, then plan --compare"
    arm = next((one for one in comparison["arms"] if one["arm"] == RULED), None)
    if arm is None:
        return None, f"what chosen rows are worth: the comparison has no arm {RULED} ({how})"
    if "multiplier" not in arm:
        return None, f"what chosen rows are worth: the comparison was made without a curve ({how})"
    return Multiplier.from_json(arm["multiplier"]), ""


@dataclass(frozen=True)
class Plan:
    """What is known, and what follows from it.

    Args:
        settings: What was asked.
        work: What the parts cost.
        worth: Of chosen rows, in random ones; None where no comparison measured it.
        missing: What is not known, one part of a sentence each.
        curve: The comparison's points: {scale, fitted}.
        spent: Designed runs that are there already.
        way: In which they were made, and so the rule whose rows a comparison measured.
    """

    settings: PlanSettings
    work: Workload
    worth: Multiplier | None
    missing: Sequence[str] = ()
    curve: Sequence[Mapping[str, Any]] = ()
    spent: int = 0
    way: Way = FULL

    @property
    def unit(self) -> str:
        """What is reckoned in: seconds, or operations where no speed is known."""
        return "flops" if math.isnan(self.work.everything.seconds) else "seconds"

    @property
    def budget(self) -> float:
        """What may be used, at most what training on everything takes."""
        whole, hours = float(getattr(self.work.everything, self.unit)), self.settings.budget_hours
        return whole if hours is None or self.unit == "flops" else min(whole, 3600 * hours)

    @property
    def affordable(self) -> bool:
        """Whether the budget trains on everything."""
        return self.budget == getattr(self.work.everything, self.unit)

    def gain(self, way: Way) -> Multiplier | None:
        """Random rows that the budget's chosen rows are worth, over those it would train on; None where not known."""
        left = 1 - getattr(way.cost(self.work), self.unit) / self.budget
        return None if self.worth is None or math.isnan(left) else self.worth * max(0.0, left)

    def verdict(self) -> str:
        """What to do, in one sentence or two."""
        way = self.way
        needed = way.needed(self.work, self.budget, self.unit)
        all_rows = "TRAIN ON EVERYTHING" if self.affordable else "TRAIN ON RANDOM ROWS"
        budget = "training on all rows" if self.affordable else "the budget"
        if math.isnan(needed):
            return "NOT KNOWN whether evidence can pay: what it costs beside training on everything is not known."
        if math.isinf(needed):
            share = getattr(way.cost(self.work), self.unit) / self.budget
            return f"{all_rows}: scores and {way.title} alone cost {share:.2g} times as much as {budget}."
        gain = self.gain(way)
        if gain is None or self.worth is None:
            return (
                f"NOT KNOWN whether evidence pays: scores and {way.title} take {1 - 1 / needed:.0%} of {budget}, so "
                f"chosen rows must be worth {needed:.2f} times as many random ones, and nothing here says what they "
                "are worth."
            )
        numbers = self._share(way) if self.affordable else self._rows(gain)
        if gain.low > 1:
            return f"MAKE THE EVIDENCE: scores and {way.title} pay; {numbers}."
        if gain.high <= 1 or (math.isnan(gain.low) and gain.value <= 1):
            return f"{all_rows}: scores and {way.title} do not pay; {numbers}."
        return f"{all_rows}: scores and {way.title} are not shown to pay; {numbers}."

    def _share(self, way: Way) -> str:
        """What reaching the loss of all rows would cost, of what they cost."""
        assert self.worth is not None
        evidence = getattr(way.cost(self.work), self.unit) / self.budget
        value, high, low = (evidence + 1 / part for part in (self.worth.value, self.worth.low, self.worth.high))
        bound = {self.worth.most: "at most ", self.worth.least: "at least "}.get(self.worth.value, "")
        interval = "" if math.isnan(low) else f" (95 % interval {low:.0%} to {high:.0%})"
        return f"with chosen rows they reach the loss of all rows for {bound}{value:.0%} of the cost{interval}"

    def _rows(self, gain: Multiplier) -> str:
        """What the budget's chosen rows are worth, of the random rows that it would train on."""
        interval = f" (95 % interval {gain.interval})" if gain.interval else ""
        loss = "" if gain.high <= 1 else self._nats(gain)
        return f"what the budget leaves for chosen rows is worth {gain.text} its random rows{interval}{loss}"

    def _nats(self, gain: Multiplier) -> str:
        """The gain in loss, read at the comparison's curve."""
        if len(self.curve) < 2:
            return ""
        logs, losses = np.log([p["scale"] for p in self.curve]), [p["fitted"] for p in self.curve]
        at = [float(np.interp(math.log(max(v, 1e-12)), logs, losses)) for v in (1.0, gain.value, gain.low, gain.high)]
        value, low, high = (found - at[0] for found in at[1:])
        interval = "" if math.isnan(low) else f" ({low:+.3f} to {high:+.3f})"
        return f", {value:+.3f}{interval} nats per token at the comparison's size"

    def to_json(self) -> dict[str, Any]:
        """JSON-like: what `text` says."""
        ways = []
        for way in WAYS:
            needed = way.needed(self.work, self.budget, self.unit)
            one = {
                "way": way.title,
                "ranks": way.ranks,
                **way.cost(self.work).to_json(),
                "must_be_worth": number_or_why(needed, "more than any"),
            }
            found = [number_or_why(rows, "never") for rows in self._pays_above(way, self.unit)]
            ways.append({**one, "pays_above": dict(zip(("rows", "low", "high"), found, strict=False))})
        told = {"verdict": self.verdict(), "settings": asdict(self.settings), "ways": ways}
        known = {"everything": self.work.everything.to_json(), "unit": self.unit, "budget": self.budget}
        known["worth"] = None if self.worth is None else self.worth.to_json()
        return {**told, **known, "runs_made": self.spent, "not_known": list(self.missing)}

    def text(self, width: int) -> str:
        """Everything for standard output, the verdict first."""
        w, s = self.work, self.settings
        epochs = f"{s.epochs} epoch{'s' if s.epochs > 1 else ''}"
        lines = [self.verdict(), f"Training on all {s.rows:,} rows for {epochs}: {w.everything.text}."]
        if s.budget_hours is not None:
            known = "" if self.unit == "seconds" else ", which cannot be weighed, for no speed is known"
            share = f", {self.budget / w.everything.seconds:.0%} of that" if not (known or self.affordable) else ""
            lines.append(f"Budget: {s.budget_hours:g} GPU hours{known or share}.")
        if self.worth is not None:
            interval = f" (95 % interval {self.worth.interval})" if self.worth.interval else ""
            lines.append(
                f"Rows by the rule's weights were worth {self.worth.text} the random tokens{interval} in the "
                "comparison. That they are so here, too, is assumed: with fewer runs a rule knows less, and the more "
                "of a pool is taken, the less choosing can gain."
            )
        if self.spent:
            lines.append(f"{self.spent} designed runs are made already; the table counts all {s.runs}.")
        lines += [f"Not known: {one}." for one in self.missing]
        words = [wrapped(line, width) for line in lines]
        return "\n".join([words[0], "", *words[1:], "", self.table(width), "", wrapped(NOTE, width)])

    def table(self, width: int) -> str:
        """One line per way."""
        columns = [
            Column("scores and", right=False),
            Column("FLOPs", rank=1),
            Column("time"),
            Column("of the budget"),
            Column("ranks runs", rank=1),
            Column("must be worth"),
            *(Column(f"pays above, by {UNITS[unit]}", rank=0 if unit == self.unit else 2) for unit in UNITS),
        ]
        rows = []
        for way in WAYS:
            cost = way.cost(self.work)
            needed = way.needed(self.work, self.budget, self.unit)
            rows.append(
                [
                    way.title,
                    "not known" if math.isnan(cost.flops) else f"{cost.flops:.2e}",
                    "not known" if math.isnan(cost.seconds) else time_text(cost.seconds),
                    _known(getattr(cost, self.unit) / self.budget, "{:.0%}"),
                    f"{way.ranks:.2f}",
                    _known(needed, "{:.2f}×", "more than any"),
                    *(self._pays(way, unit) for unit in UNITS),
                ]
            )
        return text_table(columns, rows, width)

    def _pays_above(self, way: Way, unit: str) -> list[float]:
        """Rows of the pool from which it is cheaper, and the ends of their interval; nothing where not known."""
        if self.worth is None or way != self.way:
            return []
        return [way.pays_above(self.work, w, unit) for w in (self.worth.value, self.worth.high, self.worth.low)]

    def _pays(self, way: Way, unit: str) -> str:
        """`12,000 rows (7,000 to never)`."""
        found = [_known(rows, "{:,.0f} rows", "never") for rows in self._pays_above(way, unit)]
        if not found or self.worth is None:
            return "not known"
        return (
            found[0] if math.isnan(self.worth.low) else f"{found[0]} ({found[1].removesuffix(' rows')} to {found[2]})"
        )


NOTE = (
    "ranks runs: how a rule from such evidence ranked sixty unseen full runs (Spearman), on the demo's synthetic pool, "
    "where twelve full runs reached 0.86 and thirty 0.96 (--runs 30); on your data it may differ (docs/cost.md). "
    "must be worth: times as many random rows, so that evidence and chosen rows reach what the budget reaches without "
    "evidence. pays above: pool size from which they reach the loss of training on everything for less, in brackets "
    "for the ends of the worth's interval. FLOPs: forward 1, backward 2 per token and parameter."
)


def _known(value: float, form: str, none: str = "") -> str:
    return "not known" if math.isnan(value) else none if math.isinf(value) else form.format(value)
