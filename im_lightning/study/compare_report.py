"""What `im-lightning compare` writes and prints: the table, what follows from it, how it was made, what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from im_lightning._utils.files import write_json, write_text
from im_lightning._utils.text_tables import wrapped
from im_lightning.ledger.record import RunRecord, plain
from im_lightning.sampling.selection.select import NEED_RULE
from im_lightning.scoring.report import read_cost
from im_lightning.study.arms import ArmsSettings
from im_lightning.study.comparison_report import REFERENCE, ComparisonResult

WIDTH = 120
NEED_SCORES = (*NEED_RULE, "diverse", "lowest-ppl", "ifd")
"""Arms that cost a scoring of the pool; lengths cost next to nothing."""


@dataclass(frozen=True)
class CompareReport:
    """A finished comparison and how it was made.

    Args:
        result: The arms.
        settings: What all finetunes shared.
        seeds: How many.
        notes: What a reader must know, one sentence each.
        rows: Of the pool.
        runs: Those behind the rule, where a ledger was given.
    """

    result: ComparisonResult
    settings: ArmsSettings
    seeds: int
    notes: Sequence[str]
    rows: int
    runs: Sequence[RunRecord] = ()

    def write(self, out: Path, request: dict[str, Any], rule: dict[str, Any] | None) -> None:
        """Writes `compare.json` and `compare.txt`.

        Args:
            out: The folder.
            request: Further settings: seed, data, pool_draw.
            rule: {path, digest, bootstrap}.
        """
        a, scoring = self.settings, read_cost(self.settings.scores)
        rendered = self.text()
        arms = []
        for arm in self.result.arms_json():
            cost = scoring if arm["arm"] in NEED_SCORES else 0.0
            total = None if cost is None else cost + arm["seconds"]
            arms.append({**arm, "scoring_seconds": cost, "cost_seconds": total})
        value = {
            "arms": arms,
            "reference": REFERENCE,
            "seeds": self.seeds,
            "settings": {**asdict(a), **request, "method": a.tuning.title},
            "evaluation": {"name": self.result.runs.evaluation, "path": a.eval_data},
            "rule": rule,
            "scoring_seconds": scoring,
            "interval": "95 %; of losses over seeds, of differences over seeds and evaluation examples",
            "differences_shown": self.result.differences_shown,
            "notes": list(self.notes),
            "rendered": rendered,
        }
        write_json(out / "compare.json", plain(value))
        write_text(out / "compare.txt", rendered + "\n")

    def text(self) -> str:
        """Everything for standard output."""
        a = self.settings
        title = (
            f"Loss on {a.eval_data} in nats per token; {a.tuning.title}; {a.tokens:,} supervised tokens and {a.steps} "
            f"steps per arm{f' and epoch, {a.tuning.epochs} epochs' if a.tuning.epochs > 1 else ''}; {self.seeds} seeds"
        )
        method = (
            "Finetuned with LoRA, under which the paper saw no difference between selected and random rows."
            if a.tuning.lora_rank
            else "Finetuned in full: all weights."
        )
        note = (
            "± is the half-width of a 95 % interval: of a loss over seeds, of a difference over seeds and evaluation "
            "examples (two-way bootstrap, paired by both). p is of that difference, Holm-corrected over the tested "
            "arms; a verdict is given where it is below 0.05. An arm marked * is not of equal tokens, and not tested."
        )
        sentences = [*self.result.verdicts(), method, *self.notes, *self._cost()]
        words = [wrapped(line, WIDTH) for line in sentences]
        return "\n".join([wrapped(title, WIDTH), self.result.table(WIDTH), wrapped(note, WIDTH), "", *words])

    def _cost(self) -> list[str]:
        scoring = read_cost(self.settings.scores)
        took = f"what scoring its {self.rows:,} rows cost was not noted beside the table"
        if scoring is not None:
            took = f"scoring its {self.rows:,} rows took {scoring:,.0f} s, once for all arms and seeds"
        out = [f'Cost: "train s" is one fit with its evaluation; {took} (random and longest need no scores).']
        if self.runs:
            total = sum(run.seconds for run in self.runs)
            out.append(f"The {len(self.runs)} designed runs behind the rule took {total:,.0f} s.")
        return out
