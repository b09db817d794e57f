"""The regressors φ of a rule: each indicator on the scale it is fitted on, clipped at quantiles of the fit pool.

One φ serves run means, predictions for single examples and tilted weights. Clipping is at quantiles of *examples*:
at the much narrower range of run means it would destroy the ranking; without it one outlier rules a mean.

The basis of the additive rule is a piecewise-linear function of φ per indicator, by hat functions at pool quantiles.
A linear rule cannot say that both extremes are bad. Hat functions can, and their dataset means are linear in the
dataset as those of φ are, so one rule serves run means and single examples. Those of an indicator sum to 1 and
contain φ itself: φ = Σ knot_k · hat_k. The first hat is left out of the regressors, since the intercept knows it.

The source of a row is a regressor too: 1 in a row of the source, so that its mean is the source's share of a dataset.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import DataError, message
from im_lightning.indicators.built_in import BUILT_IN, KNN

SHARE = "share"
KINDS = ("log", "log1p", "identity", SHARE)
OF_SOURCE = " of "
"""Between an indicator and a source, in the name of a regressor: `mtld of web`."""
CLIP_QUANTILES = (0.005, 0.995)
HATS = 6
"""Regressors per indicator where the pool has that many different quantiles: seven knots."""
_NARROWEST = 0.02  # of the clipped range: knots closer than this would give a hat hardly any row
_MOST_ROWS = 1_000_000  # longer pools are thinned evenly, so that a record costs no sorting of millions of rows


@dataclass(frozen=True)
class Transform:
    """One regressor: `clip(kind(value), low, high)`, bounds in transformed units.

    Args:
        kind: "log", "log1p" or "identity"; "share" is 1, of no indicator, in the rows of a source.
        low: Lower bound after `kind`; minus infinity for none.
        high: Upper bound after `kind`; infinity for none.
        hat: For a regressor of an additive rule: (left, peak, right), the triangle that rises from 0 at left to 1 at
            peak and falls to 0 at right, taken of the clipped value; right infinite: it stays at 1.
        source: Of rows of this source alone: 0 in the others (`phi_matrix`).

    >>> Transform("log", 0.0, 2.0).apply([1.0, 2.718281828459045, 1000.0]).tolist()
    [0.0, 1.0, 2.0]
    >>> Transform("identity", 0.0, 4.0, hat=(0.0, 1.0, 3.0)).apply([-1.0, 0.5, 1.0, 2.0, 9.0]).tolist()
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    kind: str
    low: float = -math.inf
    high: float = math.inf
    hat: tuple[float, float, float] | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            cause = f"there is no transform {self.kind!r}"
            raise DataError(message("transform", cause, f"use one of {', '.join(KINDS)}"))
        if not self.low <= self.high:
            cause = f"its lower bound {self.low} is not below its upper bound {self.high}"
            raise DataError(message(f"transform {self.kind}", cause, "give bounds in order, in transformed units"))
        if self.hat is not None and not (self.hat[0] < self.hat[1] < self.hat[2] and math.isfinite(self.hat[1])):
            cause = f"its hat {self.hat} does not rise and fall"
            raise DataError(message(f"transform {self.kind}", cause, "give left < peak < right, in transformed units"))
        if self.kind == SHARE and self.source is None:
            raise DataError(message("transform share", "it names no source", "give the source whose share it is"))

    def apply(self, values: Any) -> np.ndarray:
        """φ of the values.

        Args:
            values: Raw indicator values, any shape; NaN where missing.

        Returns:
            float64 of the same shape; NaN where the value is missing or has no finite φ.
        """
        out = _raw(self.kind, values)
        out = np.clip(out, self.low, self.high)  # NaN stays NaN; log(0) is held at the lower bound
        out = np.where(np.isfinite(out), out, np.nan)
        return out if self.hat is None else _triangle(out, *self.hat)

    def base(self) -> Transform:
        """φ of the indicator itself, without the hat, in rows of every source."""
        plain = self.hat is None and self.source is None
        return self if plain else Transform(self.kind, self.low, self.high)

    def column(self, regressor: str) -> str:
        """The indicator behind the regressor; "" where it is a share."""
        if self.kind == SHARE:
            return ""
        if self.source is not None:
            return regressor.removesuffix(OF_SOURCE + self.source)
        return regressor if self.hat is None else regressor[: regressor.rindex("[")]

    def label(self, indicator: str) -> str:
        """How the regressor is written in tables, for example `log(ppl)`, or `log(ppl) ~ 2.31` for a hat at 2.31."""
        if self.kind == SHARE:
            return indicator
        column = indicator if self.source is None else self.column(indicator)
        name = column if self.kind == "identity" else f"{self.kind}({column})"
        name = name if self.source is None else f"{name}{OF_SOURCE}{self.source}"
        return name if self.hat is None else f"{name} ~ {self.hat[1]:.3g}"

    def to_json(self) -> dict[str, Any]:
        """`{"kind", "low", "high"}`, with "hat" and "source" where there is one; an absent bound is null."""
        out: dict[str, Any] = {"kind": self.kind, "low": _finite(self.low), "high": _finite(self.high)}
        if self.hat is not None:
            out["hat"] = [self.hat[0], self.hat[1], _finite(self.hat[2])]
        return out if self.source is None else {**out, "source": self.source}

    @classmethod
    def from_json(cls, value: Any, place: str = "transform") -> Transform:
        """Reads what `to_json` wrote.

        Raises:
            DataError: it is not a transform; names `place` (a file and field).
        """
        if not isinstance(value, Mapping) or value.get("kind") not in KINDS:
            cause = f"it is {value!r}, not an object with kind ({', '.join(KINDS)}), low and high"
            raise DataError(message(place, cause, "restore the file, or make it again"))
        bounds = []
        for key, absent in (("low", -math.inf), ("high", math.inf)):
            bound = value.get(key)
            if bound is not None and not _is_number(bound):
                cause = f"{key} is {bound!r}, not a number or null"
                raise DataError(message(place, cause, "restore the file, or make it again"))
            bounds.append(absent if bound is None else float(bound))
        hat, source = value.get("hat"), value.get("source")
        if source is not None and not isinstance(source, str):
            raise DataError(message(place, f"source is {source!r}, not a name", "restore the file, or make it again"))
        if hat is None:
            return cls(value["kind"], bounds[0], bounds[1], source=source)
        if not isinstance(hat, list) or len(hat) != 3 or not all(_is_number(v) for v in (*hat[:2], hat[2] or 0.0)):
            cause = f"hat is {hat!r}, not [left, peak, right or null]"
            raise DataError(message(place, cause, "restore the file, or make it again"))
        right = math.inf if hat[2] is None else float(hat[2])
        return cls(value["kind"], bounds[0], bounds[1], (float(hat[0]), float(hat[1]), right))

    def close_to(self, other: Transform) -> bool:
        """Equal up to the rounding of scores on another machine (bounds within a thousandth of the clipped range).

        A bound that moves by that much changes a mean over examples by less than 1e-5 of the range.
        """
        if (self.kind, self.hat, self.source) != (other.kind, other.hat, other.source):
            return False
        for a, b in ((self.low, other.low), (self.high, other.high)):
            if math.isinf(a) or math.isinf(b):
                if a != b:
                    return False
                continue
            width = self.high - self.low
            if abs(a - b) > 1e-3 * (width if math.isfinite(width) and width > 0 else max(abs(a), 1e-12)):
                return False
        return True


