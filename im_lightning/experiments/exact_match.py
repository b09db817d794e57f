"""Exact match beside the loss: greedy answers to the evaluation rows whose response is short, compared as texts.

Meant for tasks with one right answer. Rows with several assistant turns, and long responses, are left out: there a
different wording is no mistake.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from im_lightning._lightning import Callback
from im_lightning.data.tokenization import Encoded
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.models.generation import generate
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.evaluation import EvalSet

SAMPLES = 5
"""Answers of each run that are kept as samples."""


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


def greedy_answers(network: Any, one: EvalSet, tokenizer: Any, settings: AnswerSettings) -> list[Answer]:
    """Answers the rows of `answerable`, most likely token by most likely token.

    Args:
        network: A causal LM of transformers, perhaps with an adapter.
        one: The evaluation set.
        tokenizer: That of the base model.
        settings: Which rows.

    Raises:
        RequestError: the set has no such row.
    """
    rows = answerable(one, settings)
    if not rows:
        cause = f"no row has a single response of at most {settings.short} tokens, which exact match could judge"
        raise RequestError(message(f"evaluation set {one.name}", cause, "leave out --exact-match"))
    rows.sort(key=lambda row: len(one.encoded[row].input_ids))
    out: list[Answer] = []
    for start in range(0, len(rows), settings.batch):
        out += _answer(network, one, rows[start : start + settings.batch], tokenizer, settings)
    return out


def _answer(network: Any, one: EvalSet, rows: Sequence[int], tokenizer: Any, settings: AnswerSettings) -> list[Answer]:
    parts = [one.encoded[row] for row in rows]
    prompts = [e.input_ids[: len(e.input_ids) - int(e.loss_mask.sum())].tolist() for e in parts]
    stops = {int(e.input_ids[-1]) for e in parts if not e.response_mask[-1]} | {tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)
    made = generate(network, prompts, [[stop] for stop in stops], pad, settings.short)
    out = []
    for row, encoded, answer in zip(rows, parts, made, strict=True):
        reference = encoded.input_ids[encoded.response_mask].tolist()
        example = one.examples[row]
        texts = (tokenizer.decode(t, skip_special_tokens=True) for t in (reference, answer.tokens))
        out.append(Answer(example.id, example.prompt, *texts))
    return out


def exact_match(answers: Sequence[Answer]) -> dict[str, Any]:
    """`{exact_match: share, answers: count}`, as a run's evaluation keeps it."""
    return {"exact_match": sum(a.match for a in answers) / len(answers), "answers": len(answers)}


def keep_samples(path: Path, run: dict[str, Any], answers: Sequence[Answer]) -> None:
    """Appends the first answers of a run to a JSON Lines file.

    Raises:
        InstructMiningError: the file cannot be written.
    """
    shown = [
        {**run, "id": a.id, "prompt": a.prompt, "reference": a.reference, "answer": a.answer, "match": a.match}
        for a in sorted(answers, key=lambda a: a.id)[:SAMPLES]
    ]
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(line, ensure_ascii=True) + "\n" for line in shown))
    except OSError as error:
        cause = f"cannot be written: {error.strerror}"
        raise InstructMiningError(message(str(path), cause, "choose a writable folder")) from error


class AnswersCallback(Callback):
    """Answers at the end of a fit, adds the exact match to the run's record, keeps samples. One process only.

    Args:
        settings: Which rows.
        samples: File of samples.
        run: What a sample says of its run.
    """

    def __init__(self, settings: AnswerSettings, samples: Path, run: dict[str, Any]) -> None:
        super().__init__()
        self.settings, self.samples, self.run = settings, samples, run

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        mining = next(c for c in trainer.callbacks if isinstance(c, InstructMiningCallback))
        record = mining.record
        if record is None or record.status != "complete":
            return
        data = trainer.datamodule
        for name, one in data.eval_sets.items():
            answers = greedy_answers(pl_module.network, one, data.coding.tokenizer, self.settings)
            keep_samples(self.samples, {"run_id": record.run_id, "evaluation": name, **self.run}, answers)
            record.evaluation[name].update(exact_match(answers))
        mining.ledger.add(record, replace=True)
