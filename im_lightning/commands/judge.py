"""`im-lightning judge`: two models' answers compared, by a model that is asked or with reference outputs."""

from __future__ import annotations

from pathlib import Path

from im_lightning._utils.answer import answer
from im_lightning._utils.outputs import Replacing
from im_lightning.data.settings import Reading
from im_lightning.endpoint.settings import Caps, Endpoint
from im_lightning.errors import RequestError, message

SUMMARY = "compare two models' answers, by a model that is asked or with references; win rate with its interval"
EXAMPLE = (
    "im-lightning judge weighted.jsonl --against random.jsonl --references eval.jsonl "
    "--base-url https://api.openai.com/v1 --api-model gpt-4o --max-requests 2000 --out judged/"
)
POSITIONAL = ("answers",)

_ENDPOINT, _CAPS, _READING, _REPLACING = Endpoint(), Caps(), Reading(), Replacing()


def run(
    answers: str,
    out: str,
    against: str | None = None,
    references: str | None = None,
    endpoint: Endpoint = _ENDPOINT,
    caps: Caps = _CAPS,
    prompt: str | None = None,
    reading: Reading = _READING,
    replacing: Replacing = _REPLACING,
) -> int:
    """Compares answers to the same prompts, pair by pair, and says how often the first file's are better.

    A judge sees each pair in both orders. The win rate has an interval over instructions; beside it stand the lengths,
    the win rate at equal length, how far the orders agree, and whether the judge prefers a place or a length. Without a
    judge, exact match and ROUGE-L with reference outputs are given. Every verdict is kept with its request; the same
    command goes on where it was interrupted.

    Args:
        answers: Answers of a model (im-lightning generate), or any rows with prompts and responses.
        out: Folder for judge.json, judge.txt and requests.jsonl.
        against: The answers to compare them with: another model's, or reference outputs.
        references: Reference outputs, for exact match and ROUGE-L; several per prompt count by the best.
        endpoint: The judge.
        caps: What may be spent.
        prompt: File with another prompt for the judge, with {request}, {first} and {second} in it.
        reading: How rows are read.
        replacing: What may be replaced.
    """
    from im_lightning.experiments.answers.comparison import Answers, compare_answers

    asked = endpoint.base_url is not None or endpoint.api_model is not None
    if asked:
        endpoint.check()
        caps.check()
    elif prompt is not None:
        remedy = "name the judge (--base-url, --api-model), or leave it out"
        raise RequestError(message(f"--prompt {prompt}", "it is for a judge, and none is asked", remedy))
    a = Answers.read(answers, reading)
    b = None if against is None else Answers.read(against, reading)
    known = None if references is None else Answers.read(references, reading)
    judge = endpoint if asked else None
    found = compare_answers(a, b, known, judge, caps, prompt, Path(out), overwrite=replacing.overwrite)
    answer(found, found["rendered"])
    return 0
