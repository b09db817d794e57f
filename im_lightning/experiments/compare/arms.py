"""The finetunes of a comparison: one per arm and seed, found in the ledger by what decides them, or made.

A finetune's key is a digest of everything that decides its numbers: rows, candidates, scores, rule (for arms that use
it), base model, evaluation set, tokens, steps and how it is tuned. So an interrupted comparison goes on where it was,
another seed or arm is added without repeating the others, and nothing made under other settings is ever taken over.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from im_lightning._utils.hashing import digest_bytes, digest_json
from im_lightning._utils.progress import progress
from im_lightning.data.settings import Encoding, Reading
from im_lightning.errors import RequestError, message
from im_lightning.experiments.compare.equal_tokens import FULL, GIVEN, EqualTokensDataModule
from im_lightning.experiments.exact_match import (
    AnswersCallback,
    AnswerSettings,
    exact_match,
    greedy_answers,
    keep_samples,
)
from im_lightning.experiments.finetuning import TuningSettings, finetune
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord, new_run_id, now
from im_lightning.models.checkpoint import load_causal_lm
from im_lightning.models.fingerprint import checkpoint_identity
from im_lightning.models.likelihood import response_nll
from im_lightning.rule.published import load_rule
from im_lightning.rule.rule_file import rule_digest
from im_lightning.sampling.selection.select import METHODS, NEED_RULE
from im_lightning.training.evaluation import EvalSet, evaluate
from im_lightning.training.run.encoded_pool import (
    Collate,
    base_model_name,
    coding_of,
    encoded_pool,
    read_pool,
    set_names,
)

BASE = "base"
"""The arm of the untouched base: one evaluation, no training, the same for all seeds."""

_WEIGHTED = ("weighted", "diverse")


@dataclass(frozen=True)
class ArmsSettings:
    """What all finetunes of a comparison share.

    Args:
        eval_data: The evaluation set, a file or data set.
        model: Base model.
        scores: Score table of the candidates.
        tokens: Supervised tokens of every arm, per epoch.
        steps: Optimiser steps of every arm, per epoch.
        tuning: How they are finetuned.
        weighting, strength: Of the arms "weighted" and "diverse".
        template, max_length, eval_batch_tokens, format, cache_dir, force, on_bad_row: As the data module's.
        answers: Which rows are answered for the exact match; None for the loss alone.
    """

    eval_data: str
    model: str
    scores: str
    tokens: int
    steps: int
    tuning: TuningSettings = field(default_factory=TuningSettings)
    weighting: str = "auto"
    strength: float = 1.0
    template: str = "auto"
    max_length: int = 1024
    eval_batch_tokens: int = 8192
    format: str = "auto"
    cache_dir: str | None = None
    force: bool = False
    answers: AnswerSettings | None = None
    on_bad_row: str = "error"


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
    """

    arm: str
    seed: int
    data: str | list[str]
    rule: str | None = None
    candidates: list[int] | None = None
    order: list[int] | None = None

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
        self.settings, self.ledger, self.work = settings, ledger, Path(work)
        s = settings
        if not Path(s.scores).is_file():
            remedy = "write it with im-lightning score DATA --out scores.parquet"
            raise RequestError(message(s.scores, "there is no such score table", remedy))
        (self.evaluation,) = set_names(s.eval_data)
        self.work.mkdir(parents=True, exist_ok=True)
        self._scores = digest_bytes(Path(s.scores).read_bytes())
        self._model = checkpoint_identity(s.model, cache_dir=s.cache_dir)
        self._evaluation = read_pool(s.eval_data, Reading(s.format, s.on_bad_row)).digest
        self._rules: dict[str, str] = {}
        known = [r for r in ledger.records("compare") if self.evaluation in r.evaluation]  # a file may be renamed
        self._done = {str(r.subset["key"]): r for r in known if r.subset.get("key")}

    def find(self, cell: Cell) -> RunRecord | None:
        """The run in the ledger, if it is there and has all that is asked for."""
        record = self._done.get(self.key(cell))
        if record is not None and self.settings.answers is not None:
            return record if record.evaluation[self.evaluation].get("answers") else None
        return record

    def run(self, cells: Sequence[Cell]) -> list[RunRecord]:
        """One record per cell, in their order."""
        records = []
        with progress("  comparison finetunes", len(cells), "runs") as bar:
            for cell in cells:
                record = self.find(cell)
                if record is None:
                    record = self._base(cell) if cell.arm == BASE else self._finetune(cell)
                    self._done[self.key(cell)] = record
                records.append(record)
                bar.advance()
        return records

    def key(self, cell: Cell) -> str:
        """Digest of what decides the run; for the base, whatever the seed."""
        s = self.settings
        shared: dict[str, Any] = {
            "model": self._model, "evaluation": self._evaluation, "template": s.template, "max_length": s.max_length,
        }  # fmt: skip
        if cell.arm == BASE:
            return digest_json({"arm": BASE, **shared, "dtype": s.tuning.dtype, "device": s.tuning.device})
        rule = None
        if cell.rule is not None:  # an arm that does not rank by it leaves out rows without a prediction, and no more
            needed = cell.method in (*NEED_RULE, *_WEIGHTED)
            rule = self.rule_digest(cell.rule) if needed else sorted(load_rule(cell.rule).feature_names_in_)
        mine = {
            "arm": cell.method, "seed": cell.seed, "pool": read_pool(cell.data, Reading(s.format, s.on_bad_row)).digest,
            "rule": rule, "candidates": digest_json(cell.candidates), "order": digest_json(cell.order),
            "scores": self._scores, "tokens": s.tokens, "steps": s.steps, "tuning": asdict(s.tuning),
            "weighting": [s.weighting, s.strength] if cell.method in _WEIGHTED else None,
        }  # fmt: skip
        return digest_json({**shared, **mine})

    def rule_digest(self, rule: str) -> str:
        """Digest of what the rule says, not of when it was written."""
        if rule not in self._rules:
            self._rules[rule] = rule_digest(load_rule(rule))
        return self._rules[rule]

    @property
    def samples(self) -> Path:
        """Where sample answers are kept."""
        return self.work.parent / "samples.jsonl"

    def _finetune(self, cell: Cell) -> RunRecord:
        s = self.settings
        data = EqualTokensDataModule(
            cell.data, s.eval_data, s.model, s.scores, s.tokens, s.steps, cell.method, cell.rule, cell.order,
            cell.candidates, s.tuning.accumulate, self.key(cell), s.weighting, s.strength, cell.seed, s.template,
            s.max_length, s.eval_batch_tokens, s.cache_dir, s.format, s.force, s.on_bad_row,
        )  # fmt: skip
        callbacks = []
        if s.answers is not None:
            callbacks.append(AnswersCallback(s.answers, self.samples, {"arm": cell.arm, "seed": cell.seed}))
        return finetune(data, s.model, s.tuning, cell.seed, self.ledger.path, self.work, callbacks)

    def _base(self, cell: Cell) -> RunRecord:
        """Evaluates the untouched base, example by example, and keeps it like a run of no step."""
        import torch

        s = self.settings
        coding = coding_of(Encoding(s.model, None, s.template, s.max_length, s.cache_dir))
        encoded = encoded_pool(read_pool(s.eval_data, Reading(s.format, s.on_bad_row)), coding)
        one = EvalSet(self.evaluation, encoded, Collate(coding.tokenizer), s.eval_batch_tokens)
        device = _device(s.tuning.device)
        dtype, context = _numerics(s.tuning, device)
        network = load_causal_lm(s.model, dtype=dtype, device=device)

        def nll(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            got = response_nll(network, batch)
            return got.sums.float(), got.counts

        losses = evaluate([one], nll, device, context=context)[one.name]
        summary = losses.summary()
        record = RunRecord(
            run_id=new_run_id(), status="complete", purpose="compare", created=now(),
            subset={"kind": "untouched base", "arm": BASE, "key": self.key(cell), "size": 0, "rows": []},
            evaluation={one.name: {**summary, "base_loss": summary["loss"]}},
            regime={
                "base_model": base_model_name(coding.model), "max_length": coding.max_length,
                "template": f"{coding.template.name} {coding.template.identity}",
                "evaluation_sets": {one.name: one.digest},
            },
        )  # fmt: skip
        if s.answers is not None:
            answers = greedy_answers(network, one, coding.tokenizer, s.answers)
            run = {"run_id": record.run_id, "evaluation": one.name, "arm": BASE, "seed": None}
            keep_samples(self.samples, run, answers)
            record.evaluation[one.name].update(exact_match(answers))
        self.ledger.add_losses(record.run_id, one.name, one.ids, losses.sums.tolist(), losses.counts.tolist())
        self.ledger.add(record)
        return record


def _device(name: str) -> Any:
    """The device that a Trainer with this accelerator takes."""
    import torch

    if name in ("auto", "gpu"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _numerics(tuning: TuningSettings, device: Any) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """Type of the weights and context of a forward pass with which the finetunes evaluate (`InstructTuningModule`)."""
    import torch

    auto = tuning.dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    if auto and not tuning.lora_rank:
        return torch.float32, lambda: torch.autocast("cuda", dtype=torch.bfloat16)
    return (torch.bfloat16 if auto or tuning.dtype == "bf16" else torch.float32), nullcontext


def known_arms() -> tuple[str, ...]:
    """Every arm that can be asked for by name."""
    return (*METHODS, FULL, BASE)
