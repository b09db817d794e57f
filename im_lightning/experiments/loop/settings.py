"""What a loop is asked for, and the folder it works in: its parts, and whether they are of these settings."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from im_lightning._utils.files import write_json
from im_lightning._utils.outputs import settings_there
from im_lightning.data.settings import Encoding, Reading
from im_lightning.errors import RequestError, message
from im_lightning.experiments.finetuning import TuningSettings
from im_lightning.indicators.built_in import DESIGNED_INDICATORS

LEAST_RUNS, MOST_RUNS = 9, 60
"""Five regressors want eight different subsets and one repeat; sixty runs are comfortable."""
USUAL_RUNS = 24
_ROUNDING = frozenset({"token_budget"})
"""Settings that change rounding alone: a loop that ran out of memory goes on with smaller micro-batches."""


@dataclass(frozen=True)
class LoopSettings:
    """Everything that decides a loop's numbers.

    Args:
        data: The pool.
        eval_data: Evaluation rows; half of their prompts fit the rule, the others evaluate it.
        encoding, reading, tuning: Base model, form of the rows, finetunes.
        embedding_model: Of knn_6; the base model's mean states without one.
        runs: Designed runs, or None.
        budget_minutes: What the loop may take, or None; decides the runs.
        seeds: Of the comparison.
        seed: Of the design, the draws and the training.
    """

    data: list[str]
    eval_data: str
    encoding: Encoding
    reading: Reading
    tuning: TuningSettings
    embedding_model: str | None = None
    runs: int | None = None
    budget_minutes: float | None = None
    seeds: int = 3
    seed: int = 0

    def check(self) -> None:
        """Refuses sizes that cannot be.

        Raises:
            RequestError: both sizes, too few runs, no seed, no time.
        """
        if self.runs is not None and self.budget_minutes is not None:
            cause = "--runs and --budget-minutes both decide the size"
            raise RequestError(message("run", cause, "give one of them"))
        if self.runs is not None and self.runs < LEAST_RUNS:
            cause = f"{len(DESIGNED_INDICATORS)} indicators are not told apart by so few"
            raise RequestError(message(f"--runs {self.runs}", cause, f"make {LEAST_RUNS} or more"))
        if self.budget_minutes is not None and not 0 < self.budget_minutes < math.inf:
            raise RequestError(message(f"--budget-minutes {self.budget_minutes}", "it is no time", "give minutes"))
        if self.seeds < 1:
            raise RequestError(message(f"--seeds {self.seeds}", "there is nothing to compare", "give 2 or more"))


class LoopFolder:
    """Where a loop keeps its parts; every one appears whole or not at all.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.settings = self.path / "run.json"
        self.fit = self.path / "parts" / "fit.jsonl"
        self.verdict = self.path / "parts" / "verdict.jsonl"
        self.scores = self.path / "scores.parquet"
        self.ledger = self.path / "runs"
        self.rule = self.path / "runs" / "rule.json"
        self.compare = self.path / "compare"
        self.work = self.path / "work"
        self.text = self.path / "run.txt"
        self.report = self.path / "report.html"

    def open(self, settings: LoopSettings, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """What was decided when the loop began (`decide`); None where it has not begun.

        Args:
            settings: What is asked for.
            inputs: Digests of what is read.

        Raises:
            RequestError: the folder holds something else, or a loop with other settings; says which.
        """
        scraps = {
            self.work,
            self.settings.parent / "parts",
        }  # what dry runs of earlier versions, and a run that was stopped before it began, leave
        there = settings_there(self.settings, "run", self._asked(settings, inputs), scraps, _ROUNDING)
        return None if there is None else dict(there["decided"])

    def decide(self, settings: LoopSettings, inputs: dict[str, Any], decided: dict[str, Any]) -> None:
        """Begins: keeps what was asked for and what follows from it."""
        write_json(self.settings, {"settings": self._asked(settings, inputs), "decided": decided})

    @staticmethod
    def _asked(settings: LoopSettings, inputs: dict[str, Any]) -> dict[str, Any]:
        """JSON-like, without names of places: a moved file is the same file."""
        value = asdict(settings)
        for place in ("data", "eval_data", "embedding_model"):
            value.pop(place)
        encoding = {k: v for k, v in value["encoding"].items() if k not in ("model", "revision", "cache_dir")}
        if encoding["turns"] == "last":  # newer than some folders
            del encoding["turns"]
        return {**value, "encoding": encoding, "inputs": inputs}
