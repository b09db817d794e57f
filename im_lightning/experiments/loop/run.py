"""The whole loop on a user's own data, in one folder: scores, designed runs, rule, and a comparison.

Each stage is the function behind a command of its own; what is finished is not done again.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from im_lightning._utils.numbers import time_text
from im_lightning._utils.progress import Stages, log
from im_lightning.data.loading import LoadedRow, Refuses, iter_rows, write_rows
from im_lightning.data.overlap.keys import left_out, prompt_groups
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.experiments.compare.arms import ArmsSettings
from im_lightning.experiments.compare.equal_tokens import settle_pool_draw
from im_lightning.experiments.compare.result import CompareReport
from im_lightning.experiments.compare.run import CompareSettings, CompareStudy
from im_lightning.experiments.finetuning import Study, check_seed, finetune, tuning_module
from im_lightning.experiments.fit_estimate import Speed, measure_speed
from im_lightning.experiments.loop.cost import Sizes, runs_within, seconds_of, subset_rows_of
from im_lightning.experiments.loop.result import LoopResult
from im_lightning.experiments.loop.settings import USUAL_RUNS, LoopFolder, LoopSettings
from im_lightning.indicators.base import get_indicators
from im_lightning.indicators.built_in import DESIGNED_INDICATORS
from im_lightning.ledger.ledger import RunLedger, designed_runs
from im_lightning.ledger.record import RunRecord
from im_lightning.models.cost import note_cost
from im_lightning.models.fingerprint import checkpoint_identity, folder_identity
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.plan_runs import DesignPlan, plan_runs
from im_lightning.sampling.rows import settle_exclusion
from im_lightning.scoring.api import execute_plan
from im_lightning.scoring.plan import ScoringPlan
from im_lightning.scoring.settings import Engine, Numerics, ScorerModels, Setup
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.evaluation import EvalSet
from im_lightning.training.run.encoded_pool import Collate, Pool, coding_of, encoded_pool, read_pool
from im_lightning.training.run.inputs import read_scores
from im_lightning.training.shared_base import release_base, shared_base

LEAST_EVALUATION, MOST_EVALUATION = 10, 200
"""Rows of each half of the evaluation data."""
TILT = 1.0
_SAMPLE_ROWS = 1000  # of which tokens are counted
_AS_DRAWN = "as drawn"  # how a loop's subsets are planned: on the rows that its runs may draw; earlier ones on fewer


class Loop:
    """One loop in one folder.

    Args:
        out: Folder to write, or to go on in.
        settings: What decides its numbers.

    Raises:
        RequestError: sizes that cannot be; no model; a folder of something else, or of other settings.
    """

    def __init__(self, out: str | os.PathLike[str], settings: LoopSettings) -> None:
        settings.check()
        check_seed(settings.seed)
        self.settings, self.folder = settings, LoopFolder(out)
        s, e = settings, settings.encoding
        self.refuses: Refuses | None = None
        begun = self.folder.settings.exists()
        self.halves = [] if begun else self._halves()  # refused before a model is asked for and the pool is read
        self.coding = coding_of(e)
        self.refuses = self.coding.template.refusal
        self.halves = [] if begun else self._halves()
        self.pool = read_pool(s.data, s.reading, self.refuses)
        self.inputs = {
            "pool": self.pool.digest,
            "evaluation": read_pool(s.eval_data, s.reading, self.refuses).digest,
            "model": checkpoint_identity(str(e.model), e.revision, e.cache_dir),
            "embedding_model": None if s.embedding_model is None else folder_identity(s.embedding_model),
        }
        self.decided = self.folder.open(settings, self.inputs)
        if self.decided is not None:  # begun: its own parts, which earlier versions cut by rows
            self.halves = [self._rows(str(path)) for path in (self.folder.fit, self.folder.verdict)]
        self.ledger = RunLedger(self.folder.ledger)
        self.stage = Stages(self.folder.work / "timings.json")

    @shared_base()
    def run(self, dry_run: bool = False) -> LoopResult | None:
        """All stages; with `dry_run` none of them, but `decided` says what they would cost."""
        s = self.settings
        if self.decided is None:
            self.decided = self._decide()
            if dry_run:
                return None
            log(self.decided["cost"])
            for path, half in zip((self.folder.fit, self.folder.verdict), self.halves, strict=True):
                write_rows(path, [row.raw for row in half])
            self.folder.decide(s, self.inputs, self.decided)
        else:
            log(f"going on in {self.folder.path}" + ("" if dry_run else f": {self.decided['cost']}"))
            if dry_run:
                return None
        runs = self.decided["runs"]
        with self.stage("scoring", f"{', '.join(DESIGNED_INDICATORS)} of {len(self.pool):,} rows"):
            table = self._score()
        with self.stage("designed runs", f"{runs} finetunes of {self.sizes.subset_rows} rows; {s.tuning.title}"):
            designed = self._designed_runs(table)
        with self.stage("rule", "every kind of rule on the designed runs; the simplest of the best is taken"):
            rule, refusal = self._refit(designed)
        names = [
            "base",
            "random",
            *(["weighted"] if rule is not None else []),
            *(["full"] if self.decided["full"] else []),
        ]
        with self.stage("comparison", f"{', '.join(names)}; {s.seeds} seeds"):
            comparison = self._compare(names)
        return LoopResult(self.decided, rule, refusal, comparison, self.stage.total())

    # before

    def _rows(self, data: str) -> list[LoadedRow]:
        """Rows of evaluation data, each content once; without those that the template refuses, once there is one."""
        rows = iter_rows(data, rejected=[], refuses=self.refuses, **asdict(self.settings.reading))
        return list({row.example.id: row for row in rows}.values())

    def _halves(self) -> list[list[LoadedRow]]:
        """The two halves of the evaluation rows: one the rule is fitted on, and one that it never sees; rows of one
        prompt are in the same."""
        s = self.settings
        kept = self._rows(s.eval_data)
        prompts = prompt_groups(row.example for row in kept)
        order = np.random.default_rng([s.seed, 11]).permutation(len(np.unique(prompts)))
        place = np.argsort(order)[prompts]
        ends = np.cumsum(np.bincount(place, minlength=1))
        cut = int(ends[np.abs(ends - (len(kept) + 1) // 2).argmin()])
        if (fewer := min(cut, len(kept) - cut)) < LEAST_EVALUATION:
            cause = f"it has {len(kept)} different rows, half of which fit the rule and half of which evaluate it"
            if len(kept) >= 2 * LEAST_EVALUATION:
                cause += f"; rows of one prompt stay together, which leaves one half {fewer} (prompts: {len(order)})"
            remedy = f"give {2 * LEAST_EVALUATION} or more, of as many prompts; some hundreds make the intervals narrow"
            raise RequestError(message(f"--eval-data {s.eval_data}", cause, remedy))
        halves = np.split(np.argsort(place, kind="stable"), [cut])
        return [[kept[i] for i in np.sort(half[:MOST_EVALUATION])] for half in halves]

    @cached_property
    def sizes(self) -> Sizes:
        """Of the parts, from the data."""
        s = self.settings
        rows, batch = len(self.pool), s.tuning.batch_size * s.tuning.accumulate
        subset = subset_rows_of(rows, batch)
        if subset > rows // 2:
            cause = f"it has {rows:,} rows, and subsets of {subset} could hardly differ"
            raise RequestError(message(", ".join(s.data), cause, "give a larger pool"))
        sample = np.random.default_rng([s.seed, 12]).permutation(rows)[:_SAMPLE_ROWS]
        draw = settle_pool_draw("auto", rows, subset, s.seeds)
        halves = [Pool([row.example for row in half]) for half in self.halves]
        fit, verdict = (float(self._lengths(half, np.arange(len(half))).sum()) for half in halves)
        candidates = rows // s.seeds if draw == "folds" else rows
        each = float(self._lengths(self.pool, sample).mean())
        return Sizes(
            rows,
            each,
            subset,
            batch,
            s.tuning.epochs,
            fit_tokens=fit,
            verdict_tokens=verdict,
            seeds=s.seeds,
            candidates=candidates,
            passes=2 if s.embedding_model is None else 1,
        )

    def _lengths(self, pool: Any, rows: np.ndarray) -> np.ndarray:
        """Tokens of these rows, prompt and template included, cut as in training."""
        return encoded_pool(pool, self.coding).lengths(rows)

    def _decide(self) -> dict[str, Any]:
        """How many runs, whether there is an arm of all rows, and what it costs."""
        s, z = self.settings, self.sizes
        speed = self._measure()
        runs, full = (s.runs or USUAL_RUNS), True
        if s.budget_minutes is not None:
            runs, full = runs_within(z, speed, s.budget_minutes)
        seconds = seconds_of(z, speed, runs, full)
        parts = ", ".join(f"{stage} {time_text(value)}" for stage, value in seconds.items())
        cost = (
            f"{runs} designed runs of {z.subset_rows} rows ({z.steps} steps of {z.batch_size}), then random rows, "
            f"weighted rows{' and all rows' if full else ''} with {z.seeds} seeds; about "
            f"{time_text(sum(seconds.values()))} on this machine ({parts})"
        )
        used = f"{speed.memory / 2**20:,.0f} MiB of memory at most in the steps timed"
        log(f"{len(self.pool):,} rows of {z.row_tokens:.0f} tokens; {s.tuning.title}; {used}")
        if not full:
            log("no comparison with all rows: they alone would take longer than the budget leaves")
        if unused := len(self._rows(s.eval_data)) - sum(map(len, self.halves)):
            log(f"{s.eval_data}: {unused:,} of its rows are not used, for each half takes {MOST_EVALUATION}")
        return {"runs": runs, "full": full, "cost": cost, "seconds": seconds, "planned": _AS_DRAWN}

    def _measure(self) -> Speed:
        """Some steps of a finetune, timed."""
        s = self.settings
        log("measuring this machine on some steps of a finetune")
        collate = Collate(self.coding.tokenizer, self.coding.embeddings)
        fit = EvalSet("fit", encoded_pool(Pool([row.example for row in self.halves[0]]), self.coding), collate, 8192)
        module = tuning_module(str(s.encoding.model), s.tuning, s.encoding.revision)
        return measure_speed(module, encoded_pool(self.pool, self.coding), [fit], collate, s.tuning.torch_device)

    # stages

    def _score(self) -> ScoreTable:
        s, f = self.settings, self.folder
        if not f.scores.exists():
            release_base()
            numerics = Numerics(device=s.tuning.device)
            setup = Setup(s.encoding, ScorerModels(embedding_model=s.embedding_model), numerics, Engine())
            plan = ScoringPlan(self.pool.examples, get_indicators(DESIGNED_INDICATORS), setup, None)
            table, coverage = execute_plan(plan)
            for line in coverage.lines():
                log(line)
            table.note_refused(self.pool.rejected)  # the report reads the pool without them, too
            table.write(f.scores)
            note_cost(f.scores, coverage.steps)
        return read_scores(str(f.scores), self.pool)

    def _plan(self, table: ScoreTable) -> DesignPlan:
        s, f = self.settings, self.folder
        assert self.decided is not None
        parts = (f.fit,) if self.decided.get("planned") == _AS_DRAWN else (f.fit, f.verdict)
        evaluated = [one for path in parts for one in read_pool(str(path), s.reading).examples]
        shared = left_out(self.pool.examples, evaluated, self.exclude)
        runs, size = self.decided["runs"], self.sizes.subset_rows
        return plan_runs(table, self.pool.sources, shared, runs, size, first_seed=1000 * s.seed, subset_tilt=TILT)

    @cached_property
    def exclude(self) -> str:
        """What is left out of the pool for the evaluation rows; a loop that was begun goes on with its own."""
        return settle_exclusion(None, self.ledger.records("designed"))

    def _designed_runs(self, table: ScoreTable) -> list[RunRecord]:
        """The finetunes that the ledger lacks, through Trainer, data module, module and callback."""
        s, f = self.settings, self.folder
        plan = self._plan(table)
        pairs = [(int(one.design["seed"]), s.seed) for one in plan.subsets]
        pairs += [(int(one.design["seed"]), s.seed + 1) for one in plan.repeats]

        def make(subset_seed: int, training_seed: int) -> RunRecord:
            data = InstructMiningDataModule(
                s.data,
                str(f.fit),
                scores=str(f.scores),
                subset_size=self.sizes.subset_rows,
                subset_seed=subset_seed,
                subset_tilt=TILT,
                subset_version=int(plan.subsets[0].design["version"]),
                batch_size=s.tuning.batch_size,
                seed=training_seed,
                exclude=self.exclude,
                **asdict(s.encoding),
                **asdict(s.reading),
            )
            return finetune(data, str(s.encoding.model), s.tuning, training_seed, f.ledger, f.work)

        return designed_runs(self.ledger, pairs, make)

    def _refit(self, designed: list[RunRecord]) -> tuple[LinearRule | None, str]:
        """The rule, and why it is refused, or ""; a refused one is kept in its file and not used."""
        path = self.folder.rule
        if not path.exists() or LinearRule.load(path).ledger_digest_ != self.ledger.digest(designed):
            try:
                fit_rule(designed, "auto", evaluation=self.folder.fit.stem, permutations=999, bootstrap=500).save(path)
            except RequestError as error:
                return None, f"no rule can be fitted on the designed runs ({error})"
        rule = LinearRule.load(path)
        log(rule.summary())
        return (rule, "") if rule.beats_mean is True else (None, self._refusal(rule))

    def _refusal(self, rule: LinearRule) -> str:
        """Why a rule is not used; where the sources of the rows alone tell more than it, what to try with them."""
        f, own = self.folder, rule.metrics_.grouped_r2 or 0.0
        shares = rule.metrics_.rivals.get("sources", {}).get("grouped_r2")
        text = f"the rule is no better than the mean of its runs (held-out R² {own:.2g})"
        if shares is None or shares <= max(own, 0.0):
            return text
        mix = f"im-lightning mix {f.ledger} --scores {f.scores} --budget {self.sizes.subset_rows}"
        return f"{text}; the shares of the sources alone hold out {shares:.2g}, and `{mix}` seeks a mixture of them"

    def _compare(self, names: list[str]) -> CompareReport:
        """Every arm at the supervised tokens and steps of a designed run, on rows that no rule has seen."""
        s, f, z = self.settings, self.folder, self.sizes
        sample = np.random.default_rng([s.seed, 12]).permutation(len(self.pool))[:_SAMPLE_ROWS]
        each = encoded_pool(self.pool, self.coding).tokens(sample).mean()
        rule = str(f.rule) if "weighted" in names else None
        arms = ArmsSettings(
            Study(s.data, str(f.scores), rule, seed=s.seed, exclude=self.exclude),
            s.encoding,
            s.reading,
            s.tuning,
            eval_data=str(f.verdict),
            tokens=round(z.subset_rows * float(each)),
            steps=z.steps,
        )
        return CompareStudy(CompareSettings(arms, tuple(names), s.seeds), f.compare).run()
