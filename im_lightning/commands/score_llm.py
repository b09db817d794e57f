"""`im-lightning score-llm`: a grade per row by a model that is asked, as an indicator."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from im_lightning._utils.answer import answer
from im_lightning._utils.outputs import Replacing
from im_lightning.data.loading import load_examples
from im_lightning.data.score_table import PREDICTED, ScoreTable, check_column, check_table_path
from im_lightning.data.settings import Reading
from im_lightning.endpoint.client import estimate_text
from im_lightning.endpoint.settings import Caps, Endpoint
from im_lightning.errors import RequestError, message
from im_lightning.experiments.answers.judging import GRADE, read_prompt

SUMMARY = "grade every row by a model that is asked; write the grades as an indicator"
EXAMPLE = (
    "im-lightning score-llm pool.jsonl --scores scores.parquet --base-url http://localhost:8000/v1 "
    "--api-model my-model --max-requests 60000 --out graded.parquet"
)
POSITIONAL = ("data",)
REQUIRED = ("base_url", "api_model")

_CAPS, _READING, _REPLACING = Caps(), Reading(), Replacing()


def run(
    data: list[str],
    out: str,
    endpoint: Endpoint,
    caps: Caps = _CAPS,
    scores: str | None = None,
    name: str = "llm_grade",
    prompt: str | None = None,
    dry_run: bool = False,
    reading: Reading = _READING,
    replacing: Replacing = _REPLACING,
) -> int:
    """Asks a model for a grade from 1 to 10 of every row, and writes a score table with the grades as a column.

    The prompt and the model are part of the indicator's identity: a rule fitted on these grades refuses others. A row
    without a grade is missing with the reason. Every answer is kept with its request in OUT.requests.jsonl; the same
    command goes on where it was interrupted.

    Args:
        data: The pool: files, folders or data sets.
        out: Score table to write (.parquet).
        endpoint: The model.
        caps: What may be spent.
        scores: Score table of the pool whose columns go beside the grades (im-lightning score).
        name: What the indicator is called.
        prompt: File with another prompt, with {request} and {answer} in it; it asks for a grade such as [[7]].
        dry_run: Only say how many requests and tokens there are, and what they would cost.
        reading: How rows are read.
        replacing: What may be replaced.
    """
    from im_lightning.experiments.answers.grading import graded_table, grading_cost

    check_table_path(out)
    check_column(name)
    if name == PREDICTED:
        raise RequestError(message(f"--name {name}", "a rule's prediction is called so", "give another --name"))
    asked = read_prompt(prompt, GRADE, ("request", "answer"))
    replacing.check(out, "score table", ScoreTable.wrote)
    refuses = None if scores is None else ScoreTable.read(scores).refusal  # such rows have no scores
    examples = load_examples(data, refuses=refuses, **asdict(reading))
    if dry_run:
        found = grading_cost(examples, asked, endpoint, caps)
        answer(found, estimate_text(found))
        return 0
    table = graded_table(examples, asked, endpoint, caps, Path(out), scores=scores, name=name)
    table.write(out)
    reasons = Counter(reason for reason in table.reasons[name] if reason is not None)
    text = f"wrote {out}: {len(table):,} rows, {name}; {reasons.total():,} rows without a grade"
    answer({"out": out, "rows": len(table), "name": name, "missing": dict(reasons)}, text)
    return 0
