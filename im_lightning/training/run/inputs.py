"""What a run is made of: from the data module's options to table, rule, weights and the fixed subset.

Looks into the frozen folder first. What is not there is made and frozen: the score table (read from a file, or scored
up front, by all ranks together), the weights, and the rows drawn by them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from im_lightning._utils.files import parse_json
from im_lightning._utils.hashing import digest_bytes, digest_strings
from im_lightning._utils.json_diff import differences, flatten
from im_lightning._utils.progress import log
from im_lightning.data.overlap.keys import EXACT, USUAL, Mask, left_out
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Encoding, Reading
from im_lightning.errors import RequestError, message
from im_lightning.indicators.base import get_indicators, with_parts
from im_lightning.models.fingerprint import checkpoint_identity, folder_identity
from im_lightning.rule.linear_rule import LinearRule, Regressors
from im_lightning.rule.published import PUBLISHED, judge_models, load_rule
from im_lightning.sampling.rows import Choice, draw_subset, exclusion_of, weigh
from im_lightning.sampling.weights.quality_weights import of_draw
from im_lightning.scoring.settings import Numerics, ScorerModels, Setup
from im_lightning.training.distributed.ranks import Ranks
from im_lightning.training.evaluation import EvalSet
from im_lightning.training.run import run_folder
from im_lightning.training.run.encoded_pool import Coding, Pool, encoded_pool, read_pool, reading_of, set_names
from im_lightning.training.run.run_folder import RunInputs, changed_inputs, refuse_changes
from im_lightning.training.run.scoring import (
    Scorer,
    check_coming,
    check_scored_targets,
    check_target_rows,
    designed_indicators,
    score_together,
)
from im_lightning.training.shared_base import release_base

_OF_THE_BASE = {"model", "tokenizer", "template", "max_length"}


def other_than_here(table: ScoreTable, encoding: Encoding) -> list[str]:
    """Indicators of a table that were scored by another base model, template or length than a finetune trains with; one
    sentence for each difference."""
    found: dict[str, list[str]] = {}
    for name in table.indicators:
        identity = (table.keys.get(name) or {}).get("identity") or {}
        if _OF_THE_BASE.isdisjoint(part for path in flatten(identity) for part in path.split(".")):
            continue
        with contextlib.suppress(RequestError):  # of another tool, or an indicator that is not known here
            (indicator,) = get_indicators([name])
            needs = {need for part in with_parts(indicator) for need in part.needs}
            own = {"reward", "unieval"} & needs  # those have models of their own
            for one in differences(identity, identity if own else Setup(encoding).identity_of(indicator)):
                if set(one.field.split(".")) & _OF_THE_BASE and None not in (one.left, one.right):
                    found.setdefault(one.text("in the table", "here"), []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in found.items()]


def read_scores(path: str, pool: Pool, encoding: Encoding | None = None) -> ScoreTable:
    """A table of scores, its rows put into the pool's order; says where it was scored otherwise than a finetune under
    `encoding` trains.

    Raises:
        RequestError: it lacks rows of the pool, or there is no such file.
        DataError: it is torn or foreign.
    """
    table = ScoreTable.read(path)
    for line in () if encoding is None else other_than_here(table, encoding):
        log(f"{path} was scored otherwise than is trained: {line}")
    if table.pool_digest == pool.digest:
        return table
    place = {id: row for row, id in reversed(list(enumerate(table.id)))}
    absent = [row for row, id in enumerate(pool.ids) if id not in place]
    if absent:
        cause = f"it has no scores for {len(absent)} of the pool's {len(pool)} rows, first row {absent[0]}"
        remedy = "score this pool (im-lightning score DATA … --out scores.parquet), or leave out scores="
        raise RequestError(message(path, cause, remedy))
    taken = table.take(np.array([place[id] for id in pool.ids], dtype=np.int64))
    return ScoreTable(np.arange(len(pool)), pool.ids, pool.sources, taken.values, taken.reasons, taken.keys, taken.meta)


def check_options(options: Any) -> None:
    """What is wrong with a data module's options by themselves, before anything is read.

    Raises:
        RequestError: two evaluation sets have one name, or a number is out of range.
    """
    set_names(options.eval_data)
    for name, least in (("batch_size", 1), ("eval_batch_tokens", 1), ("batch_tokens", 1), ("num_workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise RequestError(message(name, f"it is {value}", f"give {least} or more"))


@dataclass(frozen=True)
class RunOptions:
    """Everything that decides the inputs of a run: the data module's hyperparameters, those of them that decide the
    rows, what was read, the Trainer's default_root_dir, where to score, and which rank this is of how many."""

    options: Any
    choice: Choice
    pool: Pool
    coding: Coding
    eval_sets: Mapping[str, EvalSet]
    root: str
    device: str
    ranks: tuple[int, int]

    def resolve(self) -> RunInputs:
        """Reads or makes everything; on several ranks all of them call it."""
        folder, inputs = self._folder()
        waiting, (rank, world) = folder.parent / ".waiting" / folder.name, self.ranks
        ranks = Ranks(waiting, rank, world) if world > 1 else None
        with contextlib.nullcontext() if ranks is None else ranks.alive():
            found = run_folder.is_frozen(folder)
            scored = None if found else self._make(folder, inputs, ranks)
            run = run_folder.thaw(folder)
            self._check(run, inputs)
            if run.table is not None:
                run = replace(run, table=_labelled(run.table, self.pool))
            if found and run.rule is not None and run.table is not None:
                run.rule.check(run.table, self.options.force)  # it may have been made by force
            if scored is None and run.table is not None:
                scored = Regressors.of(run.table, run.rule)
            draw = self.choice.draw_inputs
            fresh = not found or run_folder.is_another_draw(folder, draw)
            run = self._of_the_draw(self._with_rows(replace(run, inputs=inputs, scored=scored), ranks))
            if fresh and rank == 0 and run.rule is not None and not (self.choice.uniform or self.choice.designed):
                left_out = self.left_out(exclusion_of(inputs))
                run_folder.keep_decisions(run, self.choice, left_out, self.pool.groups(self.choice))
            if rank == 0 and (cut := self._cut(run)):
                log(cut)
            return run

    def _folder(self) -> tuple[Path, dict[str, Any]]:
        """The frozen folder, and what it is of. Where no exclusion is asked for, a folder keeps the one it has: of a
        run made before there was a choice, rows of the same content alone."""
        asked, run_dir, before = self.choice.exclude, self.options.run_dir, describe_inputs(self)
        folder = Path(run_dir).expanduser() if run_dir else self._named(before)
        exclude = asked or USUAL
        if run_dir and asked is None and run_folder.is_frozen(folder):
            exclude = exclusion_of(run_folder.thaw(folder).inputs)
        inputs = {**before, "exclude": exclude} if exclude != EXACT and self.eval_sets else before
        if run_dir or inputs is before:
            return folder, inputs
        newer = self._named(inputs)
        if asked is None and run_folder.is_frozen(folder) and not run_folder.is_frozen(newer):
            log(f"{folder}: goes on as it began: of the evaluation sets only rows of the same content are left out")
            return folder, before
        return newer, inputs

    def _named(self, inputs: dict[str, Any]) -> Path:
        """The frozen folder of these inputs. The rows' sources are no part of its name, as in earlier versions, unless
        a folder of that name is of rows with other sources."""
        sources = inputs["pool"].get("sources")
        folder = run_folder.frozen_folder(self.root, {**inputs, "pool": _without_sources(inputs["pool"])})
        if sources is None or not run_folder.is_frozen(folder):
            return folder
        before = run_folder.thaw(folder).inputs["pool"].get("sources", sources)
        if before != sources and self.ranks[0] == 0:
            log(f"{folder}: the rows had other sources then; the pool is weighed anew")
        return folder if before == sources else run_folder.frozen_folder(self.root, inputs)

    def left_out(self, exclude: str) -> dict[str, Mask]:
        """Rows of the pool that share something with the evaluation sets."""
        evaluation = [example for one in self.eval_sets.values() for example in one.examples]
        return left_out(self.pool.examples, evaluation, exclude)

    def _cut(self, run: RunInputs) -> str:
        """What is to be said of rows longer than `max_length`: training cuts them, and their indicators do not know."""
        limit, table = self.coding.max_length, run.table
        counted = table is not None and "length_output" in table.indicators
        if run.rows is not None:
            encoded = encoded_pool(self.pool, self.coding)
            encoded.need(run.rows)
            made = [encoded.encoded[int(row)] for row in run.rows]
            cut, of = sum(one.truncated_prompt + one.truncated_response > 0 for one in made), f"{len(made):,} rows"
        elif table is not None and {"length_input", "length_output"} <= set(table.indicators):
            cut = int((table.values["length_input"] + table.values["length_output"] > limit).sum())
            of = f"the pool's {len(self.pool):,} rows, or more,"
        else:
            return ""
        uncut = "; length_output counts their tokens uncut" if counted else ""
        return f"{cut:,} of {of} are longer than max_length {limit:,} and cut in training{uncut}" if cut else ""

    def _make(self, folder: Path, inputs: dict[str, Any], ranks: Ranks | None) -> Regressors | None:
        """Scores, weighs and freezes, all ranks together.

        Returns:
            The regressors behind the weights, where this rank made them and they are those of the folder.
        """
        o, rule = self.options, None if self.choice.rule is None else load_rule(self.choice.rule)

        def finish(table: ScoreTable | None) -> Regressors | None:
            table = None if table is None else _labelled(table, self.pool)
            if table is not None and table.meta.get("targets"):
                check_scored_targets(table, o, self.eval_sets)
            if rule is not None and table is not None:
                rule.check(table, o.force)
            scored = None if table is None else Regressors.of(table, rule)
            shared = self.left_out(exclusion_of(inputs))
            weights = weigh(self.choice, len(self.pool), shared, scored, self.pool.sources)
            pools = (self.pool, *(one.source.pool for one in self.eval_sets.values()))
            rejected = [one for pool in pools for one in pool.rejected]
            ours = run_folder.freeze(RunInputs(folder, inputs, table, rule, weights), self.pool.ids, rejected)
            if ours and rejected:
                log(f"{folder / 'rejected.jsonl'}: the {len(rejected):,} bad rows set aside, with their reasons")
            return scored if ours else None

        names, scored = self._indicators(rule), None
        if names and o.scores is None:
            scorer = self._scorer(names)
            check_target_rows(scorer.setup, o, self.pool, self.eval_sets)
            check_coming(rule, scorer, o.force)  # before any model is loaded
            scorer = scorer.measured(self.pool.examples)
            check_coming(rule, scorer, o.force)  # before the pool is scored
            release_base()  # one model at a time
            table = score_together(scorer, self.pool, ranks)
            scored = None if table is None else finish(table)
        elif self.ranks[0] == 0:
            scored = finish(None if o.scores is None else read_scores(o.scores, self.pool, self._encoding))
        if ranks is not None and ranks.rank:
            ranks.wait(lambda: run_folder.is_frozen(folder), [0], "the score table and weights")
        return scored

    def _indicators(self, rule: LinearRule | None) -> tuple[str, ...]:
        if self.options.indicators:
            return tuple(self.options.indicators)
        if rule is not None:
            return tuple(rule.indicators)
        return designed_indicators(**self.judges) if self.choice.designed else ()

    @property
    def judges(self) -> dict[str, str | None]:
        """Reward and UniEval model by argument: those named, else under a published rule the paper's."""
        return judge_models(self.choice.rule, self.options.reward_model, self.options.unieval_model)

    @property
    def _encoding(self) -> Encoding:
        o = self.options
        return Encoding(o.model, o.revision, o.template, o.max_length, o.cache_dir)

    @property
    def reading(self) -> Reading:
        """How rows are read: the pool's, and those of targets and a reference alike."""
        return reading_of(self.options)

    def _scorer(self, names: tuple[str, ...]) -> Scorer:
        o = self.options
        setup = Setup(
            self._encoding,
            ScorerModels(**{one.name: getattr(o, one.name) for one in fields(ScorerModels)} | self.judges),
            Numerics(o.batch_tokens, o.precision, self.device),
            reading=self.reading,
        )
        return Scorer(names, setup)

    def _check(self, run: RunInputs, inputs: dict[str, Any]) -> None:
        """Whether a folder named by `run_dir` is of these inputs; its rule is the run's, whatever the file says now.

        Raises:
            RequestError: it is of another pool, whose scores and weights belong to other rows; or, unless `on_mismatch`
                is "warn", of other inputs.
        """
        found = changed_inputs(run.inputs, inputs)
        for change in [change for change in found if change.path[0] == "rule"]:
            found.remove(change)
            log(f"{run.folder}: the run goes on with its frozen rule ({change})")
        if others := [change for change in found if change.path[0] == "pool"]:
            cause = f"its scores and weights are of the rows of another pool: {'; '.join(map(str, others))}"
            raise RequestError(message(str(run.folder), cause, "restore the pool, or leave run_dir out"))
        if found:
            refuse_changes(str(run.folder), found, "name the folder of this run", self.options.on_mismatch)

    def _with_rows(self, run: RunInputs, ranks: Ranks | None) -> RunInputs:
        """With the fixed subset, if there is one; drawn by rank 0 and kept, so that all ranks and resumes agree."""
        draw = self.choice.draw_inputs
        if draw["kind"] not in ("designed", "fixed"):
            return replace(run, design=dict(draw))
        kept = run_folder.read_subset(run.folder, draw)
        if kept is None and self.ranks[0] == 0:
            about = (self.pool.sources, self.pool.digest, self.pool.groups(self.choice))
            if (drawn := draw_subset(self.choice, run.weights, run.scored, *about)) is not None:
                run_folder.keep_subset(run.folder, draw, *drawn)
        if kept is None:
            if ranks is not None:
                ranks.wait(lambda: run_folder.subset_path(run.folder, draw).exists(), [0], "the subset")
            kept = run_folder.read_subset(run.folder, draw)
        return replace(run, rows=kept[0], design=kept[1]) if kept is not None else replace(run, design=dict(draw))

    def _of_the_draw(self, run: RunInputs) -> RunInputs:
        """With the means of its own draw in the report: draws of one row per prompt share a folder with others."""
        told = "expected_mean" in run.weights.report
        if not self.choice.one_per_prompt or not told or run.rule is None or run.scored is None:
            return run
        groups = self.pool.groups(self.choice)
        return replace(run, weights=of_draw(run.weights, run.scored.phi, run.rule, self.choice.budget, groups))


