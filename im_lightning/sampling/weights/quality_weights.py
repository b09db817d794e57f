"""`quality_weights`: from a rule to one weight per row.

A rule fitted on dataset means speaks about dataset means. Ranking rows by it and cutting leaves the range it was
fitted on, so the default chooses weights whose *mean* lies inside the fitted region and is predicted best there.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from im_lightning._utils.force import Force
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.sampling.draws.systematic import Floats, Rows, checked_groups, group_sums, inclusion_probabilities
from im_lightning.sampling.weights.tilting import TiltProblem

METHODS = ("auto", "tilt", "softmax", "rank", "top", "uniform", "mix")


@dataclass(frozen=True)
class Weighting:
    """How a rule turns into weights; `quality_weights` explains each."""

    weighting: str = "auto"
    """auto, tilt, softmax, rank, top, uniform, or in a fit mix (by a mixture of sources)."""
    strength: float = 1.0
    """How far a tilt goes towards the edge of the rule's fitted region; 1 is the edge."""
    temperature: float = 1.0
    """Of softmax and rank weights."""
    floor: float = 0.0
    """Share of uniform weights mixed in, from 0 to 1."""

    def __post_init__(self) -> None:
        _check_numbers(self)


@dataclass(frozen=True)
class RowWeights:
    """Weights of a pool.

    Args:
        weights: float64 [N], sum 1; 0 for ineligible rows.
        eligible: bool [N], rows that may be drawn.
        report: What was asked for and what was reached, JSON-like: `method` (the one used, "auto" resolved),
            `strength`, `ess` (Kish, rows), `max_weight`, `eligible` and `ineligible` rows, `pool_mean`, `target` and
            `expected_mean` (per indicator, of φ), `predicted` (log loss at the pool's and the expected mean;
            `calibrated`: at the latter, the difference times the rule's held-out calibration slope),
            `mahalanobis`, `radius`, `notes`, ….
    """

    weights: Floats
    eligible: NDArray[np.bool_]
    report: dict[str, Any]

    @property
    def method(self) -> str:
        """The method used."""
        return str(self.report["method"])


def quality_weights(
    table: ScoreTable,
    rule: LinearRule | None,
    method: str = "auto",
    strength: float = 1.0,
    temperature: float = 1.0,
    floor: float = 0.0,
    budget: int | None = None,
    eligible: ArrayLike | None = None,
    force: Force = False,
) -> RowWeights:
    """Weights over the pool; rows with a lower predicted loss weigh more.

    Args:
        table: Scores of the pool, N rows.
        rule: The rule; may be None for "uniform".
        method: "tilt": the weights closest to uniform whose mean regressors are μ(s) = φ̄ + s·(μ₁ − φ̄), φ̄ the pool's
            mean, μ₁ the edge of the rule's region in the direction of lower loss, s = `strength`. s is lowered, by
            bisection towards 0, until such weights exist and no row would be drawn with probability above 1.
            "softmax": ∝ exp(−prediction / (temperature · spread)), spread = 1.4826·MAD of the predictions, else their
            sd, else uniform. "rank": ∝ (share of rows predicted no better)^(1/temperature), ties at their mean rank.
            "top": the `budget` rows predicted best, equally; ties at the cut share what is left. "uniform".
            "auto": tilt, or softmax at temperature 1 for a rule without a fitted region.
        strength: How far towards the edge of the region, ≥ 0; above 1 leaves it.
        temperature: > 0, for softmax and rank.
        floor: Share of uniform weights mixed in, from 0 to 1.
        budget: Rows to be drawn without replacement per epoch; None if that is not known.
        eligible: bool [N], rows that may be drawn. Rows without a prediction never are.
        force: Risks to accept, as `LinearRule.check` takes them; those that were are in the report, as `forced`.

    Raises:
        RequestError: an argument out of range, no eligible row, a budget above the eligible rows, "tilt" for a rule
            without a region, "top" without a budget, a rule that `LinearRule.check` refuses for the table.

    >>> from im_lightning import ScoreTable
    >>> table = ScoreTable([0, 1], ["a", "b"], ["", ""], {"mtld": [40.0, 50.0]})
    >>> quality_weights(table, None, "uniform").weights.tolist()
    [0.5, 0.5]
    """
    how = Weighting(method, strength, temperature, floor)
    if rule is None:
        return weights_of(np.empty((len(table), 0)), None, how, budget, eligible)
    rule.check(table, force)
    made = weights_of(rule.phi(table), rule, how, budget, eligible)
    if forced := rule.forced(table):
        made.report["forced"] = forced
    return made


