"""What a pool shares with an evaluation set: rows as they are, rows but for case and punctuation, prompts.

A row whose id is in the set is found by its content alone: a trailing space, a capital or a comma makes another row,
and so does another answer to the same prompt. Here texts are compared in a normal form that keeps what may change their
meaning: digits, operators, brackets, the order of words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.hashing import digest_bytes
from im_lightning.data.example import Example
from im_lightning.errors import RequestError, message

EXACT, NORMALISED, PROMPT = EXCLUSIONS = ("exact", "normalised", "prompt")
"""What may be left out of a pool; each of them with those before it."""

REASONS = {EXACT: "in_evaluation", NORMALISED: "in_evaluation_normalised", PROMPT: "prompt_in_evaluation"}
"""How reports name the rows left out."""

USUAL = PROMPT

_WIDE = "".join(map(chr, range(0xFF01, 0xFF5F)))
_MAPPED = str.maketrans(_WIDE + "‘’‛", "".join(chr(ord(c) - 0xFEE0) for c in _WIDE) + "'''")
_QUOTES = "\"'“”„«»"
_ENDS = _QUOTES + ",.;:?…。、"

Mask = NDArray[np.bool_]


def check_exclusion(name: str | None) -> None:
    """Refuses what is no exclusion; None stands for the usual one.

    Raises:
        RequestError: names those that are.
    """
    if name is not None and name not in EXCLUSIONS:
        cause, remedy = f"there is no {name!r}", f"use one of {', '.join(EXCLUSIONS)}"
        raise RequestError(message("exclude", cause, remedy))


def normalised(text: str) -> str:
    """The text without what does not change its meaning: case, width of its letters, white space, and the quotes and
    sentence marks at the ends of words.

    >>> normalised(" Add 2.5, and '3' . ") == normalised("add 2.5 and 3")
    True
    >>> normalised("2 - 3") == normalised("2 + 3"), normalised("x != y") == normalised("x = y")
    (False, False)
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_MAPPED)
    words = (word.lstrip(_QUOTES).rstrip(_ENDS) for word in text.casefold().split())
    kept = [word if word[-1] != "!" else _without_mark(word) for word in words if word]
    return " ".join([word for word in kept if word])  # nothing is left of a mark that stands alone


def _without_mark(word: str) -> str:
    """Without the exclamation mark, unless it is a factorial."""
    bare = word.rstrip(_ENDS + "!")
    return word if bare[-1:].isdigit() else bare


Turns = list[tuple[str, str]]
"""Roles and normalised texts of a conversation."""


def turns_of(example: Example) -> Turns:
    return [(turn.role, normalised(turn.content)) for turn in example.messages]


def conversation(turns: Turns) -> tuple[str, ...]:
    """The texts of all turns but the system's; () where they are empty."""
    texts = tuple(text for role, text in turns if role != "system")
    return texts if any(texts) else ()


def prompts(turns: Turns) -> Iterator[tuple[str, ...]]:
    """What precedes each answer, the whole conversation's prompt last; empty ones are left out."""
    texts = [text for _, text in turns]
    for place, (role, _) in enumerate(turns):
        if role == "assistant" and any(texts[:place]):
            yield tuple(texts[:place])


def prompt_groups(examples: Iterable[Example]) -> NDArray[np.int64]:
    """Which rows have the same prompt (all that precedes the last answer, in normal form): a number from 0 on for each
    prompt, int64 [N]. A row without one is alone.

    >>> from im_lightning import load_examples
    >>> prompts = ["Add 2 and 2.", "Count to 3.", "add 2 and 2"]
    >>> prompt_groups(load_examples([{"prompt": one, "response": "4"} for one in prompts])).tolist()
    [0, 1, 0]
    """
    known: dict[object, int] = {}
    out: list[int] = []
    for row, example in enumerate(examples):
        prompt = [normalised(turn.content) for turn in example.messages[:-1]]
        key = digest_bytes(*(text.encode("utf-8", "surrogatepass") for text in prompt)) if any(prompt) else row
        out.append(known.setdefault(key, len(known)))
    return np.array(out, dtype=np.int64)


class EvaluationRows:
    """Rows of evaluation sets, by what a pool's row may share with them.

    Args:
        examples: Rows of all sets, in order.
        kinds: Some of `EXCLUSIONS`: what is looked for.
    """

    def __init__(self, examples: Sequence[Example], kinds: Sequence[str] = EXCLUSIONS) -> None:
        self.kinds = tuple(kinds)
        self._places: dict[str, dict[object, int]] = {kind: {} for kind in self.kinds}
        for at, example in enumerate(examples):
            turns = turns_of(example)
            for kind in self.kinds:
                *_, key = (None, *_keys(example, turns, kind))
                if key is not None:
                    self._places[kind].setdefault(key, at)

    def shared(self, example: Example, turns: Turns | None = None) -> tuple[str, int] | None:
        """The strongest kind in which the example is there, and which row it is; None if in none. `turns` are its own,
        where they are known already."""
        turns = turns_of(example) if turns is None and self.kinds != (EXACT,) else turns or []
        for kind in self.kinds:
            places = self._places[kind]
            for key in _keys(example, turns, kind):
                if key in places:
                    return kind, places[key]
        return None


def _keys(example: Example, turns: Turns, kind: str) -> Iterable[object]:
    """What is compared; of an evaluation row only the last counts, its prompt as a whole."""
    if kind == EXACT:
        return (example.id,)
    if kind == PROMPT:
        return prompts(turns)
    texts = conversation(turns)
    return (texts,) if texts else ()


def left_out(pool: Sequence[Example], evaluation: Sequence[Example], exclude: str = USUAL) -> dict[str, Mask]:
    """Rows of a pool that are never trained on, for what they share with evaluation rows.

    Args:
        pool: N examples.
        evaluation: Examples of all evaluation sets.
        exclude: "exact": the same content; "normalised": also rows that differ in case, white space and punctuation
            alone; "prompt": also rows whose prompt (all that precedes the answer, system turn included) is one of the
            set's, whatever their answer.

    Returns:
        Reason (one of `REASONS`) → bool [N]; a row is in the first that holds.

    Raises:
        RequestError: there is no such exclusion.

    >>> from im_lightning import load_examples
    >>> pool = load_examples([{"prompt": "Add 2 and 2.", "response": "4"}, {"prompt": "add 2 and 2", "response": "5"}])
    >>> {reason: mask.tolist() for reason, mask in left_out(pool, pool[:1]).items()}["prompt_in_evaluation"]
    [False, True]
    """
    check_exclusion(exclude)
    kinds, ids = EXCLUSIONS[: EXCLUSIONS.index(exclude) + 1], {example.id for example in evaluation}
    out = {REASONS[kind]: np.zeros(len(pool), dtype=np.bool_) for kind in kinds}
    if not ids:
        return out
    out[REASONS[EXACT]][:] = [example.id in ids for example in pool]
    there = EvaluationRows(evaluation, kinds[1:])
    for row in np.flatnonzero(~out[REASONS[EXACT]]).tolist() if there.kinds else []:
        if (found := there.shared(pool[row])) is not None:
            out[REASONS[found[0]]][row] = True
    return out