def default_kind(indicator: str) -> str:
    """That of a built-in one; of others log for perplexities, log1p for lengths, by the name, else identity."""
    if indicator in BUILT_IN:
        return BUILT_IN[indicator].kind
    return "log" if indicator.startswith("ppl") else "log1p" if indicator.startswith("length_") else "identity"


def default_transforms(table: ScoreTable, names: Iterable[str] | None = None) -> dict[str, Transform]:
    """The φ that a fit on this pool uses, clipped at the pool's 0.5 and 99.5 % example quantiles.

    Args:
        table: The scored pool; its missing values are ignored.
        names: Indicators, by default all of the table. One without a single value gets no bounds.

    Raises:
        RequestError: the table lacks an indicator.
    """
    wanted = list(table.indicators if names is None else names)
    matrix = np.asarray(table.matrix(wanted), dtype=np.float64)  # raises for absent columns
    out = {}
    for j, name in enumerate(wanted):
        kind = default_kind(name)
        values = _raw(kind, matrix[:, j])
        values = values[np.isfinite(values)]
        low, high = np.quantile(values, CLIP_QUANTILES) if len(values) else (-math.inf, math.inf)
        out[name] = Transform(kind, float(low), float(high))
    return out


def default_regressors(available: Iterable[str]) -> list[str]:
    """The paper's nine where present, in its order; another `knn_<i>` stands in for an absent `knn_6`."""
    names = set(available)
    neighbours = sorted(filter(KNN.match, names), key=lambda n: (n != "knn_6", len(n), n))
    out = []
    for name in sorted((n for n, row in BUILT_IN.items() if row.regressor), key=lambda n: BUILT_IN[n].regressor or 0):
        if name == "knn_6":
            out += neighbours[:1]
        elif name in names:
            out.append(name)
    return out


