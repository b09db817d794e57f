"""How many times the random tokens an arm is worth: the curve of random rows, read at the arm's loss.

Random rows at several numbers of tokens give a curve, loss against log tokens: their means made monotone (isotonic
regression) and joined by straight lines. An arm is as good as the tokens at which the curve has its loss. Its interval
holds every number of tokens at which a two-way test, over seeds and evaluation examples, does not tell the arm from the
curve (Fieller's way), so that at 1× it says what the table says of arm and random. Where arm or interval lie beyond the
curve, that is all that is known: nothing is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from im_lightning.experiments.compare.statistics import ExampleSums, TwoWay, resampled_losses, two_way, with_rule
from im_lightning.models.cost import Cost

SCALES = (0.5, 1.0, 2.0, 4.0)
"""Times the tokens of an arm at which random rows are measured."""
_GRID = 120

NOTE = (
    "worth: the arm is as good as so many times the random tokens, read at the curve of random rows, with its 95 % "
    "interval over seeds and evaluation examples; no value beyond the curve. net: what random rows of the same "
    "loss would cost, over what the arm cost with its evidence (scoring, and the runs behind the rule): above 1× it "
    "has paid by itself. FLOPs: forward 1, backward 2 per token and parameter."
)


@dataclass(frozen=True)
class Multiplier:
    """As good as so many times something; at `least` or `most`, the ends of what was measured, it lies beyond them.

    Args:
        value: The estimate.
        low, high: 95 % interval; NaN with one seed.
        least, most: The ends.
    """

    value: float
    low: float
    high: float
    least: float
    most: float

    def __mul__(self, times: float) -> Multiplier:
        return Multiplier(*(times * part for part in (self.value, self.low, self.high, self.least, self.most)))

    @property
    def text(self) -> str:
        """`1.8×`, or `more than 4×`."""
        return self._text(self.value)

    @property
    def interval(self) -> str:
        """`1.2× to more than 4×`; nothing where there is none."""
        return "" if math.isnan(self.low) else f"{self._text(self.low)} to {self._text(self.high)}"

    def _text(self, value: float) -> str:
        if math.isnan(value):
            return "not known"
        beyond = "more than " if value >= self.most else "less than " if value <= self.least else ""
        return f"{beyond}{value:.2g}×"

    def to_json(self) -> dict[str, float | None]:
        """JSON-like; what is not known is None."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Multiplier:
        """What `to_json` wrote."""
        names = cls.__dataclass_fields__
        return cls(**{n: math.nan if value.get(n) is None else float(value[n]) for n in names})


class TokenCurve:
    """Loss of random rows against the log of their tokens.

    Args:
        scales: [K], tokens as multiples of an arm's, ascending.
        losses: [K], mean losses in nats per token.

    >>> TokenCurve([0.5, 1, 2], [3.0, 2.0, 1.0]).scale_of(1.5).round(3).item()
    1.414
    """

    def __init__(self, scales: ArrayLike, losses: ArrayLike) -> None:
        from scipy.optimize import isotonic_regression

        self.scales = np.asarray(scales, dtype=np.float64)
        measured = np.asarray(losses, dtype=np.float64)
        blocks = isotonic_regression(measured, increasing=False).blocks
        sizes = np.diff(blocks)
        block = np.repeat(np.arange(len(sizes)), sizes)
        self._pooled = (block[:, None] == block[None, :]) / sizes[block][:, None]
        self.losses: NDArray[np.float64] = self._pooled @ measured
        self._logs = np.log(self.scales)

    def parts(self, scale: float) -> NDArray[np.float64]:
        """[K], how much of each measured loss is in the curve's loss at `scale`."""
        unit = np.eye(len(self.scales))
        return np.array([np.interp(math.log(scale), self._logs, one) for one in unit]) @ self._pooled

    def scale_of(self, loss: float) -> np.float64:
        """Where the curve has that loss, the middle of a level part; 0 or inf where the curve does not reach it."""
        y, u = self.losses, self._logs
        if loss > y[0]:
            return np.float64(0.0)
        if loss < y[-1]:
            return np.float64(np.inf)
        found = [u[k] for k in np.flatnonzero(y == loss)]
        for k in np.flatnonzero((y[:-1] > loss) & (loss > y[1:])):
            found.append(u[k] + (u[k + 1] - u[k]) * (y[k] - loss) / (y[k] - y[k + 1]))
        return np.exp((min(found) + max(found)) / 2)


@dataclass(frozen=True)
class CurvePoint:
    """Random rows at one number of tokens.

    Args:
        scale: Times the tokens of an arm.
        tokens, steps: Means over seeds.
        losses: [seeds].
        fitted: The curve's loss there.
        cost: Of one finetune.
        run_ids: [seeds].
    """

    scale: float
    tokens: float
    steps: float
    losses: tuple[float, ...]
    fitted: float
    cost: Cost
    run_ids: tuple[str, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.losses))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean": self.mean, "cost": self.cost.to_json()}


class Reading:
    """Arms read at a curve: one set of bootstrap draws for all of them.

    Args:
        curve: Of random rows.
        points: The arm of each of the curve's scales, in their order.
        sums: Losses by example of arms and points.
        spread: arm → (sd of log loss over rules from other ledgers, degrees of freedom).
    """

    def __init__(
        self,
        curve: TokenCurve,
        points: Sequence[str],
        sums: ExampleSums,
        spread: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.curve, self.points, self.spread = curve, list(points), dict(spread or {})
        self.names = list(sums.sums)
        self.seeds, self.examples = sums.sums[self.names[0]].shape
        tokens = sums.tokens.astype(np.float64)
        losses = np.array([sums.sums[name].sum(axis=1) / tokens.sum() for name in self.names])
        self._means = losses.mean(axis=1)
        if self.seeds > 1:
            self._of_seeds = np.atleast_2d(np.cov(losses)) / self.seeds
            drawn = resampled_losses([sums.sums[name] for name in self.names], tokens)
            self._variance = np.atleast_2d(np.cov(drawn, rowvar=False))

    def difference(self, arm: str, scale: float) -> TwoWay:
        """The arm's loss minus the curve's at `scale`."""
        parts = np.zeros(len(self.names))
        np.add.at(parts, [self.names.index(name) for name in self.points], -self.curve.parts(scale))
        parts[self.names.index(arm)] += 1.0
        variance, of_seeds = (max(0.0, float(parts @ v @ parts)) for v in (self._variance, self._of_seeds))
        found = two_way(float(parts @ self._means), variance, of_seeds, self.seeds, self.examples)
        sd, df = self.spread.get(arm, (0.0, math.inf))
        return with_rule(found, sd * float(self._means[self.names.index(arm)]), df)

    def multiplier(self, arm: str) -> Multiplier:
        """How many times the random tokens the arm is worth."""
        least, most = float(self.curve.scales[0]), float(self.curve.scales[-1])
        estimate = float(self.curve.scale_of(float(self._means[self.names.index(arm)])))
        value = min(max(estimate, least), most)
        if self.seeds < 2:
            return Multiplier(value, math.nan, math.nan, least, most)
        grid = np.unique([*np.geomspace(least, most, _GRID + 1), *self.curve.scales])
        tests = [(scale, self.difference(arm, scale)) for scale in grid.tolist()]
        kept = [value, *(scale for scale, found in tests if abs(found.difference) <= found.half_width)]
        return Multiplier(value, min(kept), max(kept), least, most)
