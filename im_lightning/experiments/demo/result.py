"""What the demo found: the comparison table, and plain sentences that follow from it and from nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from im_lightning._utils.text_tables import wrapped
from im_lightning.experiments.compare.result import ArmRuns, ComparisonResult
from im_lightning.experiments.compare.statistics import REFERENCE
from im_lightning.experiments.demo.playground.tasks import POOL_TASKS
from im_lightning.experiments.demo.settings import DemoSettings
from im_lightning.ledger.ledger import RunLedger
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.summary import rule_summary

UNTESTED = ("oracle",)
WIDTH = 110


@dataclass
class Arms(ArmRuns):
    """The runs of the demo's comparison, and what the playground knows of their rows."""

    known: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def add_rows(self, arm: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds what the playground knows of a run's rows."""
        counts = np.array(list(Counter(row["task"] for row in rows).values()), dtype=np.float64)
        known = {
            "good_share": float(np.mean([row["quality"] for row in rows])),
            "tasks": float(counts.sum() ** 2 / (counts**2).sum()),
        }
        self.known.setdefault(arm, []).append(known)

    def facts(self, arm: str) -> dict[str, float]:
        """With the share of good rows and the effective number of tasks (inverse Simpson)."""
        known = self.known.get(arm, [])
        names = ("good_share", "tasks") if known else ()
        return {**super().facts(arm), **{name: float(np.mean([k[name] for k in known])) for name in names}}

    def weighting(self, name: str) -> list[float]:
        """A number of the weights' report (strength, ess), one per seed."""
        return [float(r.weights.get(name, math.nan)) for r in self.records["weighted"]]


class DemoResult:
    """Rule, arms and their comparison.

    Args:
        settings: Of the demo.
        rule: Fitted on the designed runs.
        arms: The runs of the comparison.
        ledger: Where their losses by example are.
        seconds: Stage → wall time.
    """

    def __init__(
        self, settings: DemoSettings, rule: LinearRule, arms: Arms, ledger: RunLedger, seconds: dict[str, float]
    ) -> None:
        self.settings, self.rule, self.arms, self.seconds = settings, rule, arms, dict(seconds)
        self.comparison = ComparisonResult(arms, ledger, UNTESTED)
        self.results = self.comparison.results
        self.verdicts = {one.arm: one for one in self.comparison.verdicts}

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "seconds": self.seconds,
            "base_loss": self.arms.base_loss,
            "rule": {"n_runs": self.rule.n_runs_, "metrics": self.rule.metrics_.to_json()},
            "reference": REFERENCE,
            "evaluation": self.arms.evaluation,
            "seeds": self.settings.seeds,
            "interval": "95 %; of losses over seeds, of differences over seeds and evaluation examples",
            "arms": self.comparison.arms_json(),
            "differences_shown": self.comparison.differences_shown,
            "rendered": self.table(),
        }

    def text(self) -> str:
        """Everything for standard output."""
        words = "\n".join(wrapped(sentence, WIDTH) for sentence in self.sentences())
        return "\n\n".join([rule_summary(self.rule, WIDTH, self.settings.conclusive), self.table(), words])

    def table(self) -> str:
        """One line per arm."""
        s, known = self.settings, self.arms.known
        marks = " — TOO SMALL TO CONCLUDE" if not s.conclusive else ""
        marks += " — NULL: indicators permuted over rows, every difference is chance" if s.null else ""
        title = f"Loss on the report set in nats per token, {s.seeds} seeds, {s.tuning.title}{marks}"
        facts = {arm: self.arms.facts(arm) for arm in known}
        extra = {
            "good": {arm: f"{f['good_share']:.2f}" for arm, f in facts.items()},
            "tasks": {arm: f"{f['tasks']:.1f}" for arm, f in facts.items()},
        }
        note = (
            f"± is the half-width of a 95 % interval: of a loss over seeds (each has its own {s.fold_rows:,} candidate "
            "rows; base, rule and report set are the same), of a difference over seeds and report examples (two-way "
            "bootstrap, paired by both). p is of that difference, Holm-corrected over the tested arms. rows, "
            f"supervised tokens, good (share of right answers) and tasks (effective number, of {len(POOL_TASKS)}) are "
            "means; the last two only the playground knows, which is why good rows only (*) is not tested."
        )
        return "\n".join(
            [wrapped(title, WIDTH), self.comparison.table(WIDTH, extra, s.conclusive), wrapped(note, WIDTH)]
        )

    def sentences(self) -> list[str]:
        """What the table says, in words; a difference only where the corrected p is below 0.05."""
        base, random = self.arms.base_loss, self.results[REFERENCE]
        out = [f"Finetuning on random rows brings the base model from {base:.3f} to {random.mean:.3f} nats per token."]
        if not self.settings.conclusive:
            out.append(
                f"These sizes are too small to conclude anything ({self.rule.n_runs_} designed runs, "
                f"{self.settings.seeds} seeds): they show the loop, not its worth. For that, leave out --fast."
            )
            return out
        if self.settings.null:
            shown = ", ".join(self.comparison.differences_shown) or "none"
            out.append(f"Null: arms that nevertheless show a difference from random: {shown}.")
            return out
        out.append(self._sentence("weighted", "Rows drawn by the rule's weights", gain=True) + self._strength())
        if "by-source" in self.verdicts:
            out.append(self._sentence("by-source", "Rows drawn by source shares alone", gain=True))
        if (beyond := self.comparison.beyond_sources) is not None:
            out.append(replace(beyond, title="rows drawn by the rule's weights").against("those"))
        out.append(self._sentence("top", "The rule's top rows", gain=True))
        out.append(self._sentence("diverse", "Rows chosen for diversity by the rule's weights", gain=True))
        for arm, words in (
            ("worst", "The rule's worst rows"),
            ("longest", "The longest rows"),
            ("lowest-ppl", "The rows of lowest perplexity"),
        ):
            out.append(self._sentence(arm, words))
        return out

    def _sentence(self, arm: str, subject: str, gain: bool = False) -> str:
        verdict = self.verdicts[arm]
        f, chance = self.arms.facts(arm), self.arms.facts(REFERENCE)
        if not verdict.shown:
            return f"{subject} show no difference from random ({verdict.numbers})."
        oracle, part = self.results["oracle"].difference, ""
        if verdict.verdict == "better":
            verb = "beat random"
            if gain and oracle < 0:
                part = f", {100 * verdict.difference / oracle:.0f} % of what good rows alone gain"
        else:
            verb = "are worse than random"
            if f["good_share"] > chance["good_share"]:
                shares = [100 * x["good_share"] for x in (f, chance)]
                part = f", though {shares[0]:.0f} % of them are good, of random rows {shares[1]:.0f} %"
                if f["tasks"] < chance["tasks"]:
                    part += f"; effectively they cover {f['tasks']:.1f} tasks, random rows {chance['tasks']:.1f}"
        return f"{subject} {verb} ({verdict.numbers}){part}."

    def _strength(self) -> str:
        strength, ess = self.arms.weighting("strength"), self.arms.weighting("ess")
        if any(map(math.isnan, strength)):
            return ""
        text = f" The tilt reached strength {np.mean(strength):.2f} of 1"
        why = {str(n).partition("beyond it ")[2] for r in self.arms.records["weighted"] for n in r.weights["notes"]}
        if min(strength) < 1 and why - {""}:
            text += f" (beyond: {'; '.join(sorted(why - {''}))})"
        return f"{text}; the effective size of its weights is {np.mean(ess):,.0f} of {self.settings.fold_rows:,} rows."
