"""What the demo found: the comparison table, and plain sentences that follow from it and from nothing else."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from im_lightning.rule.linear import LinearRule
from im_lightning.rule.record import RunRecord
from im_lightning.study.comparison import compare
from im_lightning.study.demo_settings import DemoSettings
from im_lightning.study.playground.tasks import POOL_TASKS

REFERENCE, UNTESTED = "random", ("oracle",)
WIDTH = 110

TITLES = {
    "weighted": "rule's weights",
    "top": "rule's top rows",
    "random": "random",
    "longest": "longest",
    "lowest-ppl": "lowest perplexity",
    "worst": "rule's worst rows",
    "oracle": "good rows only *",
}


@dataclass
class Arms:
    """The runs of a comparison, arm by arm, the seeds in the same order in every arm."""

    records: dict[str, list[RunRecord]] = field(default_factory=dict)
    known: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def add(self, arm: str, record: RunRecord, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds a run and what the playground knows of its rows."""
        self.records.setdefault(arm, []).append(record)
        counts = np.array(list(Counter(row["task"] for row in rows).values()), dtype=np.float64)
        known = {
            "good_share": float(np.mean([row["quality"] for row in rows])),
            "tasks": float(counts.sum() ** 2 / (counts**2).sum()),
        }
        self.known.setdefault(arm, []).append(known)

    @property
    def losses(self) -> dict[str, list[float]]:
        """arm → loss on the report set in nats per token, one per seed."""
        return {arm: [float(r.evaluation["report"]["loss"]) for r in runs] for arm, runs in self.records.items()}

    @property
    def base_loss(self) -> float:
        """Loss of the untouched base on the report set."""
        return float(self.records[REFERENCE][0].evaluation["report"]["base_loss"])

    def facts(self, arm: str) -> dict[str, float]:
        """Means over seeds: rows, tokens, steps, share of good rows, effective number of tasks (inverse Simpson)."""
        runs = self.records[arm]
        return {
            "rows": float(np.mean([r.subset["size"] for r in runs])),
            "tokens": float(np.mean([r.tokens for r in runs])),
            "steps": float(np.mean([r.steps for r in runs])),
            **{name: float(np.mean([k[name] for k in self.known[arm]])) for name in ("good_share", "tasks")},
        }

    def weighting(self, name: str) -> list[float]:
        """A number of the weights' report (strength, ess), one per seed."""
        return [float(r.weights.get(name, math.nan)) for r in self.records["weighted"]]


