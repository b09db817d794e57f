"""`compare --judge`: every run's own answers to the evaluation prompts, held against those of random rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from im_lightning._lightning import Callback
from im_lightning.data.example import Example
from im_lightning.data.loading import load_examples, write_rows
from im_lightning.data.settings import Encoding
from im_lightning.endpoint.settings import Caps, Endpoint
from im_lightning.experiments.answers.generation import answer_all, check_positions, prompted
from im_lightning.experiments.answers.judging import COMPARE, Prompt, judge_pairs, pairs_of
from im_lightning.experiments.answers.prompts import Generating, answered_row, unanswered
from im_lightning.experiments.answers.win_rate import Pair, WinRate
from im_lightning.experiments.compare.statistics import REFERENCE, TwoWay, two_way_bootstrap
from im_lightning.ledger.record import RunRecord
from im_lightning.models.checkpoint import load_config
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.evaluation import EvalSet
from im_lightning.training.run.encoded_pool import coding_of

_PROMPT = Prompt(COMPARE)


@dataclass(frozen=True)
class JudgeSettings:
    """Who judges, and what.

    Args:
        endpoint: The judge.
        caps: What it may cost.
        prompts: Most prompts that are answered and judged, the first of the evaluation set.
        generating: How runs answer.
    """

    endpoint: Endpoint
    caps: Caps
    prompts: int = 80
    generating: Generating = field(default_factory=lambda: Generating(max_new_tokens=256))


def asked_prompts(examples: Sequence[Example], settings: JudgeSettings) -> list[Example]:
    """The first different prompts of an evaluation set, as many as are answered, without their answers."""
    return list({example.prompt_id: unanswered(example) for example in examples}.values())[: settings.prompts]


def check_answerable(examples: Sequence[Example], encoding: Encoding, settings: JudgeSettings) -> None:
    """Refuses prompts after which the model has no positions for an answer, before anything is trained."""
    model, of = str(encoding.model), prompted(asked_prompts(examples, settings), coding_of(encoding))
    longest = max(map(len, of.prompts)) + settings.generating.max_new_tokens
    check_positions(load_config(model, encoding.revision), model, longest, "lower --max-length")


def keep_answers(network: Any, one: EvalSet, coding: Any, settings: JudgeSettings, path: Path) -> None:
    """A run's answers to the prompts that are asked, in their order, in a file of their own."""
    prompts = asked_prompts(one.examples, settings)
    texts = answer_all(network, coding, prompts, settings.generating)
    write_rows(path, (answered_row(p, text, p.prompt_id) for p, text in zip(prompts, texts, strict=True)))


def answers_path(folder: Path, record: RunRecord) -> Path:
    """Where a run's answers are kept, `folder` being the comparison's."""
    return folder / "answers" / f"{record.run_id}.jsonl"


def has_answered(path: Path, prompts: Sequence[Example]) -> bool:
    """Whether a file has an answer to each of the prompts, which are the first of the evaluation set."""
    return path.exists() and len(path.read_bytes().splitlines()) >= len(prompts)


class OwnAnswersCallback(Callback):
    """Answers at the end of a fit whose record is complete. One process only."""

    def __init__(self, settings: JudgeSettings, folder: Path) -> None:
        super().__init__()
        self.settings, self.folder = settings, folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        record = next(c for c in trainer.callbacks if isinstance(c, InstructMiningCallback)).record
        if record is not None and record.status == "complete":
            (one,) = trainer.datamodule.eval_sets.values()
            path = answers_path(self.folder, record)
            keep_answers(pl_module.network, one, trainer.datamodule.coding, self.settings, path)


@dataclass(frozen=True)
class ArmsJudged:
    """What a judge says of the arms against random rows.

    Args:
        rates: Arm → its win rate over all seeds, uncertain by prompts.
        over_seeds: Arm → its win rate less one half, uncertain by seeds and prompts, as a difference of losses is.
        together: Of all pairs.
    """

    rates: Mapping[str, WinRate]
    over_seeds: Mapping[str, TwoWay]
    together: WinRate


def judge_arms(records: Mapping[str, list[RunRecord]], folder: Path, settings: JudgeSettings) -> ArmsJudged:
    """Every arm against random rows, seed by seed.

    Raises:
        InstructMiningError: a cap is reached, or the endpoint failed; the same comparison goes on.
    """
    pairs, of = [], list[tuple[str, int]]()
    for arm, runs in records.items():
        for seed, (mine, other) in enumerate(zip(runs, records[REFERENCE], strict=True) if arm != REFERENCE else ()):
            files = [str(answers_path(folder, run)) for run in (mine, other)]
            answers = [load_examples(file)[: settings.prompts] for file in files]  # a run may have answered more
            found = pairs_of(answers[0], answers[1], (files[0], files[1]))
            pairs += found
            of += [(arm, seed)] * len(found)
    judged = judge_pairs(pairs, _PROMPT, settings.endpoint, settings.caps, folder / "requests.jsonl")
    by_arm: dict[str, list[tuple[int, Pair]]] = {}
    for (arm, seed), pair in zip(of, judged, strict=True):
        by_arm.setdefault(arm, []).append((seed, pair))
    rates = {arm: WinRate.of([pair for _, pair in found]) for arm, found in by_arm.items()}
    return ArmsJudged(rates, {arm: over_seeds(found) for arm, found in by_arm.items()}, WinRate.of(judged))


def over_seeds(pairs: Sequence[tuple[int, Pair]]) -> TwoWay:
    """Win rate less one half, of (seed, pair); prompts without a verdict of some seed are left out."""
    prompts = {prompt: at for at, prompt in enumerate(dict.fromkeys(pair.prompt for _, pair in pairs))}
    scores = np.full((1 + max(seed for seed, _ in pairs), len(prompts)), np.nan)
    for seed, pair in pairs:
        scores[seed, prompts[pair.prompt]] = pair.score
    known = scores[:, ~np.isnan(scores).any(axis=0)] - 0.5
    return two_way_bootstrap(known, np.ones(known.shape[1])) if known.size else TwoWay(*[math.nan] * 5)