def weights_of(
    phi: Floats, rule: LinearRule | None, how: Weighting, budget: int | None = None, eligible: ArrayLike | None = None
) -> RowWeights:
    """`quality_weights` of rows whose φ is known: float64 [N, p], NaN for a row without a prediction."""
    method, temperature, total = how.weighting, how.temperature, len(phi)
    allowed = _eligible(eligible, total)
    if method == "mix":
        remedy = "give one with a fit (mixture=), or choose by method mix or mix+rule"
        raise RequestError(message("weighting mix", "it needs a mixture of sources, and there is none here", remedy))
    if rule is None and method != "uniform":
        remedy = "pass rule= (a name or file), or weighting uniform"
        raise RequestError(message(f"weighting {method}", "it needs a rule and none was given", remedy))
    drawable = allowed & np.isfinite(phi).all(axis=1)
    rows = int(drawable.sum())
    if not rows or (budget is not None and not 1 <= budget <= rows):
        what = "pool" if budget is None else f"budget={budget}"
        cause = f"{rows} of {total} rows can be drawn ({int(allowed.sum())} eligible, the rest lack a prediction)"
        raise RequestError(message(what, cause, "lower the budget, add data, or score what is missing"))

    phi = phi[drawable]
    notes: list[str] = []
    report: dict[str, Any] = {"requested": method, "strength_requested": float(how.strength)}
    report["floor"] = float(how.floor)
    if method == "auto":
        method = "tilt" if rule is not None and rule.has_region else "softmax"
        if method == "softmax" and rule is not None:
            temperature = 1.0
            _say(notes, f"rule {rule.name} has no fitted region: weighting by softmax at temperature 1 instead of tilt")
    if method == "uniform" or rule is None:
        w = np.full(rows, 1.0 / rows)
    elif method == "tilt":
        w = _tilt(phi, rule, how, budget, report, notes)
    else:
        predicted = rule.log_loss(phi)
        if method == "top":
            w = _top(predicted, budget)
        elif method == "rank":
            w = _rank(predicted, temperature)
        else:
            w = _softmax(predicted, temperature, report, notes)
        report["temperature"] = float(temperature)
    w = _with_floor(w, how.floor)
    if rule is not None and np.ptp(w) > 0 and not _gains(phi, w, rule):
        _say(
            notes, f"rule {rule.name} predicts no lower loss for weights by {method} than for the pool: uniform weights"
        )
        w, method = np.full(rows, 1.0 / rows), "uniform"
        report = {name: value for name, value in report.items() if name not in ("strength", "theta", "target", "move")}

    weights = np.zeros(total)
    weights[drawable] = w
    report |= {
        "method": method,
        "rows": total,
        "eligible": rows,
        "ineligible": {"excluded": int((~allowed).sum()), "no_prediction": int(allowed.sum()) - rows},
        "budget": budget,
        "ess": float(1.0 / (w @ w)),
        "max_weight": float(w.max()),
    }
    if rule is not None:
        report |= _means(phi, w, rule, budget, notes)
    report["notes"] = notes
    return RowWeights(weights, drawable, report)


def of_draw(
    made: RowWeights, phi: Floats, rule: LinearRule, budget: int | None, groups: ArrayLike | None = None
) -> RowWeights:
    """The same weights, with the means of a draw by them as they are now in their report: a mixture may have changed
    them, or one row at most be drawn of each of `groups` (N labels, of prompts; without a budget one row of each).
    `phi` float64 [N, p] is that of the rows under the rule.
    """
    at = made.eligible
    named = None if groups is None else checked_groups(np.asarray(groups)[at], int(at.sum()))
    means = _means(phi[at], made.weights[at], rule, budget, [], named)
    return replace(made, report={**made.report, **means})


