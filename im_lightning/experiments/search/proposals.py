"""Which sizes to try: FLAML's BlendSearch, as in the paper, or a plain grid."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from im_lightning._utils.optional import require
from im_lightning.errors import RequestError, message

METHODS = ("blendsearch", "grid")
_FRUITLESS = 50  # proposals in a row that were tried before: a small range is then used up


@dataclass(frozen=True)
class Point:
    """What a trial is of: rows, and how they are drawn by the rule's weights."""

    size: int
    strength: float = 1.0
    temperature: float = 1.0

    @property
    def title(self) -> str:
        """`512 rows`, with strength and temperature where they are not 1."""
        more = [f"{n} {v:.3g}" for n, v in (("strength", self.strength), ("temperature", self.temperature)) if v != 1.0]
        return ", ".join([f"{self.size:,} rows", *more])


@dataclass(frozen=True)
class Space:
    """Where to look.

    Args:
        low, high: Least and most rows, searched on a logarithmic scale.
        strength: Least and greatest strength of a tilt; None leaves it at 1.
        temperature: Of softmax and rank weights; None leaves it at 1.
    """

    low: int
    high: int
    strength: tuple[float, float] | None = None
    temperature: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.low < self.high:
            cause = f"{self.low} to {self.high} rows is no range"
            raise RequestError(message("--low and --high", cause, "give two sizes, the first of them smaller"))
        for name in ("strength", "temperature"):
            ends = getattr(self, name)
            if ends is not None and not 0 < ends[0] < ends[1]:
                cause = f"{ends[0]:g} to {ends[1]:g} is no range of positive numbers"
                raise RequestError(message(f"--{name}-range", cause, "give two, separated by a comma, such as 0.3,1"))


def grid(space: Space, count: int) -> list[Point]:
    """Different sizes at equal ratios from low to high, both included, as drawn by default.

    Raises:
        RequestError: fewer than two.
    """
    if count < 2:
        raise RequestError(message("--grid", f"it is {count}", "give at least 2 sizes"))
    sizes = np.geomspace(space.low, space.high, count).round().astype(int)
    return [Point(size) for size in dict.fromkeys(sizes.tolist())]


def blendsearch(
    space: Space, trials: int, seed: int, loss_of: Callable[[Point], float]
) -> Iterator[tuple[Point, float]]:
    """Tries points that BlendSearch proposes; a pure function of the space, the seed and the losses.

    It starts at the least size, moves from there by local search, and by Optuna's TPE elsewhere (Wang et al., ICLR
    2021). The same losses lead to the same proposals, so that a search goes on where it was by asking for them again.

    Args:
        space: Where.
        trials: Number of different points.
        seed: Of the proposals.
        loss_of: Makes a trial, or knows its loss.

    Yields:
        (point, loss), in the order tried.

    Raises:
        RequestError: flaml or optuna is not installed.
    """
    search = _searcher(space, trials, seed)
    tried: dict[Point, float] = {}
    number = fruitless = 0
    while len(tried) < trials and fruitless < _FRUITLESS:
        number += 1
        proposed = search.suggest(str(number))
        if proposed is None:
            fruitless += 1
            continue
        point = Point(**{name: type(getattr(Point(1), name))(value) for name, value in proposed.items()})
        new = point not in tried
        fruitless = 0 if new else fruitless + 1
        if new:
            tried[point] = loss_of(point)
        result = {"loss": tried[point], "config": proposed, "training_iteration": 1, "time_total_s": 1.0}
        search.on_trial_complete(str(number), result)
        if new:
            yield point, tried[point]


def _searcher(space: Space, trials: int, seed: int) -> Any:
    asked = ("search", "--method blendsearch", "pass --method grid")
    optuna = require("optuna", *asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its automl part is not installed
        flaml, tune = require("flaml", *asked), require("flaml.tune", *asked)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    domain = {"size": tune.lograndint(space.low, space.high + 1)}
    for name in ("strength", "temperature"):
        ends = asdict(space)[name]
        if ends is not None:
            domain[name] = tune.loguniform(*ends)
    return flaml.BlendSearch(
        metric="loss",
        mode="min",
        space=domain,
        low_cost_partial_config={"size": space.low},
        num_samples=trials,
        seed=seed,
    )
