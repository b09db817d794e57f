"""`im-lightning compare`: the rule's rows against the baselines, from one base at equal supervised tokens and steps.

What a comparison's seed varies besides the training: the candidate rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import log
from im_lightning.errors import RequestError, message
from im_lightning.experiments.compare.arms import ArmRunner, ArmsSettings, Cell, known_arms, usual_arms
from im_lightning.experiments.compare.curve import SCALES
from im_lightning.experiments.compare.equal_tokens import FULL, candidate_rows, settle_pool_draw
from im_lightning.experiments.compare.judged import check_answerable, judge_arms
from im_lightning.experiments.compare.result import ArmRuns, CompareReport, ComparisonResult
from im_lightning.experiments.compare.rule_spread import DRAWS, decided_by_rule, rule_spread
from im_lightning.experiments.compare.statistics import BASE, REFERENCE
from im_lightning.experiments.compare.worth import Worth, with_blocks
from im_lightning.experiments.finetuning import check_out, check_rule, check_seed, check_unseen
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.targets import is_score
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.published import load_rule
from im_lightning.rule.refits import runs_of
from im_lightning.sampling.selection.by_source import source_rule
from im_lightning.sampling.selection.embeddings import embedding_identity
from im_lightning.sampling.selection.methods import METHODS, Method
from im_lightning.sampling.selection.targeted import Targets, targets_of
from im_lightning.training.run.encoded_pool import Pool
from im_lightning.training.run.inputs import read_scores
from im_lightning.training.shared_base import shared_base

SPREAD_WORDS = (
    "The intervals of the rule's arms cover how far another ledger of the same design would move them, by "
    f"{DRAWS} refits of the rule on resamples of its runs; more seeds do not make that part smaller."
)
NO_SPREAD_WORDS = (
    "The intervals leave out how far the rule would move with other runs: too few resamples of its subsets determine a "
    "fit. Make more designed runs."
)


def runs_behind(rule: LinearRule, ledger: RunLedger) -> list[RunRecord]:
    """The runs of the ledger that the rule was fitted on.

    Raises:
        RequestError: there is no such set of runs in the ledger.
    """
    with contextlib.suppress(RequestError):
        found = runs_of(rule, ledger)
        if RunLedger.digest(found) == rule.ledger_digest_:
            return found
    cause = f"its runs are not those that {rule.title} was fitted on"
    remedy = f"fit the rule on them (im-lightning refit {ledger.path} --out rule.json), or leave out --ledger"
    raise RequestError(message(f"--ledger {ledger.path}", cause, remedy))


def earlier_draw(rule: LinearRule, seed: int, folder: Path) -> Path | None:
    """The bootstrap of the rule that an earlier version trained this seed by, where the folder has it."""
    path = folder / f"{digest_json([rule.ledger_digest_, rule.method, rule.indicators, seed])}.json"
    return path if path.exists() else None


@dataclass(frozen=True)
class CompareSettings:
    """What is compared.

    Args:
        arms: What all finetunes share.
        names: Arms; None for all that the table allows.
        seeds: How many; each has its own candidates and training.
        pool_draw: auto, folds or same.
        ledger: Of the runs that the rule was fitted on.
        curve: Whether random rows at other numbers of tokens say how many random tokens each arm is worth.
    """

    arms: ArmsSettings
    names: tuple[str, ...] | None = None
    seeds: int = 5
    pool_draw: str = "auto"
    ledger: str | None = None
    curve: bool = False


@dataclass
class CompareStudy:
    """One comparison in one folder: `ledger/`, `rules/`, `work/`, `compare.json`, `compare.txt`.

    Args:
        settings: What is compared.
        out: The folder.
        overwrite: Whether another result there may be replaced.
    """

    settings: CompareSettings
    out: Path
    overwrite: bool = False
    said: list[str] = field(default_factory=list)

    @shared_base()
    def run(self) -> CompareReport:
        """Makes what is missing, and writes and returns the comparison.

        Raises:
            RequestError: the evaluation set is one that the rule was fitted on; arms that cannot be; a ledger that does
                not fit the rule; candidates that do not hold enough tokens.
        """
        s, a = self.settings, self.settings.arms
        study = a.study
        if s.seeds < 1:
            raise RequestError(message("--seeds", f"it is {s.seeds}", "give 5 or more; one alone has no interval"))
        check_seed(study.seed)
        self.ledger = RunLedger(self.out / "ledger")
        runner = ArmRunner(a, self.ledger, self.out / "work")
        pool = a.pool(study.data)
        self.table = read_scores(study.scores, pool, a.encoding)
        self.rule: LinearRule | None = None if study.rule is None else load_rule(study.rule)
        if self.rule is not None:
            self.said += check_rule(self.rule, self.table, a.encoding, study.force)
        if a.targeting.target is not None:
            runner.aim(self._targets(pool))
        inputs = runner.inputs(study.data, study.rule)
        there = check_out(self.out / "compare.json", ("arms", "reference", "rendered"), inputs, self.overwrite)
        self._say_unscored()
        runs = self._runs_behind()
        self._check_evaluation(runs)
        if a.judge is not None:
            check_answerable(a.pool(a.eval_data).examples, a.encoding, a.judge)
        names = self._arms()
        how = self._pool_draw(pool, there)
        self.ledger.make()
        cells, resumed, spread = [], False, dict[str, float]()
        parts = self._parts(how, pool, runner)
        for index, candidates in enumerate(parts):
            drawn = study.rule
            if runs and self.rule is not None:
                earlier = earlier_draw(self.rule, study.seed + index, self.out / "rules")
                drawn = study.rule if earlier is None else str(earlier)
                resumed |= earlier is not None
            cells += [Cell(arm, study.seed + index, study.data, drawn, candidates) for arm in names]
        points = self._curve_cells(runner, cells)
        keyed = self._with_rows_enough(runner, runner.keyed([*cells, *points]))
        names = list(dict.fromkeys(cell.arm for _, cell in keyed))
        if runs and self.rule is not None:
            first = np.arange(len(pool)) if parts[0] is None else np.array(parts[0], dtype=np.int64)
            first = first if runner.targets is None else first[~runner.targets.shared[first]]
            groups = pool.prompts if a.one_per_prompt else None
            about = (self.rule, runs, self.table, names, first.tolist(), a.tokens, a.weights)
            if not is_score(self.rule.evaluation):
                spread = rule_spread(*about, seed=study.seed, prompts=groups, mixture=runner.mixture)
            if decided_by_rule(names):
                self._say(self._spread_words(spread))
        found = sum(key in runner.runs for key, _ in keyed)
        what = f"{len(names)} arms, {s.seeds} seeds, {a.tokens:,} supervised tokens and {a.steps} steps each"
        log(f"{what}; {a.tuning.title}; {found} of {len(keyed)} runs are in {self.ledger.path}")
        prompts = {e.id: e.prompt_id for e in a.pool(a.eval_data).examples}
        arms, curve = ArmRuns(runner.evaluation, prompts=prompts), ArmRuns(runner.evaluation, prompts=prompts)
        for (_, cell), record in zip(keyed, runner.run(keyed), strict=True):
            self._check_tokens(cell, record, *runner.size(cell))
            if cell.scale == 1:
                arms.add(cell.arm, record)
            if cell.arm == REFERENCE:
                curve.add(REFERENCE if cell.scale == 1 else f"{REFERENCE} {cell.scale:g}×", record)
        if resumed:
            self._say("Seeds of an earlier version keep the bootstraps of the rule that they were trained by.")
        result = ComparisonResult(arms, self.ledger, spread=spread)
        if a.judge is not None:
            result.judged = judge_arms(arms.records, self.out, a.judge)
        behind = [] if s.ledger is None else with_blocks(runs, RunLedger(s.ledger))
        report = CompareReport(result, a, s.seeds, self.said, len(self.table), behind)
        if s.curve:
            result.worth = self._worth(arms, curve, report, spread)
        rule = None
        if study.rule is not None:
            digest = runner.rule_digest(study.rule)
            rule = {"path": study.rule, "digest": digest, "bootstrap": bool(runs), "spread": spread}
        report.write(self.out, {"pool_draw": how}, rule, inputs)
        return report

    # before

    def _arms(self) -> list[str]:
        """The arms asked for, or all that can be, those that cannot with the reason."""
        s = self.settings
        asked = list(dict.fromkeys(s.names or usual_arms()))
        if s.names is None:
            asked = [arm for arm in asked if arm not in METHODS or not self._not_given(METHODS[arm])]
        unknown = [arm for arm in asked if arm not in known_arms()]
        if unknown:
            cause = f"there is no {', '.join(unknown)}"
            raise RequestError(message("--arms", cause, f"use some of {', '.join(known_arms())}"))
        reasons = {arm: why for arm in asked if (why := self._impossible(arm))}
        if reasons and s.names:
            text = "; ".join(f"{arm} {why}" for arm, why in reasons.items())
            raise RequestError(message("--arms", text, "score what is missing, or leave these arms out"))
        for arm, why in reasons.items():
            self._say(f"LEFT OUT: {arm} {why}")
        names = [arm for arm in asked if arm not in reasons]
        if (mixture := s.arms.study.mixture) is not None and not any(METHODS[a].mixture for a in names if a in METHODS):
            raise RequestError(message(f"--mixture {mixture}", "no arm draws by it", "add mix or mix+rule to --arms"))
        return names if REFERENCE in names else [REFERENCE, *names]

    def _not_given(self, method: Method) -> str:
        """What the method needs that no score table has."""
        a = self.settings.arms
        if method.mixture and a.study.mixture is None:
            return "needs a mixture of sources (--mixture)"
        return "needs targets (--target)" if method.targets and a.targeting.target is None else ""

    def _impossible(self, arm: str) -> str:
        method = METHODS.get(arm)
        if method is None:
            return ""
        if method.needs_rule and self.rule is None:
            return "needs a rule (--rule)"
        if lacking := self._not_given(method):
            return lacking
        if method.column is not None and method.column not in self.table.values:
            return f"needs the column {method.column} in the score table"
        if method.sources and len(set(self.table.source)) < 2:
            return "needs several sources"
        if method.by_source and self.rule is not None:
            try:
                source_rule(self.rule)
            except RequestError:
                return "needs a rule whose runs differ in their sources, as this version writes it (refit)"
        if method.embeddings:
            from im_lightning.sampling.selection.embeddings import stored_vectors

            try:
                stored_vectors(self.table, self.settings.arms.encoding.cache_dir)
            except RequestError as error:
                return f"needs embeddings ({error})"
        return ""

    def _targets(self, pool: Pool) -> Targets:
        """The rows of --target, without those that the evaluation set gives away.

        Raises:
            RequestError: as `targets_of`.
        """
        a = self.settings.arms
        asked, evaluation = a.targeting, a.pool(a.eval_data).examples
        by_base = embedding_identity(self.table).get("kind") != "sentence-transformers"
        model = asked.target_model or (a.model if by_base else None)
        wanted = a.pool(str(asked.target)).examples
        found = targets_of(wanted, self.table, pool.examples, evaluation, model, a.encoding.cache_dir)
        self._say(f"{asked.target}: {found.text()}, and are in no arm.")
        return found

    def _parts(self, how: str, pool: Pool, runner: ArmRunner) -> list[list[int] | None]:
        """Candidate rows of each seed. Folds keep rows of a prompt together, unless the runs here are of an earlier
        version, which did not."""
        s, seed = self.settings, self.settings.arms.study.seed

        def parts(prompts: NDArray[np.int64] | None) -> list[list[int] | None]:
            return [candidate_rows(how, len(pool), k, s.seeds, seed, prompts) for k in range(s.seeds)]

        earlier, study = parts(None), s.arms.study
        if how != "folds" or earlier == (kept := parts(pool.prompts)):
            return earlier
        cells = [Cell(REFERENCE, seed + k, study.data, study.rule, part) for k, part in enumerate(earlier)]
        return earlier if any(key in runner.runs for key, _ in runner.keyed(cells)) else kept

    def _curve_cells(self, runner: ArmRunner, cells: Sequence[Cell]) -> list[Cell]:
        """Random rows at other numbers of tokens, as far as every seed's candidates hold them."""
        if not self.settings.curve:
            return []
        random = [cell for cell in cells if cell.arm == REFERENCE]
        held, wanted = min(runner.held(cell, self.table) for cell in random), self.settings.arms.tokens
        scales = [scale for scale in SCALES if scale != 1]
        if beyond := [scale for scale in scales if scale * wanted > held]:
            names = ", ".join(f"{scale:g}×" for scale in beyond)
            self._say(f"LEFT OUT of the curve: random at {names}, for a seed's candidates hold {held:,} tokens.")
        return [replace(cell, scale=scale) for scale in scales if scale not in beyond for cell in random]

    def _with_rows_enough(self, runner: ArmRunner, keyed: Sequence[tuple[str, Cell]]) -> list[tuple[str, Cell]]:
        """Without the arms of fewer rows than steps or too few tokens; found before hours of finetunes, but for arms by
        embeddings, whose choice takes long itself.

        Raises:
            RequestError: one of them was asked for by name.
        """
        reasons = runner.too_few_rows(keyed, self.table)
        if reasons and (self.settings.names or REFERENCE in reasons):
            text = "; ".join(f"{arm} {why}" for arm, why in reasons.items())
            raise RequestError(message("--arms", text, "lower --steps, change --tokens, or leave these arms out"))
        for arm, why in reasons.items():
            self._say(f"LEFT OUT: {arm} {why}")
        return [(key, cell) for key, cell in keyed if cell.arm not in reasons]

    def _runs_behind(self) -> list[Any]:
        s = self.settings
        if s.ledger is None:
            if self.rule is not None:
                self._say(
                    "The rule is the same for all seeds: the intervals leave out how far it would move with other "
                    "runs. Pass --ledger (its runs) to have it in them."
                )
            return []
        if self.rule is None:
            raise RequestError(message("--ledger", "there is no rule to refit on its runs", "pass --rule as well"))
        return runs_behind(self.rule, RunLedger(s.ledger))

    def _check_evaluation(self, runs: Sequence[Any]) -> None:
        a = self.settings.arms
        if self.rule is None:
            return
        ledger = RunLedger(self.settings.ledger) if self.settings.ledger is not None else None
        one = a.pool(a.eval_data)
        said = check_unseen(f"--eval-data {a.eval_data}", one, self.rule, ledger, runs, a.study.force)
        if said:
            self._say(said)

    def _pool_draw(self, pool: Pool, earlier: Mapping[str, Any]) -> str:
        s = self.settings
        lengths = self.table.values.get("length_output")
        held = math.nan if lengths is None else float(np.nansum(lengths) + len(pool))
        held *= len(set(pool.prompts.tolist())) / len(pool) if s.arms.one_per_prompt else 1.0
        was = (earlier.get("settings") or {}).get("pool_draw")
        goes_on = was == "bootstrap" and s.pool_draw in ("auto", was)
        how = "bootstrap" if goes_on else settle_pool_draw(s.pool_draw, held, s.arms.tokens, s.seeds)
        if how == "folds" and (before := earlier.get("seeds", s.seeds)) != s.seeds:
            why = "folds of another number have other rows, so that no run is taken over but the base's"
            log(f"{before} seeds in the result that is there, {s.seeds} asked for: {why} (--pool-draw same adds seeds)")
        words = {
            "folds": "Each seed has its own candidate rows, a random part of the pool.",
            "bootstrap": "Each seed's candidates are a bootstrap of the pool, as an earlier version began it; seeds "
            "share rows, so p is too small: do not conclude from it.",
            "same": "All seeds choose from the same rows: what is found is about these, and the intervals leave out "
            "how far another pool would differ.",
        }
        self._say(words[how])
        return how

    def _say_unscored(self) -> None:
        """Rows without some score are in no arm, so that all arms choose from the same rows; a column may cost most."""
        missing = ~np.isfinite(self.table.matrix(self.table.indicators))
        rows = int(missing.any(axis=1).sum())
        if rows:
            counts = zip(self.table.indicators, missing.sum(axis=0).tolist(), strict=True)
            which = ", ".join(f"{name} of {count:,}" for name, count in counts if count)
            first = ", ".join(str(row) for row in self.table.row[missing.any(axis=1)][:5])
            first += ", …" if rows > 5 else ""
            self._say(f"In no arm: {rows:,} of {len(self.table):,} rows, which lack a score ({which}): rows {first}.")

    def _spread_words(self, spread: Mapping[str, float]) -> str:
        """Whether the intervals of the rule's arms cover another ledger, or why not."""
        if spread:
            return SPREAD_WORDS
        if self.rule is not None and is_score(self.rule.evaluation):
            return "The rule predicts scores: the intervals of a loss leave out how far it would move with other runs."
        if "length_output" not in self.table.values:
            return (
                "The intervals leave out how far the rule would move with other runs: the table has no length_output, "
                "which says how many rows an arm takes (im-lightning score)."
            )
        return NO_SPREAD_WORDS

    # after

    def _worth(self, arms: ArmRuns, curve: ArmRuns, report: CompareReport, spread: Mapping[str, float]) -> Worth:
        """What the arms are worth in random tokens."""
        every = ArmRuns(arms.evaluation, {**arms.records, **curve.records}, arms.prompts)
        evidence = {arm: report.evidence(arm) for arm in arms.records}
        known = {arm: (sd, DRAWS - 1.0) for arm, sd in spread.items()}
        return Worth.of(arms.records, curve.records, every.example_sums(self.ledger), evidence, known)

    def _check_tokens(self, cell: Cell, record: RunRecord, tokens: int, steps: int) -> None:
        """No arm that is compared may have missed the tokens or steps; a ledger from elsewhere could hold such."""
        epochs, r = self.settings.arms.tuning.epochs, record
        if cell.arm in (BASE, FULL):
            return
        if abs(r.tokens - tokens * epochs) > 0.01 * tokens * epochs + 1 or r.steps != steps * epochs:
            cause = f"run {r.run_id} of arm {cell.arm} saw {r.tokens} tokens in {r.steps} steps"
            raise RequestError(message(str(self.ledger.path), cause, "delete that run and compare again"))

    def _say(self, line: str) -> None:
        if line not in self.said:
            self.said.append(line)
            log(line)
