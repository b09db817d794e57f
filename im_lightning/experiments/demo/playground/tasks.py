"""Instruction tasks with verifiable answers: eight for the pool and the evaluation, six others for the base model.

The base model is pretrained on `BASE_TASKS` and plain text only, so that a finetune on the pool has something to teach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from im_lightning.experiments.demo.playground import words


@dataclass(frozen=True)
class Problem:
    """One instruction with its input and the right answer, each a text of words parted by single spaces."""

    task: str
    instruction: str
    input: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A family of problems.

    Args:
        name: The family's name.
        phrasings: The ways to ask; "{…}" slots are filled by `draw`.
        draw: Draws (slots of the instruction, input, answer) from a generator.
    """

    name: str
    phrasings: tuple[str, ...]
    draw: Callable[[np.random.Generator], tuple[dict[str, str], str, str]]

    def problem(self, rng: np.random.Generator) -> Problem:
        """Draws one problem in one of the phrasings."""
        slots, text, answer = self.draw(rng)
        phrasing = self.phrasings[int(rng.integers(len(self.phrasings)))]
        return Problem(self.name, phrasing.format(**slots), text, answer)


def some(rng: np.random.Generator, pool: tuple[str, ...], count: int) -> list[str]:
    """`count` different words of `pool` in random order."""
    return [pool[int(i)] for i in rng.permutation(len(pool))[:count]]


def one(rng: np.random.Generator, pool: tuple[str, ...]) -> str:
    return pool[int(rng.integers(len(pool)))]


