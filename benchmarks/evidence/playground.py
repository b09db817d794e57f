"""The playground of the ways: a pool, two bases, scores, and every run that is made once and then bought from.

Runs are made as a user makes them: `im-lightning design` writes the sweep file, `im-lightning sweep` makes them and
goes on after an interruption. Full runs record their curve, so that a run stopped early needs no training of its own:
what it would have recorded is a point of the curve, to the last bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.evidence.budget import MergedPlan, Prices, flops
from im_lightning import cli
from im_lightning._utils.files import parse_json, write_json
from im_lightning.data.loading import load_examples, write_rows
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Encoding
from im_lightning.errors import InstructMiningError, message
from im_lightning.experiments.demo.playground.base import BaseSettings, make_base
from im_lightning.experiments.demo.playground.pool import make_evaluation
from im_lightning.experiments.demo.run import Demo
from im_lightning.experiments.demo.settings import DemoSettings
from im_lightning.experiments.finetuning import TuningSettings
from im_lightning.experiments.sweep.file import read_sweep
from im_lightning.experiments.sweep.run import SweepSummary, run_sweep
from im_lightning.indicators.base import get_indicators
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import MERGED, RunRecord
from im_lightning.models.cost import Cost, base_parameters
from im_lightning.scoring.api import execute_plan
from im_lightning.scoring.plan import ScoringPlan
from im_lightning.scoring.settings import Numerics, ScorerModels, Setup

POINTS = (0.1, 0.2, 0.5)
"""Where full runs are evaluated besides their end, as shares of their steps."""
PER_ROW = ("loss_drop", "gradient_similarity")
TIMED = 3
"""Runs of every kind that are made for their time alone, evaluated as a run of that kind is."""
DESIGNS = {"designed": 0, "test": 500_000, "merged": 800_000}
"""First seed of the candidates of each design."""


@dataclass(frozen=True)
class Sizes:
    """What is made of one generator seed.

    Args:
        demo: Pool, base, finetunes and comparison.
        small: The smaller base.
        test_runs: Further full runs, of another design seed, that the rules of all ways are tested on.
        target_rows: For `loss_drop` and `gradient_similarity`.
        block_rows: Of a block whose adapter is merged.
    """

    demo: DemoSettings
    small: BaseSettings
    test_runs: int
    target_rows: int
    block_rows: int


TUNING = TuningSettings(lora_rank=16, learning_rate=3e-3, warmup_ratio=0.1, device="cpu", dtype="fp32", batch_size=8)
"""LoRA, since what is merged are adapters; at this rate it comes nearest to full finetuning on the playground."""
FULL = Sizes(
    DemoSettings(
        name="evidence", judges=None, tuning=TUNING, designed_rows=2000, fold_rows=1000, fit_rows=120, report_rows=480,
        runs=60, repeats=0, subset_rows=256, seeds=8,
    ),
    BaseSettings(hidden=32, layers=1, heads=2, steps=300, documents=12_000), test_runs=60, target_rows=60,
    block_rows=64,
)  # fmt: skip
FAST = Sizes(
    replace(
        FULL.demo, name="evidence, fast", base=BaseSettings(hidden=32, steps=60, batch=16, documents=2000),
        designed_rows=600, fold_rows=300, fit_rows=24, report_rows=60, runs=24, subset_rows=48, seeds=2,
        conclusive=False,
    ),
    BaseSettings(hidden=16, layers=1, heads=2, steps=60, batch=16, documents=2000), test_runs=12, target_rows=16,
    block_rows=12,
)  # fmt: skip


class Playground(Demo):
    """One generator seed in one folder; what is finished is not done again.

    Args:
        out: Its folder.
        sizes: What to make.

    Raises:
        RequestError: the folder is of something else, or of other settings.
    """

    def __init__(self, out: Path, sizes: Sizes) -> None:
        super().__init__(out, sizes.demo)
        self.evaluation, self.indicators = "fit", sizes.demo.indicators
        self.sizes, self.out = sizes, out.resolve()
        self._seconds = self.out / "processor_seconds.json"

    # processor time

    @property
    def seconds(self) -> dict[str, float]:
        """What → processor seconds over all calls."""
        return dict(parse_json(self._seconds.read_bytes())) if self._seconds.exists() else {}

    @contextmanager
    def clocked(self, what: str) -> Iterator[None]:
        """Adds the processor seconds of the work inside, also of work that is interrupted."""
        start = time.process_time()
        try:
            yield
        finally:
            known = self.seconds
            write_json(self._seconds, {**known, what: known.get(what, 0.0) + time.process_time() - start})

    # what is there before any run

    def prepare(self) -> None:
        """Pool, evaluation sets, targets, both bases, scores and what scoring cost."""
        self.make_data()
        rows = make_evaluation("fit", self.settings.fit_rows + self.sizes.target_rows, self.settings.seed)
        if not self.targets.exists():  # of the evaluation set's kind, and none of its rows
            write_rows(self.targets, rows[self.settings.fit_rows :])
        self.make_base()
        if not (self.small / "config.json").exists():
            make_base(self.small, self.sizes.small, self.settings.seed)
        self.score()
        if not self.scores.exists():
            ScoreTable.read(self.folder.scores).take(np.arange(self.settings.designed_rows)).write(self.scores)

    @property
    def targets(self) -> Path:
        return self.out / "evaluation" / "targets.jsonl"

    @property
    def small(self) -> Path:
        return self.out / "small"

    @property
    def scores(self) -> Path:
        """Of the rows of designed runs."""
        return self.out / "designed.parquet"

    def score(self) -> ScoreTable:
        """Scores of the whole pool. The designed rows come first, kind by kind: that is the evidence's cost."""
        if self.folder.scores.exists():
            return ScoreTable.read(self.folder.scores)
        designed, costs = load_examples(str(self.folder.designed)), self.scoring_costs()
        for part in (self.settings.indicators, *((name,) for name in PER_ROW)):
            if (name := part[-1]) not in costs:
                with self.clocked(f"scoring {name}"):
                    _, coverage = execute_plan(ScoringPlan(designed, get_indicators(part), self._setup))
                costs[name] = sum(step.flops for step in coverage.steps)
                write_json(self.out / "scoring_flops.json", costs)
        every = (*self.settings.indicators, *PER_ROW)
        plan = ScoringPlan(load_examples(str(self.folder.pool)), get_indicators(every), self._setup)
        execute_plan(plan)[0].write(self.folder.scores)
        return ScoreTable.read(self.folder.scores)

    def scoring_costs(self) -> dict[str, float]:
        """Indicator → operations; the text's are under the last of them."""
        path = self.out / "scoring_flops.json"
        return dict(parse_json(path.read_bytes())) if path.exists() else {}

    @property
    def _setup(self) -> Setup:
        return Setup(
            Encoding(str(self.folder.base), cache_dir=str(self.folder.cache)),
            ScorerModels(targets=str(self.targets)),
            Numerics(precision="fp32", device="cpu"),
        )

    # runs

    def design(self, name: str, runs: int, *more: str) -> Path:
        """The sweep file of a design, whose runs are on rows that its first seed decides."""
        path = self.out / "designs" / f"{name}.yaml"
        if path.exists():
            return path
        path.parent.mkdir(exist_ok=True)
        s, recipe = self.settings, self.out / "recipe.yaml"
        t = s.tuning
        recipe.write_text(json.dumps({
            "seed_everything": 0,
            "data": {
                "eval_data": str(self.out / "evaluation" / "fit.jsonl"), "model": str(self.out / "base"),
                "batch_size": t.batch_size, "cache_dir": str(self.out / "work" / "cache"),
            },
            "model": {
                "lora_rank": t.lora_rank, "learning_rate": t.rate, "warmup_ratio": t.warmup_ratio, "dtype": t.dtype,
            },
            "mining": {"refit": False},
            "trainer": {
                "max_epochs": t.epochs, "accelerator": "cpu", "devices": 1, "logger": False,
                "enable_checkpointing": False, "enable_progress_bar": False, "gradient_clip_val": t.gradient_clip,
                "default_root_dir": str(self.out / "work"),
            },
        }, indent=1))  # fmt: skip
        seed = DESIGNS[name.split("-")[0]] + 1000 * s.seed
        words = [
            "design", str(self.scores), str(self.out / "parts" / "designed.jsonl"), "--config", str(recipe), "--runs",
            str(runs), "--subset-size", str(s.subset_rows), "--subset-tilt", str(s.subset_tilt), "--first-seed",
            str(seed), "--out", str(path), *more,
        ]  # fmt: skip
        if cli.main(words):
            raise InstructMiningError(message(f"the design {name}", "im-lightning design failed", "see above"))
        return path

    def sweep(self, design: Path, name: str, *words: str, count: int | None = None) -> SweepSummary:
        """Makes the runs of a design, in the ledger `ledgers/<name>`."""
        given = [f"--mining.ledger={self.ledger_of(name).path}", *words]
        summary = run_sweep(read_sweep(str(design)).with_arguments(given), str(self.out / "sweeps" / name), count)
        summary.check()
        return summary

    def ledger_of(self, name: str) -> RunLedger:
        return RunLedger(self.out / "ledgers" / name)

    def _runs(self, design: str, name: str, count: int, *words: str) -> list[RunRecord]:
        """Full runs with their curve, in the order of the design."""
        curve = f"--mining.eval_at={','.join(map(str, POINTS))}"
        file = self.design(design, count, "--repeats", "0")
        summary = self.sweep(file, name, curve, *words)
        known = {r.run_id: r for r in self.ledger_of(name).records()}
        return [known[trial.run_id] for trial in summary.state.trials]

    @cached_property
    def designed(self) -> list[RunRecord]:
        """The full runs that ways buy from."""
        return self._runs("designed", "designed", self.settings.runs)

    @cached_property
    def tests(self) -> list[RunRecord]:
        """Those that the rules of all ways are tested on."""
        return self._runs("test", "test", self.sizes.test_runs)

    @cached_property
    def smaller(self) -> list[RunRecord]:
        """The subsets of the designed runs under the smaller base, with the scores of the base."""
        return self._runs("designed", "small", self.settings.runs, f"--data.model={self.small}")

    def merged(self, plan: MergedPlan) -> tuple[list[RunRecord], list[RunRecord], list[RunRecord]]:
        """Blocks, twins and merged runs of a plan."""
        name = self.merged_name(plan)
        sizes = ["--blocks", str(plan.blocks), "--block-size", str(self.sizes.block_rows), "--twins", str(plan.twins)]
        file = self.design(name, plan.mixtures, "--kind", MERGED, *sizes)
        made = sum(r.kind == MERGED for r in self.ledger_of(name).records()) == plan.mixtures
        with nullcontext() if made else self.clocked(name):
            summary = self.sweep(file, name)
        trials = summary.state.trials
        known = {r.run_id: r for r in self.ledger_of(name).records()}
        trained = [known.pop(trial.run_id) for trial in trials]
        return trained[: plan.blocks], trained[plan.blocks :], sorted(known.values(), key=lambda r: r.run_id)

    @staticmethod
    def merged_name(plan: MergedPlan) -> str:
        return f"merged-{plan.blocks}-{plan.twins}-{plan.mixtures}"

    # what they cost

    def _timed(self, name: str, *words: str) -> float:
        """Median processor seconds of runs of this kind, evaluated once, their start included."""
        if name not in self.seconds:
            summary = self.sweep(self.design("designed", self.settings.runs), name, *words, count=TIMED)
            took = float(np.median([trial.processor_seconds for trial in summary.state.trials]))
            write_json(self._seconds, {**self.seconds, name: took})
        return self.seconds[name]

    @cached_property
    def run_seconds(self) -> dict[tuple[str, float | None], float]:
        """(base or small, point of the stop) → processor seconds of a run."""
        out = {}
        for base, words in (("base", ()), ("small", (f"--data.model={self.small}",))):
            for point in (None, *POINTS):
                stop = () if point is None else (f"--mining.stop_at={point}",)
                out[base, point] = self._timed(f"timed-{base}-{point or 'end'}", *words, *stop)
        return out

    @cached_property
    def prices(self) -> Prices:
        """In full runs; tokens are means over the designed runs."""
        looks = len(POINTS) + 1
        trained = float(np.mean([r.compute["tokens_trained"] for r in self.designed]))
        read = float(np.mean([r.compute["tokens_evaluated"] for r in self.designed])) / looks
        small = base_parameters(self.small) / base_parameters(self.folder.base)
        return Prices(trained, read, self.designed[0].steps, small)

    @cached_property
    def mean_flops(self) -> float:
        """Operations of a full run."""
        return float(np.mean([flops(r) for r in self.designed]))

    def scoring(self, name: str) -> Cost:
        """What an indicator of rows cost, over the designed rows."""
        return Cost(self.scoring_costs()[name], self.seconds[f"scoring {name}"])
