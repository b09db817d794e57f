"""Draws of a fixed number of rows from weights: systematic probability-proportional-to-size, and i.i.d.

Without replacement row i is drawn with probability exactly min(1, c·w_i), where c makes these sum to the number of
draws (Madow 1949, over a randomly permuted order). Rows that reach 1 are certain; the others lie side by side on a
line, each as long as its probability, and the points u, u + 1, u + 2, … (one uniform u) pick the rows they fall on.
Intervals are half open, so a zero weight is never drawn. Everything that decides a draw is summed in sequence, so that
the result does not depend on the processor. Time O(N) per draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning.errors import RequestError, message

_CHUNK = 1 << 20  # rows gathered or drawn at once: keeps temporaries small; part of what an i.i.d. draw depends on

_ROUNDING = 1e-9  # an expected count so near to a whole number is one

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


def checked_weights(weights: Sequence[float] | NDArray[Any] | Any) -> Floats:
    """A read-only float64 copy [N] of `weights` (a sequence, array or tensor).

    Raises:
        RequestError: not one-dimensional, empty, or a weight is negative, NaN or infinite (names the first such row).
    """
    if hasattr(weights, "detach"):  # a tensor, on whatever device, with or without gradient
        weights = weights.detach().cpu().numpy()
    w = np.array(weights, dtype="<f8", order="C")
    if w.ndim != 1 or not len(w):
        raise RequestError(message("weights", f"they have shape {w.shape}", "pass one number per row, at least one"))
    if not (w.min() >= 0 and w.max() < np.inf):  # NaN fails either comparison
        row = int(np.flatnonzero(~((w >= 0) & (w < np.inf)))[0])
        cause = f"row {row} has weight {w[row]}"
        raise RequestError(message("weights", cause, "pass finite, non-negative weights; 0 leaves a row out"))
    w.flags.writeable = False
    return w


@dataclass(frozen=True)
class Plan:
    """Which rows are certain, for `draws` rows without replacement: the `certain` ones with a weight of at least
    `threshold`."""

    draws: int
    certain: int
    threshold: float


def checked_groups(groups: Sequence[Any] | NDArray[Any], rows: int) -> Rows:
    """Groups numbered from 0, int64 [N], from one label per row (numbers or texts).

    Raises:
        RequestError: another number of labels than rows.
    """
    if len(groups) != rows:
        cause = f"there are {len(groups)} for {rows} rows"
        raise RequestError(message("groups", cause, "pass one label per row, in the order of the weights"))
    return np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)


def group_sums(weights: Floats, groups: Rows | None) -> Floats:
    """The weight of each group, float64 [G]; without groups the weights themselves."""
    return weights if groups is None else np.bincount(groups, weights).astype(np.float64)  # summed in sequence


def plan_draw(weights: Floats, draws: int, groups: Rows | None = None) -> Plan:
    """Solves Σ min(1, c·w_i) = draws for the set of certain rows (sorted water-filling; O(N) where no row is certain);
    with `groups` (int64 [N]) the same for them.

    Raises:
        RequestError: `draws` is not a positive integer, or there are fewer rows (groups) with a positive weight.
    """
    if groups is not None:
        weights = group_sums(weights, groups)
        if isinstance(draws, (int, np.integer)) and draws > (there := int(np.count_nonzero(weights))):
            cause = f"the rows with a positive weight are of {there} groups (prompts), and each gives one row"
            remedy = f"draw at most {there} rows, or leave out one_per_prompt (groups=)"
            raise RequestError(message(f"num_samples={draws}", cause, remedy))
    if isinstance(draws, bool) or not isinstance(draws, (int, np.integer)) or draws < 1:
        raise RequestError(message(f"num_samples={draws!r}", "it is not a positive integer", "draw at least one row"))
    draws, positive = int(draws), int(np.count_nonzero(weights))
    if draws > positive:
        cause = f"only {positive} of {len(weights)} rows have a positive weight, and none is drawn twice"
        remedy = f"draw at most {positive} rows, give more rows a weight (floor=…), or pass replacement=True"
        raise RequestError(message(f"num_samples={draws}", cause, remedy))
    top = float(weights.max())
    if draws == positive:
        return Plan(draws, positive, float(np.min(weights, where=weights > 0, initial=top)))
    if draws <= _sum_over(weights, top):
        return Plan(draws, 0, np.inf)
    rising = weights[weights > 0]
    rising.sort()
    below = rising / top
    np.cumsum(below, out=below)  # below[j]: sum of the j + 1 smallest weights, in units of the largest

    def enough(k: int) -> bool:  # with the k largest certain, does the next one stay at or under probability 1?
        j = positive - k - 1
        return bool(rising[j] / top * (draws - k) <= below[j])

    low, high = 0, draws  # enough(low) is false, enough(high) is true
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    threshold = float(rising[positive - high])
    certain = int(positive - np.searchsorted(rising, threshold, side="left"))  # equal weights share one fate
    if certain > draws:  # only rounding brings this about: then those ties are uncertain by an ulp
        certain = int(positive - np.searchsorted(rising, threshold, side="right"))
        threshold = float(np.nextafter(threshold, np.inf))
    return Plan(draws, certain, threshold)


def inclusion_probabilities(weights: Floats, draws: int, groups: Rows | None = None) -> Floats:
    """min(1, c·w_i) per row [N], summing to `draws`: the probability that a draw without replacement holds the row.

    With `groups` (int64 [N]) at most one row of each is drawn, and it is min(1, c·W)·w_i / W, W the group's weight.
    """
    if groups is not None:
        total = group_sums(weights, groups)
        share = inclusion_probabilities(total, draws) / np.where(total > 0, total, 1.0)
        return np.minimum(weights * share[groups], 1.0)
    plan = plan_draw(weights, draws)
    certain = (weights >= plan.threshold) & (weights > 0)
    rest = np.where(certain, 0.0, weights)
    top = float(rest.max())
    if plan.certain < draws and top > 0:
        rest = rest / top
        rest *= (draws - plan.certain) / _sum_over(rest, 1.0)
    return np.where(certain, 1.0, np.minimum(rest, 1.0))


def systematic_sample(
    weights: Floats, n: int, rng: np.random.Generator, plan: Plan | None = None, groups: Rows | None = None
) -> Rows:
    """Draws `n` different rows, row i with probability `inclusion_probabilities(weights, n, groups)`, in random order.

    The order is shuffled once more at the end: a systematic draw alone would visit heavy rows less often at the two
    ends of the epoch than in its middle.

    Args:
        weights: float64 [N], finite and non-negative (`checked_weights`).
        n: Number of rows to draw.
        rng: Decides the draw.
        plan: `plan_draw(weights, n, groups)` if it is already known.
        groups: int64 [N], of which at most one row each is drawn; by default each row is one.

    Returns:
        int64 [n], each row at most once.

    Raises:
        RequestError: fewer than `n` rows have a positive weight.
    """
    plan = plan or plan_draw(weights, n, groups)
    if groups is not None:
        return _one_of_each(weights, systematic_sample(group_sums(weights, groups), n, rng, plan), groups, rng)
    rows = _uncertain_rows(weights, plan, rng) if plan.certain < n else np.empty(0, dtype=np.int64)
    if plan.certain:
        rows = np.concatenate([np.flatnonzero((weights >= plan.threshold) & (weights > 0)), rows])
    rng.shuffle(rows)
    return rows


def _one_of_each(weights: Floats, drawn: Rows, groups: Rows, rng: np.random.Generator) -> Rows:
    """One row of each drawn group, in their order, by weight: the first of exponential clocks that run at the weights'
    rates is row i with probability w_i / W."""
    place = np.full(int(groups.max()) + 1, -1, dtype=np.int64)
    place[drawn] = np.arange(len(drawn))
    rows = np.flatnonzero((weights > 0) & (place[groups] >= 0))
    clocks = rng.standard_exponential(len(rows)) * (weights.max() / weights[rows])
    order = np.lexsort((clocks, place[groups[rows]]))
    at = place[groups[rows[order]]]
    return rows[order[np.append(True, at[1:] != at[:-1])]]


def expected_counts(weights: Floats, draws: int, most: float) -> Floats:
    """min(most, c·w_i) per row [N], summing to `draws`: how often a draw of so many rows holds each on average, where
    none may come more than `most` times.

    Raises:
        RequestError: so many rows cannot be drawn.
    """
    positive = np.flatnonzero(weights > 0)
    if not 1 <= draws <= most * len(positive):
        cause = f"{len(positive)} rows have a positive weight, and each may come {most:g} times"
        remedy = (
            f"draw from 1 to {int(most * len(positive))} rows, or allow more repetition (im-lightning mix --repeat)"
        )
        raise RequestError(message(f"num_samples={draws}", cause, remedy))
    order = positive[np.argsort(-weights[positive], kind="stable")]
    falling = weights[order] / weights[order[0]]
    left = np.cumsum(falling[::-1])[::-1]  # left[k]: sum of all but the k heaviest
    factor = (draws - most * np.arange(len(order))) / left
    full = int(np.argmax(factor * falling <= most * (1 + 1e-12)))  # rows that come as often as they may
    counts = np.zeros(len(weights))
    counts[order] = np.minimum(most, factor[full] * falling)
    counts[order[:full]] = most
    return counts


def repeated_sample(weights: Floats, n: int, most: float, rng: np.random.Generator) -> Rows:
    """Draws `n` rows, row i `expected_counts` times: as often as the whole part says, and once more with the rest as
    probability. So no row comes more than `most` times (of 1.5: more than twice).

    Returns:
        int64 [n], in random order.

    Raises:
        RequestError: as `expected_counts`.
    """
    counts = expected_counts(weights, n, most)
    whole = np.rint(counts)
    whole = np.where(np.abs(whole - counts) < _ROUNDING, whole, np.floor(counts))
    rows = np.repeat(np.arange(len(counts)), whole.astype(np.int64))
    if len(rows) < n:
        rest = checked_weights(np.maximum(counts - whole, 0.0))
        rows = np.concatenate([rows, systematic_sample(rest, n - len(rows), rng)])
    rng.shuffle(rows)
    return rows


def _uncertain_rows(weights: Floats, plan: Plan, rng: np.random.Generator) -> Rows:
    """Systematic draw among the rows under the threshold, in permuted order."""
    n, rows = plan.draws - plan.certain, len(weights)
    order = np.arange(rows, dtype=np.int32 if rows < 2**31 else np.int64)  # 4 bytes per row rather than 8
    rng.shuffle(order)
    line = np.empty(rows)
    for start in range(0, rows, _CHUNK):  # in pieces: indexing by int32 makes an int64 copy of the index
        piece = slice(start, start + _CHUNK)
        line[piece] = weights[order[piece]]
    if plan.certain:
        line[line >= plan.threshold] = 0.0
    line /= line.max()
    np.cumsum(line, out=line)
    end = float(line[-1])
    last = int(np.searchsorted(line, end, side="left"))  # the last row with a length; zero weights may follow it
    u = rng.random()
    # From positions to "how many of the points u, u + 1, … lie before the end of this row's interval".
    line *= n / end
    line -= u
    np.ceil(line, out=line)
    np.minimum(line, n, out=line)
    line[last:] = n  # whatever rounding did on the way, the line ends at n
    hit = np.empty(rows, dtype=bool)
    hit[0] = line[0] > 0
    np.greater(line[1:], line[:-1], out=hit[1:])
    del line
    chosen = order[hit].astype(np.int64)
    if len(chosen) < n:  # an interval longer than 1 by an ulp caught two points: the next free rows make up for it
        np.logical_not(hit, out=hit)
        free = order[hit]
        free = free[(weights[free] > 0) & (weights[free] < plan.threshold)]
        chosen = np.concatenate([chosen, free[: n - len(chosen)].astype(np.int64)])
    return chosen


def multinomial_sample(weights: Floats, n: int, rng: np.random.Generator) -> Rows:
    """Draws `n` rows independently, row i with probability w_i / Σw each time; rows may repeat.

    Returns:
        int64 [n].

    Raises:
        RequestError: no row has a positive weight, or `n` is not positive.
    """
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise RequestError(message(f"num_samples={n!r}", "it is not a positive integer", "draw at least one row"))
    top = float(weights.max())
    if top <= 0:
        raise RequestError(message("weights", "no row has a positive weight", "give at least one row a weight"))
    line = weights / top
    np.cumsum(line, out=line)
    end = float(line[-1])
    last = int(np.searchsorted(line, end, side="left"))
    rows = np.empty(n, dtype=np.int64)
    for start in range(0, n, _CHUNK):
        points = rng.random(min(_CHUNK, n - start))
        points *= end
        points.sort()  # neighbouring look-ups are many times faster; the shuffle restores independence
        piece = np.minimum(np.searchsorted(line, points, side="right"), last)
        rng.shuffle(piece)
        rows[start : start + len(piece)] = piece
    return rows


def _sum_over(weights: Floats, unit: float) -> float:
    """Σ w / unit, in sequence: the same on every processor, which numpy's pairwise sum is not."""
    total = 0.0
    for start in range(0, len(weights), _CHUNK):
        total += float(np.cumsum(weights[start : start + _CHUNK] / unit)[-1])
    return total
