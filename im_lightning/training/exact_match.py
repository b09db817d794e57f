"""Exact match beside the loss: greedy answers to the evaluation rows whose response is short, compared as texts.

Meant for tasks with one right answer. Long responses, and rows in which several answers are trained, are left out:
there a different wording is no mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from im_lightning._lightning import Trainer
from im_lightning.data.tokenization import Encoded
from im_lightning.errors import RequestError, message
from im_lightning.models.generation import generate
from im_lightning.models.likelihood import base_model, known_tokens, padding_id
from im_lightning.training.evaluation import EvalSet, all_sum
from im_lightning.training.module import STRATEGIES


@dataclass(frozen=True)
class AnswerSettings:
    """Which rows are answered.

    Args:
        short: Most tokens of a response that is compared.
        most: Most rows; the first of the set.
        batch: Rows generated at a time.
    """

    short: int = 32
    most: int = 400
    batch: int = 64


@dataclass(frozen=True)
class Answer:
    """One greedy answer; `match` where it is the reference but for white space."""

    id: str
    prompt: str
    reference: str
    answer: str

    @property
    def match(self) -> bool:
        return self.answer.split() == self.reference.split()


def answerable(one: EvalSet, settings: AnswerSettings) -> list[int]:
    """Rows of the set with a single response of at most `short` tokens, its end included; the first `most`."""
    rows = [row for row, encoded in enumerate(one.encoded) if _is_short(encoded, settings.short)]
    return rows[: settings.most]


def _is_short(encoded: Encoded, short: int) -> bool:
    count = int(encoded.loss_mask.sum())
    return 0 < count <= short and bool(encoded.loss_mask[-count:].all()) and count < len(encoded.input_ids)


def greedy_answers(
    network: Any, one: EvalSet, tokenizer: Any, settings: AnswerSettings, rank: int = 0, world: int = 1
) -> list[Answer]:
    """Answers the rows of `answerable`, most likely token by most likely token.

    Args:
        network: A causal LM of transformers, perhaps with an adapter.
        one: The evaluation set.
        tokenizer: That of the base model.
        settings: Which rows.
        rank: Which share of them, where several processes share them out.
        world: How many processes there are.

    Raises:
        RequestError: the set has no such row.
    """
    rows = answerable(one, settings)
    if not rows:
        cause = f"no row has a single response of at most {settings.short} tokens, which exact match could score"
        raise RequestError(message(f"evaluation set {one.name}", cause, "leave out --exact-match"))
    rows = sorted(rows, key=lambda row: len(one.encoded[row].input_ids))[rank::world]
    out: list[Answer] = []
    for start in range(0, len(rows), settings.batch):
        out += _answer(network, one, rows[start : start + settings.batch], tokenizer, settings)
    return out


def _answer(network: Any, one: EvalSet, rows: Sequence[int], tokenizer: Any, settings: AnswerSettings) -> list[Answer]:
    parts = [one.encoded[row] for row in rows]
    prompts = [e.input_ids[: len(e.input_ids) - int(e.loss_mask.sum())].tolist() for e in parts]
    ends = {_closing(e) for e in parts} - {()}
    if tokenizer.eos_token_id is not None:
        ends.add((int(tokenizer.eos_token_id),))
    stops = [list(end) for end in sorted(ends)]
    pad = padding_id(tokenizer, known_tokens(base_model(network)))
    made = generate(network, prompts, stops, pad, settings.short)
    out = []
    for row, encoded, answer in zip(rows, parts, made, strict=True):
        reference = encoded.input_ids[encoded.response_mask].tolist()
        example = one.examples[row]
        texts = (tokenizer.decode(t, skip_special_tokens=True) for t in (reference, answer.tokens))
        out.append(Answer(example.id, example.prompt, *texts))
    return out


def _closing(encoded: Encoded) -> tuple[int, ...]:
    """The tokens that close a row's answer; none where it was cut."""
    ends = int(encoded.loss_mask.sum()) - int(encoded.response_mask.sum())
    return tuple(encoded.input_ids[len(encoded.input_ids) - ends :].tolist())


def exact_match(answers: Sequence[Answer]) -> dict[str, Any]:
    """`{exact_match: share, answers: count}`, as a run's evaluation keeps it."""
    return {"exact_match": sum(a.match for a in answers) / len(answers), "answers": len(answers)}


def exact_matches(trainer: Trainer, module: Any, datamodule: Any) -> dict[str, dict[str, Any]]:
    """Exact match by evaluation set, as `exact_match` has it, of the sets with short responses; every rank calls it and
    answers its share of the rows."""
    settings, reduce, out = AnswerSettings(), all_sum(trainer), {}
    for name, one in datamodule.eval_sets.items():
        if not answerable(one, settings):
            continue
        with trainer.precision_plugin.val_step_context():
            mine = (trainer.global_rank, trainer.world_size)
            answers = greedy_answers(module.network, one, datamodule.coding.tokenizer, settings, *mine)
        counts = torch.tensor([sum(a.match for a in answers), len(answers)])
        right, made = (counts if reduce is None else reduce(counts)).tolist()
        out[name] = {"exact_match": right / made, "answers": made}
    return out


def refuse_answers(trainer: Trainer, module: Any, datamodule: Any) -> None:
    """Raises a RequestError where `exact_matches` could not answer at the end: before hours of training."""
    settings, cause = AnswerSettings(), ""
    if not hasattr(module, "network"):
        cause = f"{type(module).__name__} has no `network`, a causal LM of transformers that answers"
    elif type(trainer.strategy) not in STRATEGIES:
        cause = f"{type(trainer.strategy).__name__} shares the weights out over ranks, and none can answer alone"
    elif not any(answerable(one, settings) for one in datamodule.eval_sets.values()):
        cause = f"no evaluation set has rows with a single response of at most {settings.short} tokens"
    if cause:
        remedy = "leave it out, and add scores measured elsewhere to the records (docs/targets.md)"
        raise RequestError(message("exact_match", cause, remedy))
