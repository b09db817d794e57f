"""A finished comparison: its runs arm by arm, the table, and sentences that follow from the table alone.

What `im-lightning compare` writes and prints: the table, what follows from it, how it was made, what it cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from im_lightning._utils.files import plain, write_json, write_text
from im_lightning._utils.numbers import half_width, holm, number_or_nothing, p_text
from im_lightning._utils.text_tables import Column, text_table, wrapped
from im_lightning.experiments.answers.win_rate import WinRate, with_loss
from im_lightning.experiments.compare.arms import ArmsSettings, title_of
from im_lightning.experiments.compare.equal_tokens import FULL
from im_lightning.experiments.compare.judged import ArmsJudged
from im_lightning.experiments.compare.rule_spread import DRAWS
from im_lightning.experiments.compare.statistics import (
    BASE,
    LEVEL,
    REFERENCE,
    RULED,
    ArmResult,
    ExampleSums,
    Verdict,
    compare,
    t_interval,
    verdict_sentences,
)
from im_lightning.experiments.compare.worth import Worth
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.models.cost import UNKNOWN, Cost, mean, read_cost, total
from im_lightning.sampling.selection.methods import METHODS

BY_SOURCE = "by-source"
"""The arm that `RULED` has to beat for its indicators to be worth anything."""
_IN_TABLE = {"no difference shown": "n.s."}  # under the header "difference"


@dataclass
class ArmRuns:
    """The runs of a comparison, arm by arm, the seeds in the same order in every arm.

    Args:
        evaluation: Name of the evaluation set.
        records: arm → its runs.
        prompts: Id of an evaluation example → its instruction; those of one are resampled together.
    """

    evaluation: str
    records: dict[str, list[RunRecord]] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)

    def add(self, arm: str, record: RunRecord) -> None:
        self.records.setdefault(arm, []).append(record)

    @property
    def losses(self) -> dict[str, list[float]]:
        """arm → loss in nats per token, one per seed."""
        return {arm: [r.loss(self.evaluation) for r in runs] for arm, runs in self.records.items()}

    @property
    def base_loss(self) -> float:
        """Loss of the base model."""
        return float(self.records[REFERENCE][0].evaluation[self.evaluation]["base_loss"])

    def example_sums(self, ledger: RunLedger) -> ExampleSums:
        """The losses of single evaluation examples, from the ledger."""
        losses = {r.run_id: ledger.losses(r.run_id)[self.evaluation] for runs in self.records.values() for r in runs}
        sums = {arm: np.array([losses[r.run_id].sums for r in runs]) for arm, runs in self.records.items()}
        one = next(iter(losses.values()))
        return ExampleSums(sums, one.counts).by_instruction([self.prompts.get(i, i) for i in one.ids])

    def facts(self, arm: str) -> dict[str, float]:
        """Means over seeds: rows, supervised tokens, steps, seconds of the fit (its evaluation included)."""
        runs = self.records[arm]
        return {
            "rows": float(np.mean([r.subset["size"] for r in runs])),
            "tokens": float(np.mean([r.tokens for r in runs])),
            "steps": float(np.mean([r.steps for r in runs])),
            "seconds": float(np.mean([r.seconds for r in runs])),
        }

    def exact_match(self, arm: str) -> tuple[float, float] | None:
        """Mean share of exact answers and half-width of its t interval over seeds; None where none was measured."""
        found = [r.evaluation[self.evaluation].get("exact_match") for r in self.records[arm]]
        shares = [float(share) for share in found if share is not None]
        return t_interval(shares) if len(shares) == len(found) else None


class ComparisonResult:
    """Arms and what may be said of them.

    Args:
        runs: The runs.
        ledger: Where their losses by example are.
        untested: Arms that are shown and not tested, for they are not of equal tokens or take what no rule can know.
        spread: arm → sd of log loss over rules from other ledgers, as `rule_spread` gives it.

    Attributes:
        worth: What the arms are worth in random tokens, where that was measured.
    """

    def __init__(
        self,
        runs: ArmRuns,
        ledger: RunLedger,
        untested: Sequence[str] = (),
        spread: Mapping[str, float] | None = None,
    ) -> None:
        self.runs = runs
        self.untested = tuple(arm for arm in runs.records if arm in (BASE, FULL, *untested))
        sums = runs.example_sums(ledger)
        found = compare(runs.losses, REFERENCE, self.untested, examples=sums, spread=spread, spread_df=DRAWS - 1)
        self.results: dict[str, ArmResult] = {r.arm: r for r in found}
        self.judged: ArmsJudged | None = None
        self.worth: Worth | None = None
        self.beyond_sources: Verdict | None = None
        if {RULED, BY_SOURCE} <= set(runs.records):
            some = {arm: runs.losses[arm] for arm in (BY_SOURCE, RULED)}
            pair = compare(some, BY_SOURCE, examples=sums, spread=spread, spread_df=DRAWS - 1)
            self.beyond_sources = pair[1].titled(title_of(RULED))

    @property
    def seeds(self) -> int:
        return len(self.runs.records[REFERENCE])

    @property
    def differences_shown(self) -> list[str]:
        """The tested arms whose corrected p is below 0.05."""
        return [one.arm for one in self.verdicts if one.shown]

    @property
    def verdicts(self) -> list[Verdict]:
        """One per tested arm."""
        return [r.titled(title_of(arm)) for arm, r in self.results.items() if r.verdict]

    def arms_json(self) -> list[dict[str, Any]]:
        """One object per arm."""
        out = []
        for arm, r in self.results.items():
            exact = self.runs.exact_match(arm)
            out.append(
                {
                    **r.to_json(),
                    "title": title_of(arm),
                    "tested": arm not in self.untested and arm != REFERENCE,
                    **self.runs.facts(arm),
                    **({} if exact is None else {"exact_match": exact[0]}),
                    **({} if arm not in self.rates else {"win_rate": self.rates[arm].to_json()}),
                    **({} if self.worth is None or arm not in self.worth.arms else self.worth.arms[arm].to_json()),
                    "run_ids": [record.run_id for record in self.runs.records[arm]],
                }
            )
        return out

    @property
    def rates(self) -> Mapping[str, WinRate]:
        """Win rates against random rows, where a judge was asked."""
        return {} if self.judged is None else self.judged.rates

    def judgement(self) -> list[str]:
        """The verdicts on the arms, how they correlate with the loss, and what they owe to place and length."""
        if self.judged is None:
            return []
        out, of = [], self.judged.over_seeds
        for arm, p in zip(of, holm([found.p for found in of.values()]).tolist(), strict=True):
            if p < LEVEL:  # NaN with one seed
                word = "preferred to" if of[arm].difference > 0 else "less liked than"
                out.append(
                    f"Answers of {title_of(arm)} are {word} those of {title_of(REFERENCE)}: win rate "
                    f"{self.rates[arm].rate.text}; Holm p {p_text(p)}, over seeds and prompts."
                )
        losses = {arm: float(np.mean(values)) for arm, values in self.runs.losses.items()}
        rates = {arm: found.rate.value for arm, found in self.rates.items()}
        return [*out, with_loss(rates, losses), *self.judged.together.biases()]

    def table(self, width: int, extra: Mapping[str, Mapping[str, str]] | None = None, judged: bool = True) -> str:
        """One line per arm.

        Args:
            width: Of the text.
            extra: Further columns: header → arm → cell.
            judged: With p and verdict of each difference.
        """
        exact = {arm: self.runs.exact_match(arm) for arm in self.results}
        shown = dict(extra or {})
        if self.rates:
            shown["win rate"] = {arm: found.rate.text for arm, found in self.rates.items()}
        if any(exact.values()):
            shown["exact"] = {arm: f"{e[0]:.3f}" for arm, e in exact.items() if e is not None}
        columns = [
            Column("arm", right=False),
            Column("rows", rank=2),
            Column("tokens", rank=1),
            Column("steps", rank=3),
            Column("train s", rank=4),
            *(Column(header) for header in shown),
            Column("loss"),
            Column("±", right=False),
            Column("vs random"),
            Column("±", right=False),
            Column("Holm p"),
            Column("difference", right=False),
        ]
        rows = []
        for arm, r in self.results.items():
            f = self.runs.facts(arm)
            trained = arm != BASE
            title = title_of(arm) + (" *" if arm in self.untested and trained else "")
            rows.append(
                [
                    title,
                    f"{f['rows']:,.0f}" if trained else "",
                    f"{f['tokens']:,.0f}",
                    f"{f['steps']:,.0f}",
                    f"{f['seconds']:,.1f}" if trained else "",
                    *(cells.get(arm, "") for cells in shown.values()),
                    f"{r.mean:.3f}",
                    half_width(r.half_width if trained else math.nan),
                    number_or_nothing(r.difference, "+.3f"),
                    half_width(r.difference_half_width),
                    "" if math.isnan(r.p_holm) else p_text(r.p_holm),
                    _IN_TABLE.get(r.verdict, r.verdict),
                ]
            )
        kept = len(columns) - (0 if judged else 2)
        return text_table(columns[:kept], [row[:kept] for row in rows], width)

    def sentences(self) -> list[str]:
        """What may be said in words: an arm is better or worse only where the interval excludes zero, corrected."""
        out = [text for text, _ in verdict_sentences(self.verdicts, self.seeds)]
        if self.seeds > 1 and self.beyond_sources is not None:
            out.append(self.beyond_sources.against(title_of(BY_SOURCE)))
        worst = self.results.get("worst")
        if self.seeds > 1 and worst is not None and worst.verdict != "worse":
            out.append("The rule's worst rows are not shown to be worse than random: its sign is not confirmed here.")
        return out


def evidence_of(arm: str, scoring: Cost | None, runs: Sequence[RunRecord], rule: bool = True) -> Cost:
    """What had to be known before the arm's rows could be chosen.

    Args:
        arm: Its name.
        scoring: Of the pool; None where it was not noted.
        runs: Those behind the rule; none where they were not named.
        rule: Whether there is one: arms that could do without it are weighted by it then.
    """
    method, found = METHODS.get(arm), Cost()
    if method is not None and method.scored:
        found += UNKNOWN if scoring is None else scoring
    if method is not None and (method.needs_rule or method.mixture or (method.weighted and rule)):
        found += total(r.cost for r in runs) if runs else UNKNOWN
    return found


WIDTH = 120


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

    def write(self, out: Path, request: dict[str, Any], rule: dict[str, Any] | None, inputs: dict[str, Any]) -> None:
        """Writes `compare.json` and `compare.txt`.

        Args:
            out: The folder.
            request: Further settings: pool_draw.
            rule: {path, digest, bootstrap, spread}.
            inputs: What decides the numbers, files by their digests.
        """
        a, scoring = self.settings, self._scoring
        rendered, seconds = self.text(), None if scoring is None else scoring.seconds
        settings = {name: value for name, value in a.to_json().items() if name != "rule"}  # it has a place of its own
        if a.judge is None:
            del settings["judge"]
        arms = []
        for arm in self.result.arms_json():
            method = METHODS.get(arm["arm"])
            cost = seconds if method is not None and method.scored else 0.0
            both = None if cost is None else cost + arm["seconds"]
            arms.append({**arm, "scoring_seconds": cost, "cost_seconds": both})
        value = {
            "format": "im_lightning.compare",
            "inputs": inputs,
            "arms": arms,
            "reference": REFERENCE,
            "seeds": self.seeds,
            "settings": {**settings, **request, "method": a.tuning.title},
            "evaluation": {"name": self.result.runs.evaluation, "path": a.eval_data},
            "rule": rule,
            "scoring_seconds": seconds,
            "costs": {arm: self.costs(arm) for arm in self.result.runs.records},
            "interval": "95 %; of losses over seeds, of differences over seeds and evaluation examples",
            "differences_shown": self.result.differences_shown,
            "beyond_sources": None if self.result.beyond_sources is None else asdict(self.result.beyond_sources),
            "notes": list(self.notes),
            "rendered": rendered,
        }
        if self.result.worth is not None:
            value["curve"] = self.result.worth.to_json()
        write_json(out / "compare.json", plain(value))
        write_text(out / "compare.txt", rendered + "\n")

    def costs(self, arm: str) -> dict[str, Any]:
        """Of one finetune, and of its evidence, JSON-like."""
        finetune = mean(r.cost for r in self.result.runs.records[arm])
        return {"finetune": finetune.to_json(), "evidence": self.evidence(arm).to_json()}

    def evidence(self, arm: str) -> Cost:
        """What had to be known before an arm's rows could be chosen."""
        return evidence_of(arm, self._scoring, self.runs, self.settings.study.rule is not None)

    @cached_property
    def _scoring(self) -> Cost | None:
        return read_cost(self.settings.study.scores)

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
        judged = filter(None, self.result.judgement())
        sentences = [*self.result.sentences(), *judged, method, *self.notes, *self._cost()]
        words = [wrapped(line, WIDTH) for line in sentences]
        worth = [] if self.result.worth is None else ["", self.result.worth.text(WIDTH)]
        table = [wrapped(title, WIDTH), self.result.table(WIDTH), wrapped(note, WIDTH)]
        return "\n".join([*table, *worth, "", *words])

    def _cost(self) -> list[str]:
        scoring = self._scoring
        took = f"what scoring its {self.rows:,} rows cost was not noted beside the table"
        if scoring is not None:
            took = f"scoring its {self.rows:,} rows took {scoring.text}, once for all arms and seeds"
        out = [f'Cost: "train s" is one fit with its evaluation; {took} (random and longest need no scores).']
        if self.runs:
            spent = total(run.cost for run in self.runs)
            out.append(f"The {len(self.runs)} designed runs behind the rule took {spent.text}.")
        return out
