"""What a loop found: first whether it paid, then the table it follows from, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from im_lightning._utils.numbers import time_text
from im_lightning._utils.text_tables import wrapped
from im_lightning.experiments.compare.equal_tokens import FULL
from im_lightning.experiments.compare.result import WIDTH, CompareReport
from im_lightning.experiments.compare.statistics import ONE_SEED, REFERENCE, RULED
from im_lightning.rule.linear_rule import LinearRule


@dataclass(frozen=True)
class LoopResult:
    """A finished loop.

    Args:
        decided: What was decided when it began: runs, seconds by stage as estimated, ….
        rule: The rule; None where it was refused.
        refusal: Why, or "".
        comparison: Random rows, all rows, and with a rule its rows.
        seconds: Stage → wall seconds, over all calls.
    """

    decided: dict[str, Any]
    rule: LinearRule | None
    refusal: str
    comparison: CompareReport
    seconds: dict[str, float]

    def sentences(self) -> list[str]:
        """The verdict, and what it cost; nothing that the comparison does not show."""
        return [line for line in (self.verdict(), self._all_rows(), self._cost()) if line]

    def verdict(self) -> str:
        """Whether it paid, in one sentence."""
        if self.rule is None:
            return (
                f"REFUSED: {self.refusal}. No rows were weighted; random rows and all rows are what follows. More or "
                "longer designed runs may tell more (--runs, another --out)."
            )
        found = {one.arm: one for one in self.comparison.result.verdicts}.get(RULED)
        if self.comparison.seeds < 2 or found is None:
            return f"Not known whether it paid. {ONE_SEED}"
        if found.verdict == "better":
            return f"It paid: rows drawn by the rule's weights beat as many tokens of random rows ({found.numbers})."
        if found.verdict == "worse":
            return f"It did not pay: rows drawn by the rule's weights are worse than random rows ({found.numbers})."
        return f"It did not pay: the rule's weights are not shown to differ from random rows ({found.numbers})."

    def _all_rows(self) -> str:
        """The best subset at hand against all rows, in loss, tokens and time."""
        runs, results = self.comparison.result.runs, self.comparison.result.results
        if FULL not in results:
            return ""
        arm = RULED if RULED in results else REFERENCE
        few, all_rows = runs.facts(arm), runs.facts(FULL)
        text = (
            f"All candidate rows of a seed reach {results[FULL].mean:.3f} nats per token, {arm} rows "
            f"{results[arm].mean:.3f} with {few['tokens'] / all_rows['tokens']:.0%} of the tokens"
        )
        saved = all_rows["seconds"] - few["seconds"]
        if arm != RULED or saved <= 0 or results[arm].mean > results[FULL].mean:
            return f"{text}."
        number = math.ceil(self._spent / saved)
        return f"{text}: finding the rule is repaid by the time of {number:,} such finetune{'s' if number > 1 else ''}."

    @property
    def _spent(self) -> float:
        return sum(self.seconds.get(stage, 0.0) for stage in ("scoring", "designed runs", "rule"))

    def _cost(self) -> str:
        parts = ", ".join(f"{stage} {time_text(seconds)}" for stage, seconds in self.seconds.items())
        took, estimated = (time_text(sum(each.values())) for each in (self.seconds, self.decided["seconds"]))
        return f"It took {took} ({parts}); {estimated} were estimated."

    def to_json(self) -> dict[str, Any]:
        """JSON-like, without the comparison, which has a file of its own."""
        rule = None if self.rule is None else {"method": self.rule.method, "n_runs": self.rule.n_runs_}
        told = {"verdict": self.verdict(), "rule": rule, "refusal": self.refusal or None}
        return {**told, "decided": self.decided, "seconds": self.seconds}

    def text(self) -> str:
        """Everything for standard output, the verdict first."""
        words = [wrapped(line, WIDTH) for line in self.sentences()]
        return "\n".join([*words, "", self.comparison.text()])
