"""What an indicator is, and the registry that finds one by name.

An indicator of one text takes ten lines:

    @register_indicator("exclamation_share")
    class ExclamationShare(Indicator):
        "Share of exclamation marks among the response's characters."
        version = 1

        def score(self, example):
            if not example.response:
                raise Missing("empty response")
            return example.response.count("!") / len(example.response)

Indicators that read a model name what they need and turn it into values; the pass over the model is shared, and the
scoring layer makes it.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from im_lightning.data.example import Example
from im_lightning.errors import RequestError, message
from im_lightning.indicators.built_in import BUILT_IN, KNN

if TYPE_CHECKING:
    from im_lightning.data.tokenization import Encoded

EMPTY_RESPONSE = "empty response"
NEEDS = ("text", "tokens", "conditional", "unconditional", "tuned", "embedding", "gradient", "reward", "unieval")
_TOGETHER = ({"tokens", "conditional", "unconditional"}, {"tokens", "tuned"}, *({one} for one in NEEDS))
"""What one pass provides, beside the text."""
_RESERVED = ("row", "id", "source", "predicted_log_loss")
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


class Missing(Exception):
    """Raised by `Indicator.score` where an example has no value; `reason` goes into the table beside the NaN.

    >>> Missing("empty response").reason
    'empty response'
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of n responses: `sums` float64 [n] (nats), `counts` int64 [n] (tokens)."""

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """What a reward model or UniEval answered on n examples: `logits` float64 [n], `notes` on what it was shown."""

    logits: NDArray[np.float64]
    notes: Sequence[str | None]


@dataclass(frozen=True)
class Features:
    """What the shared passes know about n examples; a field is None unless an indicator needs it.

    Args:
        examples: The examples.
        encoded: Their tokens under the template: what `conditional` was computed on.
        encoded_alone: The tokens of the responses alone: what `unconditional` was computed on.
        conditional: Likelihoods of the assistant tokens given the prompt.
        unconditional: Likelihoods of the last response without its prompt.
        tuned: As conditional, after a short finetune of the base model on the target rows.
        answers: Of the indicator's own model, to what its `judged` made of the examples.
    """

    examples: Sequence[Example]
    encoded: Sequence[Encoded] | None = None
    encoded_alone: Sequence[Encoded] | None = None
    conditional: Likelihood | None = None
    unconditional: Likelihood | None = None
    tuned: Likelihood | None = None
    answers: Answers | None = None


@dataclass(frozen=True)
class Scores:
    """Values of one indicator for n examples.

    Args:
        values: float64 [n], NaN where there is none.
        reasons: n texts, None where there is a value.
        notes: n texts on values that hold with a reservation ("response cut"), None elsewhere; empty if no row has one.
    """

    values: NDArray[np.float64]
    reasons: list[str | None]
    notes: list[str | None] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """A fixed pool that the examples of any pool are compared with.

    Args:
        vectors: One unit vector per distinct example of the reference, float32 [R, d]; NaN where there is none.
        counts: int64 [R], how many rows of the reference each stands for.
        own: int64 [U], where each example of the pool stands in the reference itself, -1 where it does not.
    """

    vectors: NDArray[np.float32]
    counts: NDArray[np.int64]
    own: NDArray[np.int64]


class Indicator:
    """One number per example that may say something about its quality.

    Attributes:
        name: The column's name; set by `register_indicator`.
        version: Raise it when the definition changes: stored values of another version are not used.
        needs: What `compute` reads, of `NEEDS`: "text" (the example alone), "tokens" (the tokenizer), "conditional"
            and "unconditional" (likelihoods under the base model), "tuned" (under it finetuned on the target rows),
            "embedding" or "gradient" (one vector per example), "reward" or "unieval" (answers of those models; such a
            class has `judged`). Of several models: one indicator for each, and `derived_from`.
        pool_dependent: Whether the value depends on other examples (of the pool, of a reference; with "gradient" the
            target rows); such a class has `compute_pool`.
        derived_from: Names of indicators it is calculated from; such a class has `derive` and needs nothing else.
    """

    name: str = ""
    version: int = 1
    needs: tuple[str, ...] = ("text",)
    pool_dependent: bool = False
    derived_from: tuple[str, ...] = ()

    def score(self, example: Example) -> float:
        """The value of one example, from its text.

        Raises:
            Missing: it has none; the reason goes into the table.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither score nor compute")

    def compute(self, features: Features) -> Scores:
        """Values of n examples; by default `score` of each."""
        values = np.full(len(features.examples), np.nan)
        reasons: list[str | None] = [None] * len(features.examples)
        for position, example in enumerate(features.examples):
            try:
                values[position] = self.score(example)
            except Missing as missing:
                reasons[position] = missing.reason
            else:
                if not np.isfinite(values[position]):
                    reasons[position] = no_number(self.name)
                    values[position] = np.nan
        return Scores(values, reasons)

    def refuse(self, example: Example) -> str | None:
        """Why an example has no value, however it was computed; None where it may have one.

        For what a definition comes to leave out: other stored values stay as they are, and the version too.
        """
        return None

    def judged(self, example: Example) -> Any:
        """What the reward model (an `Example`) or UniEval (a `models.unieval.Question`) is shown of an example.

        Raises:
            Missing: there is nothing to score; the reason goes into the table.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a scorer model but has no judged")

    def derive(self, columns: Mapping[str, Scores]) -> Scores:
        """Values from those of the indicators in `derived_from`."""
        raise NotImplementedError(f"{type(self).__name__} has derived_from but no derive")

    @classmethod
    def pool_numerics(cls, rows: int, device: str = "cpu") -> dict[str, str]:
        """What in the calculation over a pool of so many distinct examples can change the values a little."""
        return {}

    @classmethod
    def check_pool(cls, rows: int, device: str = "cpu") -> None:
        """Asked before any work whether the calculation over a pool of so many distinct examples can be made here.

        Raises:
            RequestError: it cannot; says what is lacking.
        """

    @classmethod
    def compute_pool(
        cls,
        group: Sequence[Any],
        vectors: NDArray[np.float32],
        device: str = "cpu",
        counts: NDArray[np.int64] | None = None,
        reference: Reference | None = None,
    ) -> list[Scores]:
        """Values of several indicators of this class over the whole pool, in one pass.

        Args:
            group: The indicators asked for.
            vectors: One unit vector per distinct example, float32 [U, d], perhaps a memory map; NaN where none.
            device: Where to calculate.
            counts: int64 [U], rows of the pool that each stands for; by default 1.
            reference: The examples to compare with, instead of those of the pool.

        Returns:
            Per indicator the values of the U examples.
        """
        raise NotImplementedError(f"{cls.__name__} is pool-dependent but has no compute_pool")


def no_number(name: str) -> str:
    """The reason of a value that is infinite or NaN."""
    return f"{name} is not a finite number"


_registered: dict[str, type[Indicator]] = {}
_I = TypeVar("_I", bound=type[Indicator])


def register_indicator(name: str) -> Callable[[_I], _I]:
    """Class decorator: makes an `Indicator` known under `name`, a column of score tables.

    Raises:
        RequestError: the name is ill-formed or taken, or what is decorated is no `Indicator` class.

    >>> @register_indicator("questions_of_the_example")
    ... class Questions(Indicator):
    ...     def score(self, example):
    ...         return float(example.response.count("?"))
    >>> get_indicator("questions_of_the_example").name
    'questions_of_the_example'
    """

    def register(cls: _I) -> _I:
        what = f"register_indicator({name!r})"
        ours = cls.__module__.startswith("im_lightning.indicators.") if isinstance(cls, type) else False
        if not isinstance(name, str) or _NAME.match(name) is None or name.endswith("_reason") or name in _RESERVED:
            cause = "the name is not usable as a column"
            raise RequestError(message(what, cause, "use lower-case letters, digits and _, such as 'quote_count'"))
        if not (isinstance(cls, type) and issubclass(cls, Indicator)):
            cause = f"{cls!r} is not a subclass of Indicator"
            raise RequestError(message(what, cause, "decorate a class that inherits from Indicator"))
        if not ours and (name in BUILT_IN or KNN.match(name)):
            raise RequestError(message(what, "the name belongs to an indicator of im_lightning", "choose another name"))
        taken = _registered.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RequestError(message(what, f"the name belongs to {taken!r}", "choose another name"))
        unknown = [need for need in cls.needs if need not in NEEDS]
        if unknown:
            cause = f"needs {unknown[0]!r}, which no pass provides"
            raise RequestError(message(what, cause, f"use of {', '.join(NEEDS)}"))
        asked = [need for need in NEEDS if need in cls.needs and need != "text"]
        if not any(one.issuperset(asked) for one in _TOGETHER) and not (cls.pool_dependent or cls.derived_from):
            cause = f"needs {' and '.join(map(repr, asked))}, which no pass provides together"
            remedy = "register an indicator for each, and name these in derived_from of this one, as loss_drop does"
            raise RequestError(message(what, cause, remedy))
        cls.name = name
        _registered[name] = cls
        return cls

    return register


def known_indicators() -> list[str]:
    """Names that `get_indicator` knows; `knn_<i>` stands for any i."""
    built_in = [name for name in BUILT_IN if not KNN.match(name)]
    return [*built_in, "knn_<i>", *(name for name in _registered if name not in BUILT_IN)]


def get_indicator(name: str) -> Indicator:
    """The indicator of that name; `FILE.py:NAME` or `package.module:NAME` is NAME, after importing that file or module.

    Raises:
        RequestError: there is none; lists those there are and the closest. The file or module cannot be imported.
    """
    where, _, name = name.rpartition(":")
    if where:
        from im_lightning.indicators.plugins import load_plugin

        load_plugin(where)
    knn = KNN.match(name)
    if knn is not None and int(knn[1]) > 0:
        return _module("knn").KNNIndicator(int(knn[1]))
    if name in BUILT_IN:
        _module(BUILT_IN[name].module)  # registers its indicators
    found = _registered.get(name)
    if found is not None:
        return found()
    close = difflib.get_close_matches(name, [*known_indicators(), "knn_6"], n=1)
    own = "your own is FILE.py:NAME; for those of another tool name a score table that has them (docs/indicators.md)"
    meant = f"ask for {close[0]}" if close else f"ask for one of those; {own}"
    cause = f"there is none of that name; there are {', '.join(known_indicators())}"
    raise RequestError(message(f"indicator {name!r}", cause, meant))


def _module(name: str) -> Any:
    """A module of built-in indicators, loaded when first asked for."""
    return importlib.import_module(f"im_lightning.indicators.{name}")


def get_indicators(names: Sequence[str]) -> list[Indicator]:
    """The named indicators, each once, in order.

    Raises:
        RequestError: a name is unknown, or there are none.
    """
    if isinstance(names, str) or not names:
        raise RequestError(message(f"indicators {names!r}", "is not a list of names", "give such as ['mtld', 'ppl']"))
    found: dict[str, Indicator] = {}
    for name in names:
        indicator = get_indicator(name)
        found.setdefault(indicator.name, indicator)
    return list(found.values())


def with_parts(indicator: Indicator) -> list[Indicator]:
    """What an indicator is derived from, however many steps away, each before what is derived from it; itself last."""
    found: dict[str, Indicator] = {}
    for one in get_indicators(indicator.derived_from) if indicator.derived_from else ():
        found.update((part.name, part) for part in with_parts(one) if part.name not in found)
    return [*found.values(), indicator]