def phi_matrix(
    table: ScoreTable, transforms: Mapping[str, Transform], columns: Sequence[str] | None = None
) -> np.ndarray:
    """φ of every row: float64 [N, p], columns in the order of `transforms`; a row with any missing φ is all NaN.

    Args:
        table: The scored rows.
        transforms: regressor → φ.
        columns: [p] indicator of each regressor, where those are hat functions and no indicators; "" for a share.
    """
    of = list(transforms if columns is None else columns)
    wanted = list(dict.fromkeys(filter(None, of)))
    matrix = np.asarray(table.matrix(wanted), dtype=np.float64)
    if not transforms:
        return np.empty((len(matrix), 0))
    values = {"": np.zeros(len(matrix)), **dict(zip(wanted, matrix.T, strict=True))}
    own = {t.source: rows_of_source(table, t.source) for t in transforms.values() if t.source is not None}
    parts = []
    for column, t in zip(of, transforms.values(), strict=True):
        found = t.apply(values[column])
        parts.append(found if t.source is None else np.where(own[t.source], found, 0.0))
    phi = np.column_stack(parts)
    phi[np.isnan(phi).any(axis=1)] = np.nan
    return phi


def rows_of_source(table: ScoreTable, source: str) -> np.ndarray:
    """bool [N], the rows of a source."""
    return np.fromiter((name == source for name in table.source), dtype=np.bool_, count=len(table))


