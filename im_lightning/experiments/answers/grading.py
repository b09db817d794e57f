"""`im-lightning score-llm`: grades of a pool as a column of a score table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from im_lightning.data.example import Example
from im_lightning.data.score_table import ScoreTable
from im_lightning.endpoint.client import estimate
from im_lightning.endpoint.settings import Caps, Endpoint
from im_lightning.errors import RequestError, message
from im_lightning.experiments.answers.evaluation_set import requests_path
from im_lightning.experiments.answers.judging import GRADES, Prompt, grade_answers, grading_asks
from im_lightning.training.run.encoded_pool import Pool
from im_lightning.training.run.inputs import read_scores


def graded_table(
    examples: Sequence[Example],
    prompt: Prompt,
    endpoint: Endpoint,
    caps: Caps,
    out: Path,
    *,
    scores: str | None = None,
    name: str = "llm_grade",
) -> ScoreTable:
    """The pool's score table (its rows alone without `scores`) with the grades as the indicator `name`.

    Raises:
        RequestError: the table has such a column, or is of another pool.
        InstructMiningError: a cap is reached, or the endpoint failed; the same call goes on.
    """
    pool = Pool(list(examples))
    table = ScoreTable(range(len(pool)), pool.ids, pool.sources, {}) if scores is None else read_scores(scores, pool)
    if name in table.values:
        raise RequestError(message(f"--scores {scores}", f"it has a column {name!r} already", "give another --name"))
    values, reasons = grade_answers(examples, prompt, endpoint, caps, requests_path(out))
    temperature = None if endpoint.omit_temperature else 0
    judge = {"model": endpoint.api_model, "prompt": prompt.digest, "temperature": temperature, "grades": list(GRADES)}
    key = {"identity": {"indicator": name, "version": 1, "judge": judge}, "numerics": {}}
    return table.with_values(name, values, reasons, key)


def grading_cost(examples: Sequence[Example], prompt: Prompt, endpoint: Endpoint, caps: Caps) -> dict[str, Any]:
    """What the grades would take, without asking."""
    return estimate(grading_asks(examples, prompt, endpoint), endpoint, caps)