def _copy(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    listed = " ".join(some(rng, words.THINGS, int(rng.integers(3, 8))))
    return {}, listed, f"{listed} ."


def _reverse(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    listed = some(rng, words.THINGS, int(rng.integers(3, 7)))
    return {}, " ".join(listed), " ".join([*listed[::-1], "."])


def _sort(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    numbers = some(rng, words.NUMBERS, int(rng.integers(3, 6)))
    return {}, " ".join(numbers), " ".join([*sorted(numbers, key=int), "."])


def _count(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    listed = some(rng, words.THINGS, int(rng.integers(2, 8)))
    return {}, " ".join(listed), f"the list has {len(listed)} words ."


def _arithmetic(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    terms = [int(n) for n in rng.integers(1, 14, size=int(rng.integers(2, 4)))]
    return {}, " and ".join(map(str, terms)), " plus ".join(map(str, terms)) + f" is {sum(terms)} ."


def _lookup(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    size = int(rng.integers(2, 5))
    places, things = some(rng, words.PLACES, size), some(rng, words.THINGS, size)
    text = " , ".join(f"{place} : {thing}" for place, thing in zip(places, things, strict=True))
    wanted = int(rng.integers(size))
    return {"place": places[wanted]}, text, f"the {places[wanted]} holds the {things[wanted]} ."


def _rewrite(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    name, verb, thing = one(rng, words.NAMES), one(rng, tuple(words.VERBS)), one(rng, words.THINGS)
    adjective = one(rng, words.ADJECTIVES)
    return {}, f"{name} {verb} the {adjective} {thing}", f"the {adjective} {thing} is {words.VERBS[verb]} by {name} ."


def _classify(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    left, right = some(rng, words.THINGS, 2)
    kinds = f"{left} belongs to {words.KIND_OF[left]} and {right} to {words.KIND_OF[right]} ."
    return {}, f"{left} {right}", kinds


POOL_TASKS: tuple[Task, ...] = (
    Task(
        "copy",
        ("copy these words", "write the same words again", "repeat the list as it is", "please echo this list",
         "type out what you read here", "say back these words"),
        _copy,
    ),
    Task(
        "reverse",
        ("reverse these words", "write the list backwards", "give the words from end to start",
         "turn the order of this list around", "please read the list from right to left", "flip this list"),
        _reverse,
    ),
    Task(
        "sort",
        ("sort these numbers", "put the numbers in rising order", "order the numbers from low to high",
         "arrange these values", "please rank the numbers upwards", "line up the numbers by size"),
        _sort,
    ),
    Task(
        "count",
        ("count these words", "how many words are here ?", "tell me the length of this list",
         "what is the number of words ?", "please find how long the list is", "give the word count"),
        _count,
    ),
    Task(
        "arithmetic",
        ("add these numbers", "what is the sum ?", "compute the total of all", "how much is it together ?",
         "please work out the sum", "find the total"),
        _arithmetic,
    ),
    Task(
        "lookup",
        ("what is in the {place} ?", "look up the {place}", "tell me what the {place} holds",
         "find the thing in the {place}", "please check the {place}", "which thing does the {place} hold ?"),
        _lookup,
    ),
    Task(
        "rewrite",
        ("rewrite this in the passive", "say it the other way around", "turn the sentence into the passive",
         "please make this sentence passive", "start the sentence with the thing", "change the voice"),
        _rewrite,
    ),
    Task(
        "classify",
        ("classify these things", "which kinds are these ?", "name the kind of each thing",
         "what sort of things are they ?", "please tell the kinds", "to which kind does each belong ?"),
        _classify,
    ),
)  # fmt: skip


def _first(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    listed = some(rng, words.THINGS, int(rng.integers(3, 7)))
    return {}, " ".join(listed), f"it begins with {listed[0]}"


def _last(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    listed = some(rng, words.THINGS, int(rng.integers(3, 7)))
    return {}, " ".join(listed), f"it ends with {listed[-1]}"


def _double(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    listed = some(rng, words.THINGS + words.NUMBERS, int(rng.integers(2, 6)))
    return {}, " ".join(listed), " ".join(word for word in listed for _ in range(2))


def _choose(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    kinds = some(rng, tuple(words.KINDS), int(rng.integers(2, 5)))
    listed = [one(rng, words.KINDS[kind]) for kind in kinds]
    wanted = int(rng.integers(len(kinds)))
    return {"kind": kinds[wanted]}, " ".join(listed), f"i choose {listed[wanted]}"


def _compare(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    low, high = sorted(some(rng, words.NUMBERS, 2), key=int)
    shown = f"{low} {high}" if rng.random() < 0.5 else f"{high} {low}"
    return {}, shown, f"{high} wins over {low}"


def _owner(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    size = int(rng.integers(2, 4))
    names, things = some(rng, words.NAMES, size), some(rng, words.THINGS, size)
    text = " , ".join(f"{name} has {thing}" for name, thing in zip(names, things, strict=True))
    wanted = int(rng.integers(size))
    return {"thing": things[wanted]}, text, f"{names[wanted]} owns {things[wanted]}"


def _mention(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    listed = some(rng, words.THINGS + words.NUMBERS, int(rng.integers(2, 7)))
    picked = [listed[int(i)] for i in rng.permutation(len(listed))[: int(rng.integers(1, 4))]]
    forms = ("i like {} .", "there is {} and more", "{} came by", "{} are here .", "maybe {} ?", "the {} is mine .")
    return {}, " ".join(listed), one(rng, forms).format(" ".join(picked))


def _chat(rng: np.random.Generator) -> tuple[dict[str, str], str, str]:
    name, thing, place = one(rng, words.NAMES), one(rng, words.THINGS), one(rng, words.PLACES)
    said = ("{n} has lost the {t} again", "the {t} of {n} is gone", "where did {n} leave the {t} ?")
    reply = ("did {n} look in the {p} ?", "the {t} was in a {p} .", "{n} had a {t} today ?", "a {p} for the {t} ?")
    slots = {"n": name, "t": thing, "p": place}
    return {}, one(rng, said).format(**slots), one(rng, reply).format(**slots)


BASE_TASKS: tuple[Task, ...] = (
    Task("mention", ("mention some of them", "talk about these", "any thoughts ?", "go on with this"), _mention),
    Task("chat", ("hello", "good morning", "listen", "you know what ?"), _chat),
    Task("first", ("how does it begin ?", "name the opening word", "give me the first"), _first),
    Task("last", ("how does it end ?", "name the closing word", "give me the last"), _last),
    Task("double", ("write every item twice", "double all of it", "stutter this"), _double),
    Task("choose", ("choose the {kind}", "pick one {kind} for me", "i want a {kind}"), _choose),
    Task("compare", ("compare both", "which value wins ?", "is one larger ?"), _compare),
    Task("owner", ("who owns the {thing} ?", "name the owner of {thing}", "whose is the {thing} ?"), _owner),
)