def source_codes(sources: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The different sources [K], ordered, and which of them each of N rows has, int64 [N].

    An array of the names themselves is as wide as the longest: gigabytes for millions of rows.

    >>> source_codes(["web", "books", "web"])
    (['books', 'web'], array([1, 0, 1]))
    """
    names = sorted(set(sources))
    place = {name: k for k, name in enumerate(names)}
    return names, np.fromiter((place[name] for name in sources), dtype=np.int64, count=len(sources))


def mean_phi(
    table: ScoreTable, transforms: Mapping[str, Transform], exposures: np.ndarray | None = None
) -> dict[str, float]:
    """Exposure-weighted means of φ, one per indicator: what a RunRecord keeps as `phi_means`.

    Args:
        table: The scored rows.
        transforms: The regressors wanted.
        exposures: float [N], how often the run saw each row; by default once each.

    Returns:
        indicator → mean over the seen rows that have a value; NaN where none has.
    """
    matrix = np.asarray(table.matrix(list(transforms)), dtype=np.float64)
    seen = np.ones(len(matrix)) if exposures is None else np.asarray(exposures, dtype=np.float64)
    return {name: weighted_mean(t.apply(matrix[:, j]), seen) for j, (name, t) in enumerate(transforms.items())}


def weighted_mean(values: np.ndarray, exposures: np.ndarray) -> float:
    """Mean of float64 [N] over the exposures [N]; rows without a value are left out; NaN if none is left."""
    weight = np.where(np.isnan(values), 0.0, exposures)
    total = float(weight.sum())
    return float(np.nan_to_num(values) @ weight / total) if total > 0 else math.nan


def pool_knots(table: ScoreTable, transforms: Mapping[str, Transform]) -> dict[str, list[float]]:
    """Knots on the φ scale: the two clipping bounds, and pool quantiles of φ at equal steps between them.

    Args:
        table: The scored pool.
        transforms: indicator → φ, with finite bounds.

    Returns:
        indicator → increasing knots. An indicator with less than two different ones has no basis and is left out.
    """
    step = max(1, -(-len(table) // _MOST_ROWS))
    found = {}
    for name, transform in transforms.items():
        if not (math.isfinite(transform.low) and math.isfinite(transform.high)):
            continue
        values = transform.base().apply(table.values[name][::step])
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        inner = np.quantile(values, np.arange(1, HATS) / HATS).tolist()
        knots = [transform.low]
        least = _NARROWEST * (transform.high - transform.low)
        for knot in inner:
            if knot - knots[-1] > least and transform.high - knot > least:
                knots.append(float(knot))
        if transform.high > transform.low:
            found[name] = [*knots, transform.high]
    return found


def hat_values(phi: np.ndarray, knots: list[float]) -> np.ndarray:
    """All hat functions of φ values: float64 [N, K + 1] for K + 1 knots, rows sum to 1; NaN where φ is missing."""
    columns = [np.interp(phi, knots, np.eye(len(knots))[k]) for k in range(len(knots))]
    out = np.column_stack(columns)
    out[~np.isfinite(phi)] = np.nan
    return out


def basis_means(
    table: ScoreTable,
    transforms: Mapping[str, Transform],
    knots: Mapping[str, list[float]],
    exposures: np.ndarray | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Exposure-weighted means of the hat functions: what a RunRecord keeps as `basis_means`.

    Args:
        table: The scored rows.
        transforms: indicator → φ.
        knots: indicator → knots.
        exposures: float [N], how often the run saw each row; by default once each.

    Returns:
        indicator → {"knots", "means"}; NaN means where no seen row has a value.
    """
    weight = np.ones(len(table)) if exposures is None else np.asarray(exposures, dtype=np.float64)
    seen = np.flatnonzero(weight)
    out = {}
    for name, points in knots.items():
        hats = hat_values(transforms[name].base().apply(table.values[name][seen]), list(points))
        means = [weighted_mean(column, weight[seen]) for column in hats.T]
        out[name] = {"knots": [float(k) for k in points], "means": means}
    return out


def share_transforms(sources: Iterable[str]) -> dict[str, Transform]:
    """The regressors that are shares of sources: `share of web`, …"""
    return {f"{SHARE}{OF_SOURCE}{source}": Transform(SHARE, source=source) for source in sources}


def hat_transforms(indicator: str, transform: Transform, knots: list[float]) -> dict[str, Transform]:
    """The regressors of an indicator under an additive rule: `ppl[0]` … `ppl[K-1]`, its hat functions 1 to K."""
    out = {}
    for k in range(1, len(knots)):
        right = knots[k + 1] if k + 1 < len(knots) else math.inf
        hat = (knots[k - 1], knots[k], right)
        out[f"{indicator}[{k - 1}]"] = Transform(transform.kind, transform.low, transform.high, hat)
    return out


def knots_of(transforms: list[Transform]) -> list[float]:
    """The knots behind the hat functions of one indicator, in order; [] where there are none."""
    hats = [t.hat for t in transforms if t.hat is not None]
    return [hats[0][0], *(hat[1] for hat in hats)] if hats else []


def bend_directions(knots: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """How to write a function by its values at K + 1 knots as slope and bends.

    Returns:
        (line [K + 1]: the values of φ itself; bends [K + 1, K − 1]: an orthonormal basis of what is neither constant
        nor linear).
    """
    line = np.asarray(knots, dtype=np.float64)
    plane = np.column_stack([np.ones(len(line)), (line - line.mean()) / (line.std() or 1.0)])
    full = np.linalg.qr(np.column_stack([plane, np.eye(len(line))]))[0][:, : len(line)]
    return line, full[:, 2:]


def _raw(kind: str, values: Any) -> np.ndarray:
    out = np.array(values, dtype=np.float64)
    if kind == SHARE:
        return np.ones_like(out)
    with np.errstate(invalid="ignore", divide="ignore"):
        if kind == "log":
            return np.log(out)
        if kind == "log1p":
            return np.log1p(out)
    return out


def _triangle(values: np.ndarray, left: float, peak: float, right: float) -> np.ndarray:
    rising = (values - left) / (peak - left)
    falling = np.ones_like(values) if math.isinf(right) else (right - values) / (right - peak)
    return np.clip(np.minimum(rising, falling), 0.0, 1.0)  # NaN stays NaN


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None