def describe_inputs(run: RunOptions) -> dict[str, Any]:
    """What a run's table, rule and weights depend on, JSON-like, with `exclude` where that is not "exact"; the frozen
    folder is named by its digest."""
    o, choice = run.options, run.choice
    scoring: dict[str, Any] | None = None
    if o.scores is not None:
        scoring = {"scores": _file_digest(o.scores)}
    elif o.indicators or choice.rule is not None or choice.designed:
        embedding = o.embedding_model and folder_identity(o.embedding_model, cache_dir=o.cache_dir)
        named = o.indicators or ("what the rule needs" if choice.rule else list(designed_indicators(**run.judges)))
        scoring = {"indicators": named, "embedding_model": embedding, "precision": o.precision}
        if not isinstance(named, str):  # a rule says itself which version of its indicators it is of
            later = {one.name: one.version for one in get_indicators(named) if one.version != 1}
            scoring |= {"versions": later} if later else {}
        judges = {argument: model for argument, model in run.judges.items() if model is not None}
        scoring |= {a: checkpoint_identity(model, cache_dir=o.cache_dir) for a, model in judges.items()}
        scoring |= {"embed": o.embed} if o.embed != "both" else {}
        rows = {name: data for name in ("knn_reference", "targets") if (data := getattr(o, name)) is not None}
        scoring |= {name: read_pool(data, run.reading).digest for name, data in rows.items()}
    rule = choice.rule if choice.rule is None or choice.rule in PUBLISHED else _file_digest(choice.rule)
    return {
        "pool": {"digest": run.pool.digest, "rows": len(run.pool), **_sources(run)},
        "evaluation": {name: one.digest for name, one in run.eval_sets.items()},
        "model": run.coding.model,
        "template": {"name": run.coding.template.name, "identity": run.coding.template.identity},
        "max_length": run.coding.max_length,
        "scoring": scoring,
        "rule": rule,
        "weighting": choice.weighting_inputs,
    }


