"""Sizes of the demo, and the folder it works in: where its parts are, and whether they are of these settings."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from im_lightning import __version__
from im_lightning._utils.files import write_json
from im_lightning._utils.outputs import settings_there
from im_lightning.experiments.demo.playground.base import BaseSettings
from im_lightning.experiments.demo.playground.judges import JudgeSettings
from im_lightning.experiments.finetuning import TuningSettings
from im_lightning.indicators.built_in import DESIGNED_INDICATORS

JUDGED_INDICATORS = ("reward", "naturalness", "coherence", "understandability")

_TUNING = TuningSettings(learning_rate=1e-3, warmup_ratio=0.1, device="cpu", dtype="fp32")


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides a demo's numbers.

    Args:
        name: full, fast, ….
        seed: Generator seed: the pool, the base, designs, draws.
        null: Permute the indicators over rows before anything uses them.
        base: The base model.
        judges: The reward model and UniEval, for all nine indicators of the paper; None for the five of text alone.
        tuning: How every finetune is made.
        designed_rows: Pool rows for designed runs.
        fold_rows: Pool rows of one comparison seed, shared with no other seed.
        fit_rows, report_rows: Of the two evaluation sets.
        runs: Designed finetunes, repeats included.
        repeats: How many of them repeat the subset of another with another training seed.
        subset_rows: Rows of a designed subset; arms get their number of supervised tokens and steps.
        subset_tilt: Of designed subsets, in sd of the pool.
        seeds: Comparison seeds.
        conclusive: Whether the sizes allow a conclusion.
    """

    name: str = "full"
    seed: int = 0
    null: bool = False
    base: BaseSettings = field(default_factory=BaseSettings)
    judges: JudgeSettings | None = field(default_factory=JudgeSettings)
    tuning: TuningSettings = _TUNING
    designed_rows: int = 4000
    fold_rows: int = 2400
    fit_rows: int = 320
    report_rows: int = 480
    runs: int = 60
    repeats: int = 6
    subset_rows: int = 300
    subset_tilt: float = 0.5
    seeds: int = 10
    conclusive: bool = True

    @property
    def indicators(self) -> tuple[str, ...]:
        return DESIGNED_INDICATORS if self.judges is None else DESIGNED_INDICATORS + JUDGED_INDICATORS

    @property
    def pool_rows(self) -> int:
        return self.designed_rows + self.seeds * self.fold_rows

    @property
    def steps(self) -> int:
        """Optimiser steps of a designed run, and of every arm."""
        return -(-self.subset_rows // self.tuning.batch_size)


FULL = DemoSettings()
FAST = DemoSettings(
    name="fast",
    base=BaseSettings(hidden=64, steps=300, documents=12_000),
    judges=None,
    designed_rows=1800,
    fold_rows=1200,
    fit_rows=160,
    report_rows=240,
    runs=16,
    repeats=2,
    subset_rows=200,
    seeds=2,
    conclusive=False,
)
"""Without scorer models: training them and asking them takes longer than all the rest, and 16 runs tell nine
indicators apart badly."""


class DemoFolder:
    """Where the demo keeps its parts; every one appears whole or not at all.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.settings = self.path / "demo.json"
        self.pool = self.path / "pool.jsonl"
        self.designed = self.path / "parts" / "designed.jsonl"
        self.evaluation = {name: self.path / "evaluation" / f"{name}.jsonl" for name in ("fit", "report")}
        self.base = self.path / "base"
        self.reward = self.path / "reward"
        self.unieval = self.path / "unieval"
        self.scores = self.path / "scores.parquet"
        self.ledger = self.path / "ledger"
        self.rule = self.path / "rule.json"
        self.comparison = self.path / "comparison.json"
        self.work = self.path / "work"
        self.cache = self.path / "work" / "cache"
        self.timings = self.path / "work" / "timings.json"

    def fold(self, seed: int) -> Path:
        """Candidate rows of one comparison seed."""
        return self.path / "parts" / f"seed-{seed}.jsonl"

    def open(self, settings: DemoSettings) -> bool:
        """Makes the folder, or goes on in one of the same settings.

        Returns:
            Whether there is something to go on from.

        Raises:
            RequestError: the folder holds something else, or a demo with other settings; says which.
        """
        wanted = {"version": __version__, **asdict(settings)}
        del wanted["tuning"]["token_budget"]  # it changes rounding alone, and earlier folders lack it
        there = settings_there(self.settings, "demo", wanted)
        if there is None:
            write_json(self.settings, wanted)
        return there is not None