class DemoResult:
    """Rule, arms and their comparison.

    Args:
        settings: Of the demo.
        rule: Fitted on the designed runs.
        arms: The runs of the comparison.
        seconds: Stage → wall time.
    """

    def __init__(self, settings: DemoSettings, rule: LinearRule, arms: Arms, seconds: dict[str, float]) -> None:
        self.settings, self.rule, self.arms, self.seconds = settings, rule, arms, dict(seconds)
        self.results = {r.arm: r for r in compare(arms.losses, REFERENCE, UNTESTED)}

    @property
    def differences_shown(self) -> list[str]:
        """The tested arms whose corrected p is below 0.05."""
        return [arm for arm, r in self.results.items() if r.verdict in ("better", "worse")]

    def to_json(self) -> dict[str, Any]:
        arms = {
            arm: {**self.arms.facts(arm), **r.to_json(), "run_ids": [x.run_id for x in self.arms.records[arm]]}
            for arm, r in self.results.items()
        }
        return {
            "settings": asdict(self.settings),
            "seconds": self.seconds,
            "base_loss": self.arms.base_loss,
            "rule": {"n_runs": self.rule.n_runs_, "metrics": self.rule.metrics_},
            "reference": REFERENCE,
            "interval": "95 % t interval over seeds",
            "arms": arms,
            "differences_shown": self.differences_shown,
        }

    def text(self) -> str:
        """Everything for standard output."""
        return "\n\n".join([self.rule.summary(WIDTH), self.table(), "\n".join(map(_wrapped, self.sentences()))])

    def table(self) -> str:
        """One line per arm."""
        s = self.settings
        header = [
            "arm",
            "rows",
            "tokens",
            "steps",
            "good",
            "tasks",
            "loss",
            "",
            "minus random",
            "",
            "Holm p",
            "verdict",
        ]
        lines = [["untouched base", "", "0", "0", "", "", f"{self.arms.base_loss:.3f}", "", "", "", "", ""]]
        for arm, r in self.results.items():
            f = self.arms.facts(arm)
            difference = (
                ["", ""] if math.isnan(r.difference) else [f"{r.difference:+.3f}", _half(r.difference_half_width)]
            )
            lines.append(
                [
                    TITLES.get(arm, arm), f"{f['rows']:.0f}", f"{f['tokens']:,.0f}", f"{f['steps']:.0f}",
                    f"{f['good_share']:.2f}", f"{f['tasks']:.1f}", f"{r.mean:.3f}", _half(r.half_width), *difference,
                    "" if math.isnan(r.p_holm) else _p(r.p_holm), r.verdict,
                ]
            )  # fmt: skip
        marks = " — TOO SMALL TO CONCLUDE" if not s.conclusive else ""
        marks += " — NULL: indicators permuted over rows, every difference is chance" if s.null else ""
        title = f"Loss on the report set in nats per token, {s.seeds} seeds, {s.tuning.title}{marks}"
        note = (
            f"± is the half-width of the 95 % t interval over seeds (each has its own {s.fold_rows:,} candidate rows; "
            "base, rule and report set are the same). Differences are paired by seed, p is of the paired t test, "
            "Holm-corrected over the tested arms. rows, supervised tokens, good (share of right answers) and tasks "
            f"(effective number, of {len(POOL_TASKS)}) are means; the last two only the playground knows, which is why "
            "good rows only (*) is not tested."
        )
        return "\n".join([_wrapped(title), *_aligned([header, *lines]), _wrapped(note)])

    def sentences(self) -> list[str]:
        """What the table says, in words; a difference only where the corrected p is below 0.05."""
        base, random = self.arms.base_loss, self.results[REFERENCE]
        out = [
            f"Finetuning on random rows brings the untouched base from {base:.3f} to {random.mean:.3f} nats per token."
        ]
        if not self.settings.conclusive:
            out.append(
                f"These sizes are too small to conclude anything ({self.rule.n_runs_} designed runs, "
                f"{self.settings.seeds} seeds): they show the loop, not its worth. For that, leave out --fast."
            )
        if self.settings.null:
            shown = ", ".join(self.differences_shown) or "none"
            out.append(f"Null: arms that nevertheless show a difference from random: {shown}.")
            return out
        out.append(self._sentence("weighted", "Rows drawn by the rule's weights", gain=True) + self._strength())
        out.append(self._sentence("top", "The rule's top rows", gain=True))
        for arm, words in (
            ("worst", "The rule's worst rows"),
            ("longest", "The longest rows"),
            ("lowest-ppl", "The rows of lowest perplexity"),
        ):
            out.append(self._sentence(arm, words))
        return out

    def _sentence(self, arm: str, subject: str, gain: bool = False) -> str:
        r = self.results[arm]
        f, chance = self.arms.facts(arm), self.arms.facts(REFERENCE)
        numbers = f"{r.difference:+.3f} {_half(r.difference_half_width)} nats per token, Holm p {_p(r.p_holm)}"
        if r.verdict == "no difference shown":
            return f"{subject} show no difference from random ({numbers})."
        oracle = self.results["oracle"].difference
        part = ""
        if gain and r.verdict == "better" and oracle < 0:
            part = f", {100 * r.difference / oracle:.0f} % of what good rows alone gain"
        verb = "beat random" if r.verdict == "better" else "are worse than random"
        if r.verdict == "worse" and f["good_share"] > chance["good_share"]:
            shares = [100 * x["good_share"] for x in (f, chance)]
            part = f", though {shares[0]:.0f} % of them are good, of random rows {shares[1]:.0f} %"
            if f["tasks"] < chance["tasks"]:
                part += f"; effectively they cover {f['tasks']:.1f} tasks, random rows {chance['tasks']:.1f}"
        return f"{subject} {verb} ({numbers}){part}."

    def _strength(self) -> str:
        strength, ess = self.arms.weighting("strength"), self.arms.weighting("ess")
        if any(map(math.isnan, strength)):
            return ""
        text = f" The tilt reached strength {np.mean(strength):.2f} of 1"
        why = {str(n).partition("beyond it ")[2] for r in self.arms.records["weighted"] for n in r.weights["notes"]}
        if min(strength) < 1 and why - {""}:
            text += f" (beyond: {'; '.join(sorted(why - {''}))})"
        return f"{text}; the effective size of its weights is {np.mean(ess):,.0f} of {self.settings.fold_rows:,} rows."


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, WIDTH))


def _half(value: float) -> str:
    return "" if math.isnan(value) else f"± {value:.3f}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "not known"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns padded to their widest cell, numbers to the right, the first and the last column to the left."""
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    last = len(widths) - 1
    out = []
    for row in rows:
        cells = [c.ljust(w) if j in (0, last) else c.rjust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True))]
        out.append("  ".join(cells).rstrip())
    return out
