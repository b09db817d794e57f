"""What the playground's scorer models learn from: base-task rows with good responses, or spoilt in ways of their own.

The pool's tasks do not occur, and none of the pool's flaws is among the ways of spoiling (`pool.FLAWS`: the answer to
another question of the task, half an answer, a word or two in a loop, an unrelated sentence, random things among
shuffled words, chatter): what such a model says about the pool, it says about what it has never seen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from im_lightning.experiments.demo.playground import words
from im_lightning.experiments.demo.playground.tasks import BASE_TASKS, Problem, one
from im_lightning.experiments.demo.playground.text import sentence

Row = dict[str, str]
Spoil = Callable[[Problem, np.random.Generator], str]

_LISTS = (words.THINGS, words.NUMBERS, words.NAMES, words.PLACES)
_CONTENT = frozenset(word for listed in _LISTS for word in listed)
_FORMULAS = ("of", "with", "is", "are", "in", "a", "so", "that", "was", "by", "to", "there", "and", "before", "came")


def draw(rng: np.random.Generator) -> Problem:
    """A problem of a base task, rightly answered."""
    return BASE_TASKS[int(rng.integers(len(BASE_TASKS)))].problem(rng)


def _altered(problem: Problem, rng: np.random.Generator) -> str:
    """One content word is another of its list, which the task does not mention."""
    answer, said = problem.answer.split(), {*problem.input.split(), *problem.answer.split()}
    places = [i for i, word in enumerate(answer) if word in _CONTENT]
    if not places:
        return problem.answer
    at = places[int(rng.integers(len(places)))]
    listed = next(listed for listed in _LISTS if answer[at] in listed)
    answer[at] = one(rng, tuple(word for word in listed if word not in said))
    return " ".join(answer)


def _confused(problem: Problem, rng: np.random.Generator) -> str:
    """One content word is another of the question."""
    answer, given = problem.answer.split(), [word for word in problem.input.split() if word in _CONTENT]
    places = [i for i, word in enumerate(answer) if word in given]
    others = [word for word in given if word not in answer]
    if not places or not others or problem.task in ("mention", "chat"):
        return _altered(problem, rng)
    answer[places[int(rng.integers(len(places)))]] = one(rng, tuple(others))
    return " ".join(answer)


def _beheaded(problem: Problem, rng: np.random.Generator) -> str:
    """The end of the answer, at most half of it."""
    answer = problem.answer.split()
    return " ".join(answer[-int(rng.integers(1, max(2, len(answer) // 2 + 1))) :])


def _other_task(problem: Problem, rng: np.random.Generator) -> str:
    """The right answer to a question of another kind."""
    while True:
        other = draw(rng)
        if other.task != problem.task:
            return other.answer


def _echoed(problem: Problem, rng: np.random.Generator) -> str:
    """The instruction said back, alone or before the answer."""
    return problem.instruction if rng.random() < 0.5 else f"{problem.instruction} {problem.answer}"


def _backwards(problem: Problem, rng: np.random.Generator) -> str:
    return " ".join(problem.answer.split()[::-1])


def _stuttered(problem: Problem, rng: np.random.Generator) -> str:
    return stutter(problem.answer, rng)


def _gapped(problem: Problem, rng: np.random.Generator) -> str:
    return gap(problem.answer, rng)


ANSWERS: dict[str, Spoil] = {
    "altered": _altered,
    "confused": _confused,
    "beheaded": _beheaded,
    "other task": _other_task,
    "echoed": _echoed,
    "backwards": _backwards,
    "stuttered": _stuttered,
    "gapped": _gapped,
}
"""How the reward model's answers are spoilt."""


def stutter(text: str, rng: np.random.Generator) -> str:
    """One to three words, each said two to four times; all other words stay."""
    said = text.split()
    chosen = set(rng.permutation(len(said))[: int(rng.integers(1, 4))].tolist())
    return " ".join(word for i, word in enumerate(said) for _ in range(int(rng.integers(2, 5)) if i in chosen else 1))


def turn(text: str, rng: np.random.Generator) -> str:
    """The words in a wrong order: backwards, or the end before the beginning."""
    said = text.split()
    at = int(rng.integers(1, max(2, len(said))))
    return " ".join(said[::-1] if rng.random() < 0.5 else said[at:] + said[:at])


def gap(text: str, rng: np.random.Generator) -> str:
    """Every second word is missing."""
    return " ".join(text.split()[int(rng.integers(2)) :: 2]) or text


def garble(text: str, rng: np.random.Generator) -> str:
    """A third of the words or more are function words that belong elsewhere; the others stay in place."""
    share = rng.uniform(0.3, 0.8)
    return " ".join(one(rng, _FORMULAS) if rng.random() < share else word for word in text.split())


def _row(problem: Problem, output: str) -> Row:
    return {"instruction": problem.instruction, "input": problem.input, "output": output}


def answer_pairs(count: int, rng: np.random.Generator) -> list[tuple[Row, Row]]:
    """Rows with the right answer, each with a row of the same question whose answer is spoilt."""
    pairs: list[tuple[Row, Row]] = []
    spoils = list(ANSWERS.values())
    while len(pairs) < count:
        problem = draw(rng)
        spoilt = spoils[int(rng.integers(len(spoils)))](problem, rng)
        if spoilt != problem.answer:
            pairs.append((_row(problem, problem.answer), _row(problem, spoilt)))
    return pairs


def _fluent(rng: np.random.Generator) -> Problem:
    """A base task's problem; every second time its answer is a sentence of plain text."""
    while True:
        problem = draw(rng)
        if rng.random() < 0.5:
            return Problem("text", problem.instruction, problem.input, sentence(rng))
        if problem.task != "double":  # right, and no fluent text
            return problem


def judged_rows(indicator: str, count: int, rng: np.random.Generator) -> list[tuple[Row, bool]]:
    """Rows whose responses are, and rows whose responses are not, what a question of UniEval asks for; half each.

    Args:
        indicator: "naturalness": fluent, or stuttered or with turned words. "coherence": the answer to the question, or
            the one to a question of another kind. "understandability": fluent, or with gaps or garbled.
        count: Rows.
        rng: Draws them.
    """
    rows: list[tuple[Row, bool]] = []
    while len(rows) < count:
        good = len(rows) % 2 == 0
        problem = draw(rng) if indicator == "coherence" else _fluent(rng)
        text, first = problem.answer, rng.random() < 0.5
        if not good and indicator == "coherence":
            text = _other_task(problem, rng)
        elif not good and indicator == "naturalness":
            text = stutter(text, rng) if first else turn(text, rng)
        elif not good:
            text = gap(text, rng) if first else garble(text, rng)
        if good or text != problem.answer:
            rows.append((_row(problem, text), good))
    return rows
