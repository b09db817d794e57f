"""What a comparison's arms are worth in random tokens, and what is left of it after the cost of their evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from im_lightning._utils.text_tables import Column, text_table, wrapped
from im_lightning.experiments.compare.arms import title_of
from im_lightning.experiments.compare.curve import NOTE, CurvePoint, Multiplier, Reading, TokenCurve
from im_lightning.experiments.compare.equal_tokens import FULL
from im_lightning.experiments.compare.statistics import BASE, REFERENCE, ExampleSums
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.models.cost import Cost, mean


def with_blocks(runs: Sequence[RunRecord], ledger: RunLedger) -> list[RunRecord]:
    """The runs, and those that were finetuned only to be merged into some of them."""
    known = {r.run_id for r in runs}
    parts = {str(one["run_id"]) for r in runs for one in r.made.get("blocks", {}).values()} - known
    return [*runs, *(r for r in (ledger.records() if parts else []) if r.run_id in parts)]


@dataclass(frozen=True)
class ArmWorth:
    """One arm.

    Args:
        multiplier: As good as so many times the random tokens.
        cost: Of one finetune.
        evidence: Of what its rows were chosen by.
        random: Of one finetune on random rows of as many tokens.
    """

    multiplier: Multiplier
    cost: Cost
    evidence: Cost
    random: Cost

    @property
    def net_flops(self) -> Multiplier:
        """By operations: what random rows of the same loss would cost, over what this took with its evidence."""
        return self._net(self.random.flops, self.cost.flops + self.evidence.flops)

    @property
    def net_seconds(self) -> Multiplier:
        """By seconds."""
        return self._net(self.random.seconds, self.cost.seconds + self.evidence.seconds)

    def _net(self, random: float, spent: float) -> Multiplier:
        return self.multiplier * (random / spent if spent else np.nan)

    def to_json(self) -> dict[str, Any]:
        net = {"flops": self.net_flops.to_json(), "seconds": self.net_seconds.to_json()}
        return {"multiplier": self.multiplier.to_json(), "net": net}


@dataclass(frozen=True)
class Worth:
    """The curve of random rows, and every arm read at it.

    Args:
        points: Of the curve, ascending.
        arms: arm → what it is worth; not of the base, of all rows, or of random itself.
    """

    points: tuple[CurvePoint, ...]
    arms: Mapping[str, ArmWorth]

    @classmethod
    def of(
        cls,
        arms: Mapping[str, Sequence[RunRecord]],
        points: Mapping[str, Sequence[RunRecord]],
        sums: ExampleSums,
        evidence: Mapping[str, Cost],
        spread: Mapping[str, tuple[float, float]],
    ) -> Worth:
        """Reads the arms at the curve.

        Args:
            arms: arm → its runs.
            points: Arms of random rows at other numbers of tokens, and `REFERENCE` → their runs.
            sums: Losses by example of both.
            evidence: arm → what its rows were chosen by.
            spread: As `Reading`.
        """
        tokens = {name: float(np.mean([r.tokens for r in runs])) for name, runs in points.items()}
        order = sorted(points, key=tokens.__getitem__)
        each = {name: sums.sums[name].sum(axis=1) / sums.tokens.sum() for name in order}
        scales = [tokens[name] / tokens[REFERENCE] for name in order]
        curve = TokenCurve(scales, [values.mean() for values in each.values()])
        measured = tuple(
            CurvePoint(
                scale,
                tokens[name],
                float(np.mean([r.steps for r in points[name]])),
                tuple(each[name].tolist()),
                float(fitted),
                mean(r.cost for r in points[name]),
                tuple(r.run_id for r in points[name]),
            )
            for name, scale, fitted in zip(order, scales, curve.losses, strict=True)
        )
        reading, random = Reading(curve, order, sums, spread), mean(r.cost for r in arms[REFERENCE])
        read = {
            arm: ArmWorth(reading.multiplier(arm), mean(r.cost for r in runs), evidence[arm], random)
            for arm, runs in arms.items()
            if arm not in (BASE, FULL, REFERENCE)
        }
        return cls(measured, read)

    def to_json(self) -> dict[str, Any]:
        """The curve; what an arm is worth stands with the arm."""
        return {"points": [point.to_json() for point in self.points]}

    def text(self, width: int) -> str:
        """The curve in a sentence, and a line per arm."""
        shown = ", ".join(f"{p.scale:.2g}× {p.mean:.3f}" for p in self.points)
        level = any(a.fitted == b.fitted for a, b in zip(self.points, self.points[1:], strict=False))
        curve = f"Random rows by their tokens: {shown} nats per token."
        if level:
            curve += " More tokens did not lower it everywhere: the curve is level there, and tells little."
        columns = [
            Column("arm", right=False),
            Column("worth"),
            Column("95 % interval", right=False),
            Column("evidence: FLOPs", rank=2),
            Column("seconds", rank=2),
            Column("net, FLOPs"),
            Column("net, seconds"),
        ]
        rows = [
            [
                title_of(arm),
                one.multiplier.text,
                one.multiplier.interval,
                *(_number(value) for value in (one.evidence.flops, one.evidence.seconds)),
                one.net_flops.text,
                one.net_seconds.text,
            ]
            for arm, one in self.arms.items()
        ]
        parts = [wrapped(curve, width), *([text_table(columns, rows, width)] if rows else []), wrapped(NOTE, width)]
        return "\n".join(parts)


def _number(value: float) -> str:
    return "not known" if np.isnan(value) else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"
