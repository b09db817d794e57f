"""`im-lightning search`: how many rows to finetune on. Searched on one evaluation set, reported on another.

Each trial is an ordinary finetune on rows drawn by the rule's weights, kept in the ledger with purpose "search". The
search sees the loss on the search set alone. What it chose and the sizes of a plain grid are then trained anew, with
seeds that the search did not see, and compared on the report set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from im_lightning._utils.hashing import digest_bytes, digest_json
from im_lightning._utils.outputs import Replacing
from im_lightning._utils.progress import log, progress
from im_lightning.data.overlap.keys import EXACT, left_out
from im_lightning.data.tokenization import template_key
from im_lightning.errors import RequestError, message
from im_lightning.experiments.finetuning import StudySettings, check_out, check_rule, check_seed, check_unseen, finetune
from im_lightning.experiments.search.proposals import METHODS, Point, Space, blendsearch, grid
from im_lightning.experiments.search.result import SearchReport
from im_lightning.ledger.ledger import KeyedRuns, RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.models.fingerprint import checkpoint_identity
from im_lightning.rule.published import load_rule
from im_lightning.rule.rule_file import rule_digest
from im_lightning.sampling.rows import settle_exclusion
from im_lightning.sampling.selection.select import choose_rows
from im_lightning.sampling.weights.quality_weights import Weighting
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.run.encoded_pool import Pool
from im_lightning.training.run.inputs import read_scores
from im_lightning.training.shared_base import shared_base

OBJECTIVES = ("finetune", "predicted")
SETS = ("search", "report")


@dataclass(frozen=True, kw_only=True)
class SearchSettings(StudySettings):
    """What is searched, and how.

    Args:
        eval_data: Search set, whose loss is minimised.
        report_data: Report set; shares no row with it.
        space: Where to look.
        weighting: Of the rule's weights: auto, tilt, softmax, rank or top.
        trials: Budget of the search.
        method: blendsearch or grid.
        objective: finetune (the loss on the search set) or predicted (the rule's prediction of the rows drawn).
        grid: Sizes of the grid.
        seeds: Fits of each size on the grid, and of the chosen one, for the report.
    """

    eval_data: str
    report_data: str
    space: Space
    weighting: str = "auto"
    trials: int = 12
    method: str = "blendsearch"
    objective: str = "finetune"
    grid: int = 5
    seeds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        Weighting(self.weighting)  # names a wrong one
        for option, value, known in (("method", self.method, METHODS), ("objective", self.objective, OBJECTIVES)):
            if value not in known:
                raise RequestError(message(f"--{option}", f"there is no {value!r}", f"use one of {', '.join(known)}"))
        for option, count in (("--budget-trials", self.trials), ("--seeds", self.seeds)):
            if count < 1:
                raise RequestError(message(option, f"it is {count}", "give at least 1"))
        check_seed(self.study.seed)
        for name in ("strength", "temperature"):
            if self.method == "grid" and getattr(self.space, name) is not None:
                cause = f"a grid is of sizes, drawn at {name} 1"
                raise RequestError(message(f"--{name}-range", cause, "use --method blendsearch, or leave it out"))
        if self.study.mixture is not None:
            cause = "a search draws by the rule's weights alone"
            raise RequestError(message("--mixture", cause, "leave it out, or compare with the arm mix+rule"))
        weighting = self.weighting
        if self.space.strength is not None and weighting not in ("auto", "tilt"):
            cause = f"weighting {weighting} has no strength"
            raise RequestError(message("--strength-range", cause, "use --weighting tilt, or --temperature-range"))
        if self.space.temperature is not None and weighting not in ("softmax", "rank"):
            cause = f"weighting {weighting} may have no temperature"
            raise RequestError(message("--temperature-range", cause, "name --weighting softmax or rank with it"))


class SearchDataModule(InstructMiningDataModule):
    """The ordinary data module, whose runs carry the key that the search finds them by.

    Args:
        key: Digest of what decides the run.
        options: Of `InstructMiningDataModule`.
    """

    def __init__(self, key: str, **options: Any) -> None:
        super().__init__(**options)
        self.key = key

    def describe(self) -> dict[str, Any]:
        told = super().describe()
        return {**told, "design": {**told["design"], "key": self.key}}


class SearchStudy:
    """One search in one folder.

    Args:
        settings: What is searched.
        out: Folder for the report, the plot and the Trainers' files.
        ledger: Where trials are kept; by default OUT/ledger.
        overwrite: Whether another result there may be replaced.

    Raises:
        RequestError: the folder holds another result; the sets share rows; the rule was fitted on the report set; the
            range exceeds the pool.
    """

    def __init__(self, settings: SearchSettings, out: Path, ledger: str | None = None, overwrite: bool = False) -> None:
        self.out, self.ledger = out, RunLedger(ledger or out / "ledger")
        exclude = settle_exclusion(settings.study.exclude, self.ledger.records("search"))
        s = self.settings = replace(settings, study=replace(settings.study, exclude=exclude))
        study, encoding = s.study, s.encoding
        pool = s.pool(study.data)
        named = zip(SETS, (s.eval_data, s.report_data), strict=True)
        sets = {name: s.pool(path) for name, path in named}
        _check_apart(sets["search"], sets["report"])
        self.rule, self.table = load_rule(str(study.rule)), read_scores(study.scores, pool, encoding)
        forced = check_rule(self.rule, self.table, encoding, study.force)
        said = check_unseen(f"--report-data {s.report_data}", sets["report"], self.rule, force=study.force)
        self.notes = [*forced, *([said] if said else [])]
        evaluated = [example for one in sets.values() for example in one.examples]
        self.phi = self.rule.phi(self.table)
        self.eligible = np.isfinite(self.phi).all(axis=1)
        for mask in left_out(pool.examples, evaluated, exclude).values():
            self.eligible &= ~mask
        most = int(self.eligible.sum())
        if s.space.high >= most:
            cause = f"the pool has {most:,} rows to draw from, and drawing all of them is no choice"
            raise RequestError(message(f"--high {s.space.high}", cause, f"give at most {most - 1}"))
        self._inputs = {
            "pool": pool.digest,
            "sets": {n: one.digest for n, one in sets.items()},
            "rule": rule_digest(self.rule),
            "scores": digest_bytes(Path(study.scores).read_bytes()),
            "tuning": s.tuned,
            "model": checkpoint_identity(s.model, encoding.revision, encoding.cache_dir),
            "weighting": s.weighting,
            "template": template_key(encoding.template),
            "max_length": encoding.max_length,
            **({} if encoding.turns == "last" else {"turns": encoding.turns}),
            **({"exclude": exclude} if exclude != EXACT else {}),
        }
        self._searched = {"space": asdict(s.space), "method": s.method, "objective": s.objective, "seed": study.seed}
        self._searched |= self._inputs
        earlier = check_out(out / "search.json", ("chosen", "trials", "rendered"), self._searched, overwrite)
        Replacing(overwrite).check(out / "curve.png", "plot of a search", lambda _: bool(earlier))
        self.ledger.make()
        self.runs = KeyedRuns(self.ledger, "search")

    @shared_base()
    def run(self) -> SearchReport:
        """Searches, trains the grid and the chosen point with fresh seeds, and writes the report."""
        s = self.settings
        points = grid(s.space, s.grid)
        count = s.trials if s.method == "blendsearch" else len(points)
        with progress(f"  {s.method}", count, "trials") as bar:
            trials: list[tuple[Point, float]] = []
            tried = (
                blendsearch(s.space, s.trials, s.study.seed, self.objective)
                if s.method == "blendsearch"
                else ((point, self.objective(point)) for point in points)
            )
            for trial in tried:
                trials.append(trial)
                bar.advance()
        chosen = min(trials, key=lambda trial: trial[1])[0]
        log(f"  chosen: {chosen.title}; now the report, {s.seeds} fresh seeds each")
        compared = [*points, *([] if chosen in points else [chosen])]
        runs: dict[Point, list[RunRecord]] = {point: [] for point in compared}
        with progress("  report", s.seeds * len(compared), "runs") as bar:
            for k in range(s.seeds):
                for point in compared:
                    runs[point].append(self.finetune(point, s.study.seed + 1 + k))
                    bar.advance()
        prompts = {example.id: example.prompt_id for example in s.pool(s.report_data).examples}
        report = SearchReport(
            s.objective, s.method, trials, chosen, runs, self.ledger, self.notes, s.tuning.title, prompts=prompts
        )
        report.write(self.out, {**s.to_json(), "inputs": self._inputs}, self._searched)
        return report

    def objective(self, point: Point) -> float:
        """What the search minimises: nats per token on the search set, or the rule's predicted log loss."""
        study = self.settings.study
        if self.settings.objective == "finetune":
            return self.finetune(point, study.seed).loss("search")
        drawn = choose_rows(
            self.table,
            self.rule,
            point.size,
            seed=study.seed,
            weighting=Weighting(self.settings.weighting, point.strength, point.temperature),
            eligible=self.eligible,
        )
        return self.rule.predict_mean(self.phi[drawn.rows].mean(axis=0))[0]

    def finetune(self, point: Point, seed: int) -> RunRecord:
        """The run, found in the ledger or made."""
        key = digest_json({**self._inputs, "point": asdict(point), "seed": seed})
        return self.runs.find_or_make(key, lambda: self._make(key, point, seed))

    def _make(self, key: str, point: Point, seed: int) -> RunRecord:
        s = self.settings
        data = SearchDataModule(
            key,
            data=s.study.data,
            eval_data=dict(zip(SETS, (s.eval_data, s.report_data), strict=True)),
            rule=s.study.rule,
            budget=point.size,
            weighting=s.weighting,
            strength=point.strength,
            temperature=point.temperature,
            purpose="search",
            batch_size=s.tuning.batch_size,
            seed=seed,
            **s.options,
        )
        return finetune(data, s.model, s.tuning, seed, self.ledger.path, self.out / "work")


def _check_apart(search: Pool, report: Pool) -> None:
    """Refuses a report set that shares rows or prompts with the search set: its loss would be the one minimised.

    Raises:
        RequestError: says how many rows.
    """
    known = set(search.ids)
    shared = sum(i in known for i in report.ids)
    if shared:
        cause = f"{shared:,} of its {len(report):,} rows are in the search set, so its loss would be the one minimised"
        raise RequestError(message("--report-data", cause, "keep the two sets apart, row by row"))
    asked = {example.prompt_id for example in search.examples}
    if same := sum(example.prompt_id in asked for example in report.examples):
        cause = f"{same:,} of its {len(report):,} rows answer prompts of the search set, whose loss is minimised"
        raise RequestError(message("--report-data", cause, "keep the prompts of the two sets apart"))
