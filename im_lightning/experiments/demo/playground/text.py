"""Plain text and base-task conversations: what the playground's base model is pretrained on."""

from __future__ import annotations

import numpy as np

from im_lightning.experiments.demo.playground import words
from im_lightning.experiments.demo.playground.tasks import BASE_TASKS, POOL_TASKS, Task, one, some

CHATTER = (
    "of course i am glad to help with that",
    "this is a very good question my friend",
    "i hope that this helps you a lot today",
    "feel free to ask me more at any time",
    "as you may know there is much to say here",
    "let me think about it for a moment first",
)
"""Sentences that say nothing; plain text holds them, and so do verbose answers of the pool."""

FILLER = (
    "the weather in the north is cold this week",
    "many people like to walk along the river",
    "the train to the coast leaves in the morning",
    "music was played in the old town hall",
    "the museum opens its doors after the summer",
    "a letter from the office came too late",
)
"""Remarks of plain text."""


def sentence(rng: np.random.Generator) -> str:
    """One sentence of plain text: facts, small scenes, series, remarks."""
    form = int(rng.integers(7))
    if form == 0:
        thing = one(rng, words.THINGS)
        return f"the {thing} is one more {words.KIND_OF[thing]} ."
    if form == 1:
        name, verb = one(rng, words.NAMES), one(rng, tuple(words.VERBS))
        return f"{name} {verb} a {one(rng, words.ADJECTIVES)} {one(rng, words.THINGS)} today ."
    if form == 2:
        done, thing = one(rng, tuple(words.VERBS.values())), one(rng, words.THINGS)
        return f"every {thing} was {done} in a {one(rng, words.PLACES)} before {one(rng, words.NAMES)} came ."
    if form == 3:
        start = int(rng.integers(35))
        return " ".join(str(n) for n in range(start, min(start + int(rng.integers(3, 7)), 41))) + " and so on ."
    if form == 4:
        a, b = (int(n) for n in rng.integers(0, 21, size=2))
        return f"{a} with {b} makes {a + b} ."
    if form == 5:
        listed, name = some(rng, words.THINGS, int(rng.integers(2, 6))), one(rng, words.NAMES)
        return f"there were {len(listed)} things , {' '.join(listed)} , and {name} noticed them ."
    return one(rng, CHATTER + FILLER) + " ."


def story(rng: np.random.Generator) -> str:
    """A few sentences; the later ones come back to the things of the first, as texts do."""
    name, place = one(rng, words.NAMES), one(rng, words.PLACES)
    listed = some(rng, words.THINGS, int(rng.integers(2, 6)))
    again = " ".join(listed)
    lines = [f"{name} has a {place} with {again} .", sentence(rng), f"so {name} says that {again} are in the {place} ."]
    if rng.random() < 0.5:
        lines.pop(1)
    return " ".join(lines)


def vocabulary() -> list[str]:
    """Every word that the playground can write, sorted."""
    known: set[str] = set(words.THINGS) | set(words.NAMES) | set(words.PLACES) | set(words.NUMBERS) | set(words.KINDS)
    known |= set(words.ADJECTIVES) | set(words.VERBS) | set(words.VERBS.values())
    for text in (*CHATTER, *FILLER):
        known.update(text.split())
    for task in (*POOL_TASKS, *BASE_TASKS):
        for phrasing in task.phrasings:
            known.update(word for word in phrasing.split() if not word.startswith("{"))
    rng = np.random.default_rng(0)
    for _ in range(300):  # the fixed words inside answers and sentences
        known.update(sentence(rng).split())
        known.update(story(rng).split())
        for task in (*POOL_TASKS, *BASE_TASKS):
            known.update(_words(task, rng))
    return sorted(known)


def _words(task: Task, rng: np.random.Generator) -> list[str]:
    problem = task.problem(rng)
    return [*problem.instruction.split(), *problem.input.split(), *problem.answer.split()]
