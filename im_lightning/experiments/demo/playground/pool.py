"""The pool: rows of instruction tasks from sources of known, different quality; and the evaluation rows, all good.

Rows are Alpaca objects with three fields more: `source`, `quality` (1 for a right answer, else 0) and `flaw` (the name
of what is wrong with the answer, "" where nothing is). Only the playground looks at `quality` and `flaw`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from im_lightning._utils.hashing import digest_bytes
from im_lightning.experiments.demo.playground import words
from im_lightning.experiments.demo.playground.tasks import POOL_TASKS, Problem, one, some
from im_lightning.experiments.demo.playground.text import CHATTER, sentence

SOURCES: dict[str, dict[str, float]] = {
    "handbook": {"good": 0.70, "truncated": 0.15, "verbose": 0.15},
    "homework": {"good": 0.45, "wrong": 0.40, "truncated": 0.15},
    "forum": {"good": 0.25, "off-topic": 0.35, "verbose": 0.25, "wrong": 0.15},
    "scraped": {"good": 0.15, "noisy": 0.50, "truncated": 0.20, "repetitive": 0.15},
    "bot": {"good": 0.10, "repetitive": 0.50, "verbose": 0.25, "wrong": 0.15},
    "mixed": {"good": 0.20, "noisy": 0.20, "off-topic": 0.20, "wrong": 0.20, "repetitive": 0.10, "truncated": 0.10},
}
"""Source → shares of good answers and of each flaw; the sources are equally large, 31 % of all rows are good."""

EVALUATION_SETS = ("fit", "report")
"""Rules are fitted on the loss on `fit`; comparisons report the loss on `report`, which no rule has seen."""


def _wrong(problem: Problem, rng: np.random.Generator) -> str:
    """The right answer to another question of the same kind."""
    task = next(task for task in POOL_TASKS if task.name == problem.task)
    while True:
        other = task.problem(rng).answer
        if other != problem.answer:
            return other


def _truncated(problem: Problem, rng: np.random.Generator) -> str:
    """The beginning of the answer, at most half of it."""
    answer = problem.answer.split()
    return " ".join(answer[: int(rng.integers(1, max(2, len(answer) // 2 + 1)))])


def _repetitive(problem: Problem, rng: np.random.Generator) -> str:
    """One or two words of the answer over and over."""
    answer = [word for word in problem.answer.split() if word != "."]
    start = int(rng.integers(len(answer)))
    loop = answer[start : start + int(rng.integers(1, 3))]
    return " ".join((loop * 12)[: int(rng.integers(6, 13))])


def _off_topic(problem: Problem, rng: np.random.Generator) -> str:
    """A fluent sentence about something else."""
    return sentence(rng)


def _noisy(problem: Problem, rng: np.random.Generator) -> str:
    """Half of the words replaced by random ones, the rest shuffled."""
    answer = problem.answer.split()
    noise = words.THINGS + words.NUMBERS + words.NAMES
    mixed = [one(rng, noise) if rng.random() < 0.5 else word for word in answer]
    return " ".join(mixed[int(i)] for i in rng.permutation(len(mixed)))


def _verbose(problem: Problem, rng: np.random.Generator) -> str:
    """The right answer buried in chatter."""
    before, after = some(rng, CHATTER, 2)
    return f"{before} . {problem.answer} {after} ."


FLAWS: dict[str, Callable[[Problem, np.random.Generator], str]] = {
    "wrong": _wrong,
    "truncated": _truncated,
    "repetitive": _repetitive,
    "off-topic": _off_topic,
    "noisy": _noisy,
    "verbose": _verbose,
}


def make_pool(size: int, seed: int) -> list[dict[str, Any]]:
    """Draws the pool: `size` rows in random order, equally many from each source, no prompt twice.

    Raises:
        ValueError: never for sizes up to about 50,000, where different prompts run out.
    """
    rng = np.random.default_rng([seed, 1])
    rows, asked = [], set[tuple[str, str]]()
    names = list(SOURCES)
    for index in rng.permutation(size):
        source = names[int(index) % len(names)]
        kinds = SOURCES[source]
        flaw = str(rng.choice(list(kinds), p=list(kinds.values())))
        problem = _new_problem(rng, "pool", asked)
        answer = problem.answer if flaw == "good" else FLAWS[flaw](problem, rng)
        rows.append(_row(problem, answer, source, flaw if answer != problem.answer else "good"))
    return rows


def make_evaluation(name: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Draws an evaluation set: good answers, equally many of each task; its inputs occur in no other set or pool."""
    rng = np.random.default_rng([seed, 2 + EVALUATION_SETS.index(name)])
    asked: set[tuple[str, str]] = set()
    rows = []
    for index in range(size):
        problem = _new_problem(rng, name, asked, task=index % len(POOL_TASKS))
        rows.append(_row(problem, problem.answer, "evaluation", "good"))
    return rows


def part_of(problem: Problem) -> str:
    """Which set a problem belongs to, by its task and input alone: "fit", "report" (a tenth each) or "pool"."""
    bucket = int(digest_bytes(problem.task.encode(), problem.input.encode())[:8], 16) % 10
    return EVALUATION_SETS[bucket] if bucket < len(EVALUATION_SETS) else "pool"


def _new_problem(rng: np.random.Generator, part: str, asked: set[tuple[str, str]], task: int | None = None) -> Problem:
    for _ in range(10_000):
        chosen = POOL_TASKS[int(rng.integers(len(POOL_TASKS))) if task is None else task]
        problem = chosen.problem(rng)
        prompt = (problem.instruction, problem.input)
        if part_of(problem) == part and prompt not in asked:
            asked.add(prompt)
            return problem
    raise ValueError(f"no new problem for {part!r} after {len(asked)} prompts")


def _row(problem: Problem, answer: str, source: str, flaw: str) -> dict[str, Any]:
    good = flaw == "good"
    return {
        "instruction": problem.instruction,
        "input": problem.input,
        "output": answer,
        "source": source,
        "task": problem.task,
        "quality": int(good),
        "flaw": "" if good else flaw,
    }
