"""The whole loop on the playground: pool, base, scorer models, scores, designed finetunes, rule, and a comparison.

Everything goes through the layers that real data goes through; only the pool and the models are synthetic. Every
part is kept in the demo's folder as soon as it is finished, so an interrupted demo goes on where it was.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from im_lightning._utils.files import write_json
from im_lightning._utils.progress import Stages, log
from im_lightning.data.loading import load_examples, write_rows
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Encoding, Reading
from im_lightning.experiments.compare.arms import ArmRunner, ArmsSettings, Cell, usual_arms
from im_lightning.experiments.compare.statistics import BASE
from im_lightning.experiments.demo.playground.base import make_base
from im_lightning.experiments.demo.playground.judges import JudgeSettings, make_reward, make_unieval
from im_lightning.experiments.demo.playground.pool import make_evaluation, make_pool
from im_lightning.experiments.demo.result import Arms, DemoResult
from im_lightning.experiments.demo.settings import DemoFolder, DemoSettings
from im_lightning.experiments.finetuning import Study, check_seed, finetune
from im_lightning.ledger.ledger import RunLedger, designed_runs
from im_lightning.ledger.record import RunRecord
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule, Regressors
from im_lightning.rule.validation.diagnostics import condition_number, variance_inflation
from im_lightning.sampling.designs.subsets import VERSION, designed_subset
from im_lightning.sampling.selection.methods import METHODS
from im_lightning.scoring.api import score_examples
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.shared_base import shared_base

ORACLE = "oracle"
"""The arm of good rows alone, which the playground knows; it is not tested."""


def arms_of(settings: DemoSettings) -> list[str]:
    """The arms of a demo: those of a comparison whose scores it has, none balanced by source or for targets, and the
    oracle.

    The null cannot hold for methods by embeddings or by source: permuting indicators leaves these with their rows.
    """
    known = {name: METHODS[name] for name in usual_arms() if name in METHODS}
    can = [
        name
        for name, m in known.items()
        if (m.by_source or not m.sources)
        and not m.targets
        and m.column in (None, *settings.indicators)
        and not (settings.null and (m.embeddings or m.by_source))
    ]
    return [BASE, *can, ORACLE]


class Demo:
    """One demo in one folder.

    Args:
        out: Folder to write, or to go on in.
        settings: What decides its numbers.

    Raises:
        RequestError: the folder is of something else, or of other settings.
    """

    def __init__(self, out: str | os.PathLike[str], settings: DemoSettings) -> None:
        check_seed(settings.seed, 4_000_000)  # training seeds are a thousand times as large
        self.settings, self.folder = settings, DemoFolder(out)
        self.resumed = self.folder.open(settings)
        self.ledger = RunLedger(self.folder.ledger)
        self.stage = Stages(self.folder.timings)

    @shared_base()
    def run(self) -> DemoResult:
        """All stages; what is finished is not done again."""
        s = self.settings
        if self.resumed:
            log(f"going on in {self.folder.path}")
        with self.stage("pool", f"{s.pool_rows:,} rows in parts, two evaluation sets"):
            self.make_data()
        with self.stage("base", f"a LLaMA of {s.base.layers} layers, {s.base.steps} steps on other tasks"):
            self.make_base()
        if s.judges is not None:
            with self.stage("judges", "a reward model and a UniEval-type T5, on other tasks and other flaws"):
                self.make_judges(s.judges)
        with self.stage("score", ", ".join(s.indicators)):
            table = self.score()
        what = f"{s.runs} finetunes of {s.subset_rows} rows, {s.repeats} of them repeats; {s.tuning.title}"
        with self.stage("designed", what):
            self.print_design(table)
            designed = self.designed_runs()
        with self.stage("refit", "every kind of rule on the designed runs; the simplest of the best is taken"):
            rule = self.refit(designed)
        with self.stage("compare", f"{len(self.arms)} arms, {s.seeds} seeds each"):
            arms = self.compare(table)
        result = DemoResult(s, rule, arms, self.ledger, self.stage.here)
        write_json(self.folder.comparison, {**result.to_json(), "seconds": self.stage.total()})
        return result

    # stages

    def make_data(self) -> None:
        """Pool, its parts (designed runs; one fold per comparison seed) and the evaluation sets, as JSON Lines."""
        s, f = self.settings, self.folder
        rows = self.rows
        parts = {f.pool: rows, f.designed: rows[: s.designed_rows]}
        for seed in range(s.seeds):
            parts[f.fold(seed)] = self.fold(seed)
        parts[f.evaluation["fit"]] = make_evaluation("fit", s.fit_rows, s.seed)
        parts[f.evaluation["report"]] = make_evaluation("report", s.report_rows, s.seed)
        for path, part in parts.items():
            if not path.exists():
                write_rows(path, part)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The raw rows of the pool, with what only the playground knows."""
        return make_pool(self.settings.pool_rows, self.settings.seed)

    def make_base(self) -> None:
        if not (self.folder.base / "config.json").exists():
            made = make_base(self.folder.base, self.settings.base, self.settings.seed)
            log(f"  {made['parameters']:,} weights, {made['tokens']:,} tokens, {made['loss']:.2f} nats per token")

    def make_judges(self, judges: JudgeSettings) -> None:
        f, s = self.folder, self.settings
        if not (f.reward / "config.json").exists():
            made = make_reward(f.reward, f.base, judges, s.seed)
            log(f"  reward model: {made['parameters']:,} weights, {made['loss']:.2f} nats per pair")
        if not (f.unieval / "config.json").exists():
            made = make_unieval(f.unieval, judges, s.seed)
            log(f"  UniEval: {made['parameters']:,} weights, {made['loss']:.2f} nats per answer")

    def score(self) -> ScoreTable:
        """Scores of the whole pool; under `null` permuted over its rows, all columns together."""
        f, s = self.folder, self.settings
        if not (f.scores.exists() and f.cache.exists()):  # the store keeps the embeddings, which "diverse" needs
            examples = load_examples(str(f.pool))
            table = score_examples(
                examples,
                s.indicators,
                model=str(f.base),
                device="cpu",
                precision="fp32",
                cache_dir=str(f.cache),
                reward_model=str(f.reward) if s.judges else None,
                unieval_model=str(f.unieval) if s.judges else None,
            )
            (permuted(table, s.seed) if s.null else table).write(f.scores)
        return ScoreTable.read(f.scores)

    def plan(self) -> list[tuple[int, int]]:
        """(subset seed, training seed) of each designed run; the last ones repeat the first ones' subsets."""
        s, first = self.settings, 1000 * self.settings.seed
        new = s.runs - s.repeats
        return [(first + k, first + k) for k in range(new)] + [(first + k, first + new + k) for k in range(s.repeats)]

    def print_design(self, table: ScoreTable) -> None:
        """Condition number and VIF of the planned design, before any training."""
        s = self.settings
        pool = table.take(np.arange(s.designed_rows))
        scored = Regressors.of(pool, None)
        drawn = [
            designed_subset(scored.phi, pool.source, s.subset_rows, seed, None, s.subset_tilt, version=VERSION)
            for seed in dict.fromkeys(seed for seed, _ in self.plan())
        ]
        means = np.array([scored.phi[one.rows].mean(axis=0) for one in drawn])
        vif = ", ".join(f"{n} {v:.1f}" for n, v in zip(scored.names, variance_inflation(means), strict=True))
        log(f"  design of {len(means)} subsets: condition number {condition_number(means):.1f}, VIF {vif}")

    def designed_runs(self) -> list[RunRecord]:
        """The designed finetunes, through Trainer, data module, module and callback, into the ledger."""
        s, f = self.settings, self.folder

        def make(subset_seed: int, training_seed: int) -> RunRecord:
            data = InstructMiningDataModule(
                str(f.designed),
                str(f.evaluation["fit"]),
                str(f.base),
                scores=str(f.scores),
                subset_size=s.subset_rows,
                subset_seed=subset_seed,
                subset_tilt=s.subset_tilt,
                subset_version=VERSION,
                batch_size=s.tuning.batch_size,
                seed=training_seed,
                cache_dir=str(f.cache),
            )
            return finetune(data, str(f.base), s.tuning, training_seed, f.ledger, f.work)

        return designed_runs(self.ledger, self.plan(), make)

    def refit(self, designed: list[RunRecord]) -> LinearRule:
        """The rule; one that is there and of the same runs stays, so that the arms' files stay valid."""
        path = self.folder.rule
        if self.settings.null:
            designed = [without_sources(run) for run in designed]
        if not path.exists() or LinearRule.load(path).ledger_digest_ != self.ledger.digest(designed):
            fit_rule(designed, method="auto", evaluation="fit", name="demo").save(path)
        return LinearRule.load(path)

    @cached_property
    def arms(self) -> list[str]:
        """The arms of this demo."""
        return arms_of(self.settings)

    def compare(self, table: ScoreTable, mixture: str | None = None) -> Arms:
        """Every arm with every seed at equal supervised tokens and steps; seeds share no candidate rows. `mixture` is
        the file of the arms that draw by one."""
        s, f = self.settings, self.folder
        tokens = round(s.subset_rows * (float(np.nanmean(table.values["length_output"])) + 1.0))
        settings = ArmsSettings(
            # also a rule no better than the mean: the table shows it
            Study([str(f.pool)], str(f.scores), mixture=mixture, force=True),
            Encoding(str(f.base), cache_dir=str(f.cache)),
            Reading(),
            s.tuning,
            eval_data=str(f.evaluation["report"]),
            tokens=tokens,
            steps=s.steps,
        )
        runner = ArmRunner(settings, self.ledger, f.work)
        cells = []
        for fold in range(s.seeds):
            seed = 1000 * s.seed + 500 + fold
            good = np.flatnonzero([row["quality"] for row in self.fold(fold)])
            oracle = np.random.default_rng([seed, 2]).permutation(good).tolist()
            for arm in self.arms:
                cells.append(Cell(arm, seed, str(f.fold(fold)), str(f.rule), order=oracle if arm == ORACLE else None))
        arms = Arms(runner.evaluation)
        for place, (cell, record) in enumerate(zip(cells, runner.run(runner.keyed(cells)), strict=True)):
            arms.add(cell.arm, record)
            if record.steps:
                rows = self.fold(place // len(self.arms))
                arms.add_rows(cell.arm, [rows[i] for i in record.subset["rows"]])
        return arms

    def fold(self, seed: int) -> list[dict[str, Any]]:
        """The raw candidate rows of one comparison seed."""
        start = self.settings.designed_rows + seed * self.settings.fold_rows
        return self.rows[start : start + self.settings.fold_rows]


def without_sources(run: RunRecord) -> RunRecord:
    """The run without what it tells of its sources, which permuted indicators leave with their rows."""
    subset = {name: value for name, value in run.subset.items() if name != "source_shares"}
    return replace(run, subset=subset, source_phi_means={})


def permuted(table: ScoreTable, seed: int) -> ScoreTable:
    """The table with its indicators permuted over rows, one permutation for all columns: their joint distribution
    stays, and says nothing about the rows any more."""
    order = np.random.default_rng([seed, 9]).permutation(len(table))
    values = {name: column[order] for name, column in table.values.items()}
    reasons = {name: [column[i] for i in order.tolist()] for name, column in table.reasons.items()}
    return ScoreTable(table.row, table.id, table.source, values, reasons, table.keys, {**table.meta, "permuted": seed})
