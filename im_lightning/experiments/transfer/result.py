"""What a transfer found: how runs of two bases agree on the same subsets, and what more subsets would buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from im_lightning._utils.numbers import number_or_dash, time_text
from im_lightning._utils.text_tables import Column, text_table, wrapped
from im_lightning.indicators.transforms import SHARE
from im_lightning.ledger.curve import stopped_text
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.transfer import evidence, weigh_evidence
from im_lightning.rule.validation.agreement import RankAgreement, agreement_of, subset_losses
from im_lightning.rule.validation.univariate import spearman_interval

FORMAT = "im_lightning.transfer"
_TIMES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Runs:
    """Runs of one base at one learning rate.

    Args:
        records: At least one per subset.
        losses: Subset → mean log loss.
    """

    records: Sequence[RunRecord]
    losses: dict[str, float]

    @classmethod
    def of(cls, records: Sequence[RunRecord], evaluation: str) -> Runs:
        """The runs with their losses on an evaluation set."""
        return cls(records, subset_losses(records, evaluation))

    @property
    def rate(self) -> str:
        """Learning rate, and where the runs were stopped."""
        stop = stopped_text(self.records[0])
        rate = number_or_dash(self.records[0].regime.get("learning_rate"), "g")
        return f"{rate}, {stop}" if stop else rate

    @property
    def seconds(self) -> float:
        """Mean wall time of a run."""
        return float(np.mean([r.seconds for r in self.records]))

    def predicted(self, rule: LinearRule) -> dict[str, float]:
        """Subset → the rule's prediction from what its first run was trained on; without those that lack a mean."""
        first = {r.subset_key: r for r in reversed(self.records)}
        means = {key: [_mean(r, rule, *pair) for pair in _regressors(rule)] for key, r in first.items()}
        return {key: rule.predict_mean(x)[0] for key, x in means.items() if np.isfinite(x).all()}


def _regressors(rule: LinearRule) -> list[tuple[str, str]]:
    return list(zip(rule.feature_names_in_, rule.columns, strict=True))


def _mean(record: RunRecord, rule: LinearRule, name: str, column: str) -> float:
    """A run's mean of a regressor, also where it is a hat (`<indicator>[k]`); NaN where it was not recorded."""
    how = rule.transforms_[name]
    if how.kind == SHARE:
        return (
            float(record.subset["source_shares"].get(how.source, 0.0)) if record.subset.get("source_shares") else np.nan
        )
    if how.source is not None:
        return float(
            record.source_phi_means.get(how.source, {}).get(column, 0.0 if record.source_phi_means else np.nan)
        )
    if how.hat is None:
        return float(record.phi_means.get(column, np.nan))
    means, k = record.basis_means.get(column, {}).get("means", []), int(name[len(column) + 1 : -1]) + 1
    return float(means[k]) if k < len(means) else np.nan


