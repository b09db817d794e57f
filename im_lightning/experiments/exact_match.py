"""Exact match at the end of a comparison's fits: added to the run's record, with samples of the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from im_lightning._lightning import Callback
from im_lightning.errors import InstructMiningError, message
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.exact_match import Answer, AnswerSettings, exact_match, greedy_answers

SAMPLES = 5
"""Answers of each run that are kept as samples."""


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
