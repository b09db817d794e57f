"""Asks a judge to compare pairs of answers in both orders, and to grade single ones; reads its verdicts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import log
from im_lightning.data.example import Example
from im_lightning.endpoint.client import Ask, ask
from im_lightning.endpoint.journal import Answer
from im_lightning.endpoint.settings import Caps, Endpoint
from im_lightning.errors import RequestError, message
from im_lightning.experiments.answers.prompts import by_prompt
from im_lightning.experiments.answers.win_rate import Pair

COMPARE = """\
You compare two answers to the same request. Judge which one serves the person who asked better: whether it does what \
is asked, is correct, complete and clear. Do not let the order of the answers or their length sway you.

[Request]
{request}

[Answer A]
{first}

[Answer B]
{second}

Say in a few sentences what speaks for and against each. Then end with a line that holds nothing but [[A]] if answer A \
is better, [[B]] if answer B is better, or [[C]] for a tie."""
GRADE = """\
You grade an answer to a request: whether it does what is asked, is correct, complete and clear.

[Request]
{request}

[Answer]
{answer}

Say in a few sentences what speaks for and against it. Then end with a line that holds nothing but the grade, from \
[[1]], useless, to [[10]], as good as can be."""
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_GRADE = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
GRADES = (1.0, 10.0)


@dataclass(frozen=True)
class Prompt:
    """What a judge is asked, with places for the texts in braces.

    >>> Prompt("{request} {answer}").filled(request="Hi", answer="{x}")
    'Hi {x}'
    """

    text: str

    @property
    def digest(self) -> str:
        return digest_json(self.text)

    def filled(self, **texts: str) -> str:
        """The prompt with the texts in their places; braces in a text stay what they are."""
        return re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1], found[0]), self.text)


def read_prompt(path: str | None, default: str, places: tuple[str, ...]) -> Prompt:
    """The prompt in a file, or the default one.

    Raises:
        RequestError: it cannot be read, or lacks a place.
    """
    if path is None:
        return Prompt(default)
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "name a text file"
        raise RequestError(message(f"--prompt {path}", f"it cannot be read ({error})", remedy)) from error
    if absent := [place for place in places if f"{{{place}}}" not in text]:
        wanted = ", ".join(f"{{{place}}}" for place in places)
        raise RequestError(message(f"--prompt {path}", f"it has no {{{absent[0]}}}", f"write {wanted} into it"))
    return Prompt(text)


def request_text(example: Example) -> str:
    """What was asked, as one text; earlier turns by who said them."""
    history = example.history
    if len(history) == 1:
        return history[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in history)


def verdict(answer: Answer) -> tuple[float, str]:
    """Score of the answer shown first, and "", or NaN and why there is none: the last verdict of the text counts."""
    found = _VERDICT.findall(answer.final)
    if answer.refusal or not found:
        return math.nan, _why(answer, "no verdict [[A]], [[B]] or [[C]] in its answer")
    return {"A": 1.0, "B": 0.0, "C": 0.5}[found[-1]], ""


def grade(answer: Answer) -> tuple[float, str]:
    """The grade, and "", or NaN and why there is none."""
    found = _GRADE.findall(answer.final)
    if answer.refusal or not found:
        return math.nan, _why(answer, "no grade such as [[7]] in its answer")
    value = float(found[-1])
    return (value, "") if GRADES[0] <= value <= GRADES[1] else (math.nan, f"its grade {found[-1]} is not from 1 to 10")


def _why(answer: Answer, cause: str) -> str:
    if answer.refusal:
        return f"refused: {answer.refusal}"
    return f"{cause}, which was cut at its limit of tokens" if answer.cut else cause


def pairs_of(a: Sequence[Example], b: Sequence[Example], names: tuple[str, str]) -> list[tuple[Example, Example]]:
    """Answers to the same prompts: the first with the first, and so on; the shorter list is gone through again.

    Raises:
        RequestError: no prompt has answers of both.
    """
    of_a, of_b = by_prompt(a), by_prompt(b)
    common = [prompt for prompt in of_a if prompt in of_b]
    if not common:
        cause = f"none of its {len(of_a):,} prompts is one of the {len(of_b):,} of {names[1]}"
        raise RequestError(message(names[0], cause, "compare answers to the same evaluation set"))
    if alone := len(of_a) + len(of_b) - 2 * len(common):
        log(f"{alone:,} prompts have an answer in one of {names[0]} and {names[1]} alone, and are left out")
    out = []
    for prompt in common:
        x, y = of_a[prompt], of_b[prompt]
        out += [(x[k % len(x)], y[k % len(y)]) for k in range(max(len(x), len(y)))]
    return out


def judge_pairs(
    pairs: Sequence[tuple[Example, Example]], prompt: Prompt, endpoint: Endpoint, caps: Caps, journal: Path
) -> list[Pair]:
    """The pairs with their verdicts, in order. Equal answers are a tie, and are not asked about.

    Raises:
        InstructMiningError: a cap is reached, or the endpoint failed; the same call goes on.
    """
    asks = {}
    for number, (a, b) in enumerate(pairs):
        for order, (first, second) in enumerate(((a, b), (b, a))):
            if a.response != b.response:
                asks[number, order] = _ask(
                    endpoint,
                    prompt.filled(request=request_text(a), first=first.response, second=second.response),
                    {"prompt": a.prompt_id, "order": "AB" if order == 0 else "BA"},
                )
    answers = ask(list(asks.values()), endpoint, caps, journal, "verdicts")
    missing: Counter[str] = Counter()
    out = []
    for number, (a, b) in enumerate(pairs):
        scores = [0.5, 0.5]
        for order in (0, 1):
            if (number, order) in asks:
                scores[order], reason = verdict(answers[asks[number, order].key])
                missing[reason] += bool(reason)
        words = len(a.response.split()), len(b.response.split())
        out.append(Pair(a.prompt_id, scores[0], 1 - scores[1], words))
    _say_missing("verdicts", +missing)
    return out


def grade_answers(
    examples: Sequence[Example], prompt: Prompt, endpoint: Endpoint, caps: Caps, journal: Path
) -> tuple[list[float], list[str | None]]:
    """A grade per example, NaN with its reason where there is none.

    Raises:
        InstructMiningError: a cap is reached, or the endpoint failed; the same call goes on.
    """
    asks = grading_asks(examples, prompt, endpoint)
    answers = ask(asks, endpoint, caps, journal, "grades")
    found = [grade(answers[one.key]) for one in asks]
    _say_missing("grades", Counter(reason for _, reason in found if reason))
    return [value for value, _ in found], [reason or None for _, reason in found]


def grading_asks(examples: Sequence[Example], prompt: Prompt, endpoint: Endpoint) -> list[Ask]:
    """A request for a grade per example."""
    texts = [prompt.filled(request=request_text(one), answer=one.response) for one in examples]
    return [_ask(endpoint, text, {"id": one.id}) for one, text in zip(examples, texts, strict=True)]


def _ask(endpoint: Endpoint, text: str, about: Mapping[str, str]) -> Ask:
    return Ask(endpoint.body([{"role": "user", "content": text}], 0.0), dict(about))


def _say_missing(what: str, reasons: Counter[str]) -> None:
    for reason, count in reasons.most_common():
        log(f"{count:,} {what} are missing: {reason}")