def effective_sample_size(weights: ArrayLike) -> float:
    """Kish's effective sample size of weights [N], in rows: (Σ w)² / Σ w²; NaN where all are zero.

    >>> effective_sample_size([1.0, 1.0, 0.0])
    2.0
    """
    w = np.asarray(weights, dtype=np.float64)
    squares = float(w @ w)
    return float(w.sum() ** 2 / squares) if squares else float("nan")


def _tilt(
    phi: Floats, rule: LinearRule, how: Weighting, budget: int | None, report: dict[str, Any], notes: list[str]
) -> Floats:
    """Tilted weights at the largest strength up to the one asked for that can be drawn."""
    if not rule.has_region:
        cause = "it has no fitted region to stay inside"
        remedy = "use softmax, or fit a rule on runs of your own (im-lightning refit)"
        raise RequestError(message(f"rule {rule.name}, weighting tilt", cause, remedy))
    problem, edge, strength = TiltProblem(phi), rule.edge(), float(how.strength)
    tilt, reached, reason = problem.towards(edge, strength, budget, how.floor)
    if reached < strength:
        _say(notes, f"strength {strength:g} was lowered to {reached:.3g} (0 is uniform): beyond it {reason}")
    if tilt is not None and tilt.unreachable > 1e-6:
        notes.append(f"{tilt.unreachable:.2g} sd of the target lie along directions in which this pool does not vary")
    distance, radius = float(rule.mahalanobis(problem.mean)), float(rule.radius_ or 0.0)
    if distance > radius:
        _say(
            notes,
            f"the pool's mean indicators lie {distance:.2f} from the mean of the runs behind rule {rule.name}, outside "
            f"its region (radius {radius:.2f}): the rule extrapolates on this pool",
        )
    target = problem.mean + reached * (edge - problem.mean)
    theta = np.zeros(phi.shape[1]) if tilt is None else tilt.theta
    if rule.old_region:
        notes.append(f"rule {rule.name} has an old region: refit (im-lightning refit LEDGER --out rule.json)")
    elif rule.lowest_ is not None and float(rule.log_loss(target)) < rule.lowest_ - 1e-12:
        gap = rule.lowest_ - float(rule.log_loss(target))
        notes.append(f"the target is beyond every run: predicted {gap:.3g} below the best of them (log loss)")
    report |= {"strength": reached, "theta": _named(rule, theta), "target": _named(rule, target)}
    report["move"] = _parts(rule, problem.mean, problem.mean + reached * (rule.mean_ - problem.mean), target)
    return np.full(len(phi), 1.0 / len(phi)) if tilt is None else tilt.weights


def _gains(phi: Floats, w: Floats, rule: LinearRule) -> bool:
    """Whether the rule predicts a lower loss for the weighted mean than for the pool's; rounding is no gain."""
    pool, weighted = rule.predict_mean(phi.mean(axis=0))[0], rule.predict_mean(w @ phi)[0]
    return weighted < pool - 1e-12 * (1.0 + abs(pool))


def _parts(rule: LinearRule, pool: Floats, centre: Floats, target: Floats) -> dict[str, dict[str, float]]:
    """A tilt in two parts: from the pool towards the centre of the runs, and from there towards lower loss. `distance`
    is in sd of the run means (Mahalanobis), `predicted` the change in log loss."""
    mean = np.asarray(rule.mean_)
    return {
        name: {
            "distance": float(rule.mahalanobis(mean + end - start)),
            "predicted": float(rule.log_loss(end) - rule.log_loss(start)),
        }
        for name, start, end in (("to_centre", pool, centre), ("to_lower_loss", centre, target))
    }


def move_text(report: dict[str, Any]) -> str:
    """What of a tilt only brings the pool's mean to the runs', and what is the rule's choice; "" for other weights."""
    if "move" not in report:
        return ""
    parts = report["move"]
    centre, lower = parts["to_centre"], parts["to_lower_loss"]
    return (
        f"the weights change the predicted log loss in two steps: by {centre['predicted'] + 0.0:+.4f} since the rows "
        f"drawn are more like the average run (nearer by {centre['distance']:.2f} standard deviations of the runs), "
        f"and by {lower['predicted'] + 0.0:+.4f} since from there they go {lower['distance']:.2f} standard deviations "
        "to where the rule expects less loss. Only the second step is the rule's choice"
    )


