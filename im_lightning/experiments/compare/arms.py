"""The finetunes of a comparison: one per arm and seed, found in the ledger by what decides them, or made.

A finetune's key is a digest of everything that decides its numbers: rows, candidates, scores, rule (for arms that use
it), base model, evaluation set, tokens, steps and how it is tuned. So an interrupted comparison goes on where it was,
another arm, or seed of the same rows, repeats no other, and nothing made under other settings is ever taken over.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.files import plain
from im_lightning._utils.hashing import digest_bytes, digest_json
from im_lightning._utils.progress import progress
from im_lightning.data.overlap.keys import EXACT, left_out
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.tokenization import template_key
from im_lightning.errors import RequestError, message
from im_lightning.experiments.compare.equal_tokens import FULL, GIVEN, TOLERANCE, Arm, EqualTokensDataModule, check_held
from im_lightning.experiments.compare.judged import (
    JudgeSettings,
    OwnAnswersCallback,
    answers_path,
    asked_prompts,
    has_answered,
    keep_answers,
)
from im_lightning.experiments.compare.statistics import BASE
from im_lightning.experiments.exact_match import AnswersCallback, keep_samples
from im_lightning.experiments.finetuning import NEWER, StudySettings, finetune
from im_lightning.ledger.ledger import KeyedRuns, RunLedger
from im_lightning.ledger.record import RunRecord, new_run_id, now
from im_lightning.models.cost import base_parameters
from im_lightning.models.fingerprint import checkpoint_identity
from im_lightning.models.likelihood import by_row, nll_parts
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.published import load_rule
from im_lightning.rule.rule_file import rule_digest
from im_lightning.sampling.rows import settle_exclusion
from im_lightning.sampling.selection.methods import METHODS
from im_lightning.sampling.selection.select import choose_rows
from im_lightning.sampling.selection.targeted import Targeting, Targets
from im_lightning.sampling.weights.mixture import read_mixture
from im_lightning.sampling.weights.quality_weights import Weighting
from im_lightning.training.evaluation import EvalSet, evaluate
from im_lightning.training.exact_match import AnswerSettings, exact_match, greedy_answers
from im_lightning.training.module import autocast, training_precision, weights_dtype
from im_lightning.training.run.encoded_pool import Collate, Pool, base_model_name, coding_of, encoded_pool, set_names
from im_lightning.training.shared_base import borrowed_base


@dataclass(frozen=True, kw_only=True)
class ArmsSettings(StudySettings):
    """What all finetunes of a comparison share.

    Args:
        eval_data: The evaluation set, a file or data set.
        tokens: Supervised tokens of every arm, per epoch.
        steps: Optimiser steps of every arm, per epoch.
        weights: Of the arms that draw by the rule's weights.
        targeting: What is wanted, for the arm targeted.
        one_per_prompt: Whether of rows that share a prompt an arm takes one at most; full takes all.
        eval_batch_tokens: Tokens per evaluation batch, padding included.
        answers: Which rows are answered for the exact match; None for the loss alone.
        judge: Who compares the runs' own answers; None for no judge.
    """

    eval_data: str
    tokens: int
    steps: int
    weights: Weighting = field(default_factory=Weighting)
    targeting: Targeting = field(default_factory=Targeting)
    one_per_prompt: bool = False
    eval_batch_tokens: int = 8192
    answers: AnswerSettings | None = None
    judge: JudgeSettings | None = None

    @property
    def drawn(self) -> dict[str, Any]:
        """What decides the weights, JSON-like; settings that earlier results do not have only where they are used."""
        values = asdict(self.weights)
        return {name: value for name, value in values.items() if name not in NEWER or value != NEWER[name]}


@dataclass(frozen=True)
class Cell:
    """One finetune.

    Args:
        arm: Its name: a method of `select_subset`, "full", "base", or any name where an order is given.
        seed: Of the draw, the order and the training.
        data: File of the pool, or several.
        rule: Rule file or published name.
        candidates: Rows that may be taken; None for all.
        order: Rows in the order to take them.
        scale: Times the tokens and steps of the others.
    """

    arm: str
    seed: int
    data: str | list[str]
    rule: str | None = None
    candidates: list[int] | None = None
    order: list[int] | None = None
    scale: float = 1.0

    @property
    def method(self) -> str:
        return GIVEN if self.order is not None else self.arm


class ArmRunner:
    """Makes what the ledger lacks.

    Args:
        settings: What all finetunes share.
        ledger: Where the runs are kept, with purpose "compare".
        work: The Trainers' folder; frozen tables and samples go there.

    Raises:
        RequestError: there is no such evaluation set, model or table.
    """

    def __init__(self, settings: ArmsSettings, ledger: RunLedger, work: str | os.PathLike[str]) -> None:
        exclude = settle_exclusion(settings.study.exclude, ledger.records("compare"))
        settings = replace(settings, study=replace(settings.study, exclude=exclude))
        self.settings, self.ledger, self.work = settings, ledger, Path(work)
        s, e = settings, settings.encoding
        self.mixture = None if s.study.mixture is None else read_mixture(s.study.mixture)
        if not Path(s.study.scores).is_file():
            remedy = "write it with im-lightning score DATA --out scores.parquet"
            raise RequestError(message(s.study.scores, "there is no such score table", remedy))
        (self.evaluation,) = set_names(s.eval_data)
        self.targets: Targets | None = None  # what is wanted, once it is known
        self._rules: dict[str, LinearRule] = {}
        self._pools: dict[str, Pool] = {}
        self._tokens: dict[str, NDArray[np.int64]] = {}
        self._shared = {
            "model": checkpoint_identity(s.model, e.revision, e.cache_dir),
            "evaluation": self._pool(s.eval_data).digest,
            "template": template_key(e.template),
            "max_length": e.max_length,
            **({} if e.turns == "last" else {"turns": e.turns}),
        }
        self._trained = {
            "scores": digest_bytes(Path(s.study.scores).read_bytes()),
            "tokens": s.tokens,
            "steps": s.steps,
            "tuning": s.tuned,
            **({"exclude": exclude} if exclude != EXACT else {}),
            **({"one_per_prompt": True} if s.one_per_prompt else {}),
        }
        self.runs = KeyedRuns(ledger, "compare", self._whole)

    def aim(self, targets: Targets) -> None:
        """For these targets; rows that share a prompt with one are in no arm."""
        self.targets = targets
        self._trained["targets"] = targets.digest

    def _whole(self, record: RunRecord) -> bool:
        """Whether the run has all that is asked for: the set, whose file may have been renamed, and its answers."""
        s, losses = self.settings, record.evaluation.get(self.evaluation)
        if losses is None or (s.answers is not None and not losses.get("answers")):
            return False
        if s.judge is None:
            return True
        asked = asked_prompts(self._pool(s.eval_data).examples, s.judge)
        return has_answered(answers_path(self.work.parent, record), asked)

    def keyed(self, cells: Sequence[Cell]) -> list[tuple[str, Cell]]:
        """Each cell with its key."""
        return [(self.key(cell), cell) for cell in cells]

    def run(self, cells: Sequence[tuple[str, Cell]]) -> list[RunRecord]:
        """One record per cell, in their order."""
        self.work.mkdir(parents=True, exist_ok=True)
        records = []
        with progress("  comparison finetunes", len(cells), "runs") as bar:
            for key, cell in cells:
                make = self._base if cell.arm == BASE else self._finetune
                records.append(self.runs.find_or_make(key, partial(make, key, cell)))
                bar.advance()
        return records

    def key(self, cell: Cell) -> str:
        """Digest of what decides the run; for the base, whatever the seed."""
        s = self.settings
        if cell.arm == BASE:
            return digest_json({"arm": BASE, **self._shared, "dtype": s.tuning.dtype, "device": s.tuning.device})
        method = METHODS.get(cell.method)
        rule: Any = None
        if cell.rule is not None:  # an arm that does not rank by it leaves out rows without a prediction, and no more
            ruled = method is not None and method.ruled
            rule = self.rule_digest(cell.rule) if ruled else sorted(self._rule(cell.rule).feature_names_in_)
        drawn = s.drawn if method is not None and method.weighted else {}
        mine = {
            "arm": cell.method,
            "seed": cell.seed,
            "pool": self._pool(cell.data).digest,
            "rule": rule,
            "candidates": digest_json(cell.candidates),
            "order": digest_json(cell.order),
            "weighting": [drawn.pop("weighting"), drawn.pop("strength")] if drawn else None,
            **drawn,
        }
        if method is not None and method.mixture:
            mine["mixture"] = self.mixture
        tokens, steps = self.size(cell)
        return digest_json({**self._shared, **self._trained, "tokens": tokens, "steps": steps, **mine})

    def size(self, cell: Cell) -> tuple[int, int]:
        """Supervised tokens and optimiser steps of a cell, per epoch."""
        return round(self.settings.tokens * cell.scale), max(1, round(self.settings.steps * cell.scale))

    def tokens(self, cell: Cell, table: ScoreTable) -> NDArray[np.int64]:
        """Supervised tokens of the pool's rows that a cell may take, int64 [N]; 0 of the others."""
        name = str(cell.data)
        if name not in self._tokens:
            pool, s = self._pool(cell.data), self.settings
            usable = np.asarray(np.isfinite(table.matrix(table.indicators)).all(axis=1))
            usable &= cell.rule is None or np.isfinite(self._rule(cell.rule).phi(table)).all(axis=1)
            for mask in left_out(pool.examples, self._pool(s.eval_data).examples, s.study.exclude or EXACT).values():
                usable &= ~mask
            if self.targets is not None:
                usable &= ~self.targets.shared
            rows, self._tokens[name] = np.flatnonzero(usable), np.zeros(len(usable), dtype=np.int64)
            self._tokens[name][rows] = encoded_pool(pool, coding_of(s.encoding)).tokens(rows)
        if cell.candidates is None:
            return self._tokens[name]
        out = np.zeros_like(self._tokens[name])
        out[cell.candidates] = self._tokens[name][cell.candidates]
        return out

    def too_few_rows(self, keyed: Sequence[tuple[str, Cell]], table: ScoreTable) -> dict[str, str]:
        """Arm → that its rows are too few or too short, of runs that are to be made; none by embeddings is tried.

        Raises:
            RequestError: the rows that one may take do not hold its tokens.
        """
        s, found = self.settings, dict[str, str]()
        for key, cell in keyed:
            method, (wanted, steps) = METHODS.get(cell.method), self.size(cell)
            if method is None or method.embeddings or cell.arm in found:
                continue
            tokens, batches = self.tokens(cell, table), steps * s.tuning.accumulate
            own = tokens if method.column is None else tokens * method.may(table.values[method.column])
            most = np.cumsum(np.sort(own)[::-1])  # of so many of the longest rows, which no arm needs fewer than
            least = np.searchsorted(most, (1 - TOLERANCE) * wanted) + 1
            if (most[-1] >= wanted and least >= batches) or key in self.runs:
                continue
            check_held(cell.method, tokens[tokens > 0], wanted)
            if own.sum() < (1 - TOLERANCE) * wanted:
                found[cell.arm] = f"has rows of {own.sum():,} supervised tokens, and every arm needs {wanted:,}"
                continue
            rule = None if cell.rule is None else self._rule(cell.rule)
            prompts = self._pool(cell.data).prompts if s.one_per_prompt else None
            about = (table, rule, None, cell.method, cell.seed, s.weights, tokens > 0, wanted, tokens)
            rows = choose_rows(*about, mixture=self.mixture, prompts=prompts, targets=self.targets).rows
            if len(rows) < batches:
                found[cell.arm] = f"has {len(rows)} rows for {batches:,} batches, each of which needs one"
        return found

    def held(self, cell: Cell, table: ScoreTable) -> int:
        """Supervised tokens of the rows that a cell may take."""
        tokens = self.tokens(cell, table)
        if self.settings.one_per_prompt:  # of each the shortest: so many there are in any case
            order = np.argsort(np.where(tokens, tokens, tokens.max() + 1), kind="stable")
            tokens = tokens[order][np.unique(self._pool(cell.data).prompts[order], return_index=True)[1]]
        return int(tokens.sum())

    def inputs(self, data: str | list[str], rule: str | None) -> dict[str, Any]:
        """What decides the comparison's numbers, besides arms and seeds, JSON-like."""
        s = self.settings
        digests = {"pool": self._pool(data).digest, "rule": None if rule is None else self.rule_digest(rule)}
        mixture = {} if self.mixture is None else {"mixture": self.mixture}
        return {**self._shared, **self._trained, **digests, **s.drawn, "seed": s.study.seed, **mixture}

    def rule_digest(self, rule: str) -> str:
        """Digest of what the rule says, not of when it was written."""
        return rule_digest(self._rule(rule))

    def _rule(self, name: str) -> LinearRule:
        if name not in self._rules:
            self._rules[name] = load_rule(name)
        return self._rules[name]

    def _pool(self, data: str | list[str]) -> Pool:
        """The rows of data; each is read once."""
        name = digest_json(data)
        if name not in self._pools:
            self._pools[name] = self.settings.pool(data)
        return self._pools[name]

    @property
    def samples(self) -> Path:
        """Where sample answers are kept."""
        return self.work.parent / "samples.jsonl"

    def _finetune(self, key: str, cell: Cell) -> RunRecord:
        s = self.settings
        tokens, steps = self.size(cell)
        arm = Arm(
            method=cell.method,
            supervised_tokens=tokens,
            steps=steps,
            order=cell.order,
            candidates=cell.candidates,
            accumulate=s.tuning.accumulate,
            key=key,
            weighting=s.weights,
            mixture=self.mixture,
            targets=self.targets,
            one_per_prompt=s.one_per_prompt,
        )
        data = EqualTokensDataModule(
            arm,
            data=cell.data,
            eval_data=s.eval_data,
            rule=cell.rule,
            seed=cell.seed,
            eval_batch_tokens=s.eval_batch_tokens,
            **s.options,
        )
        callbacks: list[Any] = []
        if s.judge is not None:
            callbacks.append(OwnAnswersCallback(s.judge, self.work.parent))
        if s.answers is not None:
            callbacks.append(AnswersCallback(s.answers, self.samples, {"arm": cell.arm, "seed": cell.seed}))
        return finetune(data, s.model, s.tuning, cell.seed, self.ledger.path, self.work, callbacks)

    def _base(self, key: str, cell: Cell) -> RunRecord:
        """Evaluates the base model, example by example, and keeps it like a run of no step."""
        import torch

        s = self.settings
        coding = coding_of(s.encoding)
        encoded = encoded_pool(self._pool(s.eval_data), coding)
        one = EvalSet(self.evaluation, encoded, Collate(coding.tokenizer, coding.embeddings), s.eval_batch_tokens)
        device = s.tuning.torch_device
        precision = training_precision(s.tuning.dtype, s.model, s.encoding.revision, device)
        dtype = weights_dtype(precision, s.tuning.dtype, s.tuning.lora_rank)  # as the finetunes are evaluated
        with borrowed_base(s.model, s.encoding.revision, dtype, device, precision) as network:

            def nll(batch: dict[str, torch.Tensor]) -> torch.Tensor:
                return by_row(nll_parts(network, batch), batch)

            losses = evaluate([one], nll, device, context=lambda: autocast(precision, device))[one.name]
            summary = losses.summary()
            read = {"parameters": base_parameters(s.model, s.encoding.revision)}
            record = RunRecord(
                run_id=new_run_id(),
                status="complete",
                purpose="compare",
                created=now(),
                subset={"kind": "untouched base", "arm": BASE, "key": key, "size": 0, "rows": []},
                evaluation={one.name: {**summary, "base_loss": summary["loss"]}},
                compute=plain({**read, "tokens_trained": 0, "tokens_evaluated": one.tokens}),
                regime={
                    "base_model": base_model_name(coding.model),
                    "max_length": coding.max_length,
                    "template": f"{coding.template.name} {coding.template.identity}",
                    "evaluation_sets": {one.name: one.digest},
                },
            )
            if s.judge is not None:
                keep_answers(network, one, coding, s.judge, answers_path(self.work.parent, record))
            if s.answers is not None:
                answers = greedy_answers(network, one, coding.tokenizer, s.answers)
                run = {"run_id": record.run_id, "evaluation": one.name, "arm": BASE, "seed": None}
                keep_samples(self.samples, run, answers)
                record.evaluation[one.name].update(exact_match(answers))
        self.ledger.add_losses(record.run_id, one.name, one.ids, **losses.columns())
        self.ledger.add(record)
        return record


def known_arms() -> tuple[str, ...]:
    """Every arm that can be asked for by name."""
    return (*METHODS, FULL, BASE)


def usual_arms() -> tuple[str, ...]:
    """The arms of a comparison that asks for none by name."""
    placed = sorted((m.place, name) for name, m in METHODS.items() if m.place is not None)
    return (BASE, *(name for _, name in placed), FULL)


def title_of(arm: str) -> str:
    """What an arm is called in tables and sentences."""
    others = {BASE: "base model", FULL: "full pool", "oracle": "good rows only"}
    return METHODS[arm].title if arm in METHODS else others.get(arm, arm)