@dataclass(frozen=True)
class TransferResult:
    """The runs of a transfer.

    Args:
        model: The other base.
        evaluation: The evaluation loss compared.
        small: Runs of the small base, by learning rate; those of the ledger first.
        target: Runs of the other base, by learning rate.
        rule: The rule that is to be used there, if any.
    """

    model: str
    evaluation: str
    small: list[Runs]
    target: list[Runs]
    rule: LinearRule | None

    def agreement(self, small: Runs, target: Runs) -> RankAgreement:
        """Over the subsets that both have."""
        return agreement_of(small.losses, target.losses)

    @property
    def ruled(self) -> LinearRule | None:
        """The rule with the evidence of these runs in place of older evidence for the same base and rate."""
        if self.rule is None:
            return None
        found = [evidence(self.rule, self.agreement(self.small[0], t), self.small[0].records, t.records)
                 for t in self.target]  # fmt: skip
        same = [(e["base_model"], e["template"], e["learning_rate"]) for e in found]
        kept = [e for e in self.rule.transfers if (e["base_model"], e["template"], e["learning_rate"]) not in same]
        return replace(self.rule, transfers=[*kept, *found])

    def text(self, width: int) -> str:
        """The table, what it means for the rule, and what more subsets would buy."""
        columns = [
            Column("rate, small base", right=False),
            Column("rate, other base", right=False),
            Column("Spearman"),
            Column("95 % interval"),
            Column("pairs alike", rank=1),
            Column("seconds a run", rank=2),
        ]
        cells = []
        for small in self.small:
            for target in self.target:
                found = self.agreement(small, target)
                cells.append([small.rate, target.rate, *_cells(found), f"{small.seconds:.3g} / {target.seconds:.3g}"])
        if self.rule is not None:
            cells += [["the rule", t.rate, *_cells(agreement_of(t.predicted(self.rule), t.losses)), ""]
                      for t in self.target]  # fmt: skip
        k = len(self.target[0].losses)
        head = f"The same {k} subsets on both bases, log loss on {self.evaluation}; the other base is {self.model}."
        lines = [self._choice(), self._buys(), self._verdict()]
        body = text_table(columns, cells, width)
        return "\n".join([wrapped(head, width), "", body, "", *(wrapped(line, width) for line in lines if line)])

    def _choice(self) -> str:
        """What choosing by the small base would have cost on the other, in log loss."""
        small, target = self.small[0].losses, self.target[0].losses
        shared = [key for key in small if key in target]
        chosen = min(shared, key=lambda key: small[key])
        rank = sorted(target[key] for key in shared).index(target[chosen]) + 1
        lost = target[chosen] - min(target[key] for key in shared)
        place = (
            "the best there, too" if rank == 1 else f"number {rank} of {len(shared)} there, {lost:.3g} behind the best"
        )
        return f"The small base's best subset is {place}."

    def _buys(self) -> str:
        """Intervals at the correlation found, were there more subsets, and the time of their runs on the other base."""
        found, target = self.agreement(self.small[0], self.target[0]), self.target[0]
        if np.isnan(found.low):
            return ""
        parts = []
        for times in _TIMES:
            low, high = spearman_interval(found.spearman, times * found.subsets)
            parts.append(f"{times * found.subsets} ({time_text(times * found.subsets * target.seconds)}) "
                         f"{low:.2f} to {high:.2f}")  # fmt: skip
        more = f"What subsets buy, were the correlation to stay {found.spearman:.2f}: {', '.join(parts)}"
        return f"{more} (runs on the other base and their time; the first is what was made)."

    def _verdict(self) -> str:
        ruled = self.ruled
        if ruled is None:
            return "With --rule the rule of these runs gets this as its evidence for the other base."
        target = self.target[0]
        carried, lacking = weigh_evidence(ruled, target.records[0].regime)
        text = f"The rule is accepted for this base: {carried}." if carried else f"The rule stays refused: {lacking}."
        if agreement_of(target.predicted(ruled), target.losses).low > 0:
            return text
        return f"{text} Its own predictions are not shown to rank the other base's losses."

    def to_json(self) -> dict[str, Any]:
        """JSON-like, for `transfer.json`."""
        pairs = [
            {"small": small.rate, "target": target.rate, **self.agreement(small, target).to_json()}
            for small in self.small
            for target in self.target
        ]
        sides = {"small": self.small, "target": self.target}
        runs = {
            name: [{"rate": one.rate, "seconds": one.seconds, "log_loss": one.losses} for one in side]
            for name, side in sides.items()
        }
        return {"format": FORMAT, "model": self.model, "evaluation": self.evaluation, "agreement": pairs, **runs}


def _cells(found: RankAgreement) -> list[str]:
    interval = "" if np.isnan(found.low) else f"{found.low:.2f} to {found.high:.2f}"
    return [number_or_dash(found.spearman, ".2f"), interval, number_or_dash(found.pairs, ".0%")]
