"""What a rule predicts: an evaluation loss, a task score, or a weighted sum; others may be watched beside it.

A target is a text, the `evaluation` of a fit and of its rule:

    held-out             the loss on a set, every token counting alike
    held-out:example     the same with every instruction counting alike
    em:gsm8k             the exact match on a task, as its error rate (the share of wrong answers): lower is better
    a=0.5,b=0.3,c=0.2    a weighted sum of losses, or of error rates
    a=1,em:gsm8k=0       the loss on a, while the exact match on gsm8k is watched: it must not get worse
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from im_lightning.errors import RequestError, message

BY_EXAMPLE = ":example"
"""After a set's name: its loss with every instruction counting alike, in place of every token."""
SCORE = "em:"
"""Before a task's name: its exact match."""
_WEIGHED = re.compile(r"\s*(.+?)\s*=\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")


def set_of(term: str) -> str:
    """The set or task that a loss or a score is of.

    >>> set_of("held-out:example"), set_of("em:gsm8k"), set_of("held-out")
    ('held-out', 'gsm8k', 'held-out')
    """
    return term.removeprefix(SCORE) if term.startswith(SCORE) else term.removesuffix(BY_EXAMPLE)


@lru_cache(maxsize=256)
def _terms(evaluation: str) -> tuple[tuple[str, float], ...]:
    parts = [_WEIGHED.fullmatch(part) for part in evaluation.split(",")]
    if not all(parts):
        return ((evaluation, 1.0),)
    names, weights = [part[1] for part in parts if part], [float(part[2]) for part in parts if part]
    if len(set(names)) < len(names):
        raise RequestError(message(f"target {evaluation}", "it names one twice", "give each a single weight"))
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
        remedy = "give weights above 0, and 0 to what is only watched: a=0.7,b=0.3,c=0"
        raise RequestError(message(f"target {evaluation}", "a weight is negative, or all are 0", remedy))
    if len({name.startswith(SCORE) for name, w in zip(names, weights, strict=True) if w}) > 1:
        cause = "a loss is in nats per token and a score is a share of answers: their sum has no unit"
        remedy = "weigh losses or scores, and watch the others with weight 0: a=1,em:gsm8k=0"
        raise RequestError(message(f"target {evaluation}", cause, remedy))
    return tuple((name, w / sum(weights)) for name, w in zip(names, weights, strict=True))


def terms_of(evaluation: str) -> dict[str, float]:
    """Loss or score → its weight in the sum; the weights sum to 1, and what is only watched has 0.

    Raises:
        RequestError: weights that are negative or all 0, a term named twice, losses and scores in one sum.

    >>> terms_of("a=3,b=1,em:gsm8k=0"), terms_of("held-out")
    ({'a': 0.75, 'b': 0.25, 'em:gsm8k': 0.0}, {'held-out': 1.0})
    """
    return dict(_terms(evaluation))


def target_of(terms: Mapping[str, float]) -> str:
    """The text of a target; what `terms_of` reads.

    >>> target_of({"a": 0.75, "b": 0.25}), target_of({"a": 1.0})
    ('a=0.75,b=0.25', 'a')
    """
    return next(iter(terms)) if len(terms) == 1 else ",".join(f"{name}={w:.6g}" for name, w in terms.items())


def read_targets(text: str) -> list[str]:
    """The targets that `refit --target` names: a weighted sum is one; of several without weights each is one, beside
    which the others are watched.

    Raises:
        RequestError: some have a weight and others none, or as `terms_of`.

    >>> read_targets("a=0.5,b=0.5"), read_targets("a,em:gsm8k")
    (['a=0.5,b=0.5'], ['a=1,em:gsm8k=0', 'a=0,em:gsm8k=1'])
    """
    parts = [part.strip() for part in text.split(",")]
    weighed = [_WEIGHED.fullmatch(part) is not None for part in parts]
    if not all(parts) or (any("=" in part for part in parts) and not all(weighed)):
        remedy = "write a=0.5,b=0.5 for a weighted sum, a,b for a rule on each"
        raise RequestError(message(f"--target {text}", "it is neither names nor names with their weights", remedy))
    if weighed[0]:
        return [target_of(terms_of(text))]
    parts = list(dict.fromkeys(parts))
    return [target_of({name: float(name == one) for name in parts}) for one in parts]


def is_score(evaluation: str) -> bool:
    """Whether a target is of scores: its "loss" is an error rate."""
    return any(name.startswith(SCORE) for name, w in terms_of(evaluation).items() if w)


def target_text(evaluation: str) -> str:
    """A target in words, without what is watched.

    >>> target_text("a=0.75,b=0.25,em:gsm8k=0"), target_text("em:gsm8k")
    ('0.75 a + 0.25 b', 'gsm8k')
    """
    summed = {name.removeprefix(SCORE): w for name, w in terms_of(evaluation).items() if w}
    return next(iter(summed)) if len(summed) == 1 else " + ".join(f"{w:.3g} {name}" for name, w in summed.items())


def error_rate(score: Mapping[str, Any]) -> float:
    """Share of wrong answers, from `exact_match` and the number of `answers`; NaN where either is not known.

    Half an answer counts as wrong and half as right in addition, so that the logarithm exists where all are right.

    >>> error_rate({"exact_match": 0.75, "answers": 100}), error_rate({"exact_match": 1.0, "answers": 99})
    (0.2524752475247525, 0.005)
    """
    share, answers = score.get("exact_match"), score.get("answers")
    return math.nan if share is None or not answers else ((1.0 - share) * answers + 0.5) / (answers + 1.0)