def _sources(run: RunOptions) -> dict[str, str]:
    """Digest of the rows' sources, which are no part of their ids, where weights or rows depend on them; the name of a
    single source is left out."""
    choice = run.choice
    if choice.subset_size is None and choice.mixture is None and not _knows_sources(choice.rule):
        return {}
    names = run.pool.sources
    return {"sources": digest_strings(names if len(set(names)) > 1 else [])}


def _without_sources(pool: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in pool.items() if name != "sources"}


def _knows_sources(rule: str | None) -> bool:
    """Whether a rule file has regressors of sources; a file that cannot be read is refused where it is used."""
    if rule is None or rule in PUBLISHED:
        return False
    try:
        content = parse_json(Path(rule).expanduser().read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and bool(content.get("sources"))


def _labelled(table: ScoreTable, pool: Pool) -> ScoreTable:
    """The table with the sources that the pool has: rows of the same texts, and ids, may have got others since."""
    if table.source == pool.sources:
        return table
    return ScoreTable(table.row, table.id, pool.sources, table.values, table.reasons, table.keys, table.meta)


def _file_digest(path: str) -> str:
    """Digest of a file's content; of its name where there is no such file, so that its reader can say so."""
    file = Path(path).expanduser()
    return digest_bytes(file.read_bytes()) if file.is_file() else path