def _softmax(predicted: Floats, temperature: float, report: dict[str, Any], notes: list[str]) -> Floats:
    spread = 1.4826 * float(np.median(np.abs(predicted - np.median(predicted))))
    spread = spread if spread > 0 else float(predicted.std())
    report["spread"] = spread
    if not spread > 0:
        notes.append("all predictions are equal: uniform weights")
        return np.full(len(predicted), 1.0 / len(predicted))
    w = np.exp((predicted.min() - predicted) / (temperature * spread))
    return w / w.sum()


def _rank(predicted: Floats, temperature: float) -> Floats:
    from scipy.stats import rankdata

    w = (rankdata(-predicted, method="average") / len(predicted)) ** (1.0 / temperature)
    return w / w.sum()


def _top(predicted: Floats, budget: int | None) -> Floats:
    if budget is None:
        raise RequestError(message("weighting top", "how many rows are the top is not known", "pass budget="))
    cut = np.partition(predicted, budget - 1)[budget - 1]
    better, tied = predicted < cut, predicted == cut
    w = better.astype(np.float64)
    w[tied] = (budget - better.sum()) / tied.sum()
    return w / budget


def _with_floor(w: Floats, floor: float) -> Floats:
    return (1.0 - floor) * w + floor / len(w) if floor else w


def _means(
    phi: Floats, w: Floats, rule: LinearRule, budget: int | None, notes: list[str], groups: Rows | None = None
) -> dict[str, Any]:
    """The mean regressors that a draw will have, and what the rule predicts for them."""
    if groups is not None:
        there = int(np.count_nonzero(group_sums(w, groups)))
        chances = inclusion_probabilities(w, min(budget or there, there), groups)
        w = chances / chances.sum()
    elif budget is not None:
        chances = inclusion_probabilities(w, budget) if budget <= np.count_nonzero(w) else (w > 0).astype(np.float64)
        certain = int((chances >= 1.0).sum())
        if certain and certain < len(w) and budget * float(w.max()) > 1 + 1e-9:
            notes.append(f"{certain} rows weigh so much that every draw of {budget} holds them")
        w = chances / chances.sum()
    pool, expected = phi.mean(axis=0), w @ phi
    out: dict[str, Any] = {
        "pool_mean": _named(rule, pool),
        "expected_mean": _named(rule, expected),
        "predicted": {"pool": rule.predict_mean(pool)[0], "expected": rule.predict_mean(expected)[0]},
    }
    if (slope := rule.metrics_.calibration) is not None:
        at = out["predicted"]
        at["calibrated"] = at["pool"] + slope * (at["expected"] - at["pool"])
    if rule.has_region:
        out["mahalanobis"] = {"pool": float(rule.mahalanobis(pool)), "expected": float(rule.mahalanobis(expected))}
        out["radius"] = float(rule.radius_ or 0)
    return out


def _named(rule: LinearRule, values: Floats) -> dict[str, float]:
    return dict(zip(rule.feature_names_in_, map(float, values), strict=True))


def _say(notes: list[str], text: str) -> None:
    notes.append(text)
    warnings.warn(text, stacklevel=5)


def _eligible(eligible: ArrayLike | None, rows: int) -> NDArray[np.bool_]:
    if eligible is None:
        return np.ones(rows, dtype=bool)
    mask = np.asarray(eligible)
    if mask.shape != (rows,) or mask.dtype != bool:
        cause = f"it is {mask.dtype} of shape {mask.shape} for {rows} rows"
        raise RequestError(message("eligible", cause, "pass one bool per row of the table"))
    return mask


def _check_numbers(how: Weighting) -> None:
    strengths = "a number from 0 (uniform) on; 1 is the edge of the region"
    for what, right, need in (
        (f"weighting {how.weighting!r}", how.weighting in METHODS, f"one of {', '.join(METHODS)}"),
        (f"strength={how.strength}", 0 <= how.strength < np.inf, strengths),
        (f"temperature={how.temperature}", 0 < how.temperature < np.inf, "a positive number"),
        (f"floor={how.floor}", 0 <= how.floor <= 1, "a share from 0 to 1"),
    ):
        if not right:
            raise RequestError(message(what, "it is out of range", f"pass {need}"))
