"""The mixture of sources that a law predicts best, and weights of rows by it.

    minimise  log L(p) + pull · KL(p ‖ natural)    subject to  Σ p = 1,  0 ≤ p ≤ most,  p inside the fitted region

Both laws are convex in the shares and the region is an ellipsoid: one minimum, found by SciPy's SLSQP.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.files import parse_json, write_json
from im_lightning.errors import DataError, RequestError, message
from im_lightning.indicators.transforms import source_codes
from im_lightning.rule.mixture_law import MixtureLaw
from im_lightning.sampling.weights.quality_weights import RowWeights

FORMAT = "im_lightning mixture"
PULL = 0.01
"""Nats of log loss that a nat of divergence from the natural mix has to gain."""

_LEAST = 1e-12

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Mixture:
    """A mixture of sources, and how it came about.

    Args:
        shares: Source → share of the rows drawn; they sum to 1.
        natural: Source → its share of the pool.
        most: Source → largest share that its rows allow.
        budget: Rows that are to be drawn.
        repeat: How often a row may be drawn.
        predicted: Log loss of both mixes, their difference and the half-width of its 95 % interval (None if unknown);
            `corrected`: the difference without what it owes to the mixture's being chosen by the same runs.
        spread: Source → 95 % limits of its share over mixtures that were chosen on resamples of the runs.
        notes: What a person should know.
    """

    shares: dict[str, float]
    natural: dict[str, float]
    most: dict[str, float]
    budget: int
    repeat: float
    predicted: dict[str, Any]
    notes: list[str]
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, atomically."""
        write_json(path, {"format": FORMAT, **asdict(self)})


def read_mixture(path: str | os.PathLike[str]) -> dict[str, float]:
    """Source → share, of a file that `im-lightning mix` wrote, or of a plain JSON object of shares.

    Raises:
        RequestError: there is no such file. DataError: it holds something else, or shares that do not sum to 1.
    """
    return _read(path)[0]


def read_repeat(path: str | os.PathLike[str]) -> float | None:
    """How often a row of such a file's mixture may be drawn; None where it does not say: a plain object of shares.

    Raises:
        RequestError, DataError: as `read_mixture`.
    """
    return _read(path)[1]


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, float], float | None]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise RequestError(message(str(path), "there is no such mixture", "make one (im-lightning mix LEDGER)"))
    try:
        value = parse_json(file.read_bytes())
        named = isinstance(value.get("shares"), dict)
        shares = {str(name): float(share) for name, share in (value["shares"] if named else value).items()}
        if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError(f"its shares sum to {sum(shares.values()):.6g}")
        repeat = float(value["repeat"]) if named and value.get("repeat") is not None else None
        if repeat is not None and not 1 <= repeat < np.inf:
            raise ValueError(f"its repeat is {repeat:g}")
    except (ValueError, TypeError, AttributeError) as error:
        cause = f"it does not hold shares of sources ({error})"
        raise DataError(message(str(path), cause, 'write such as {"web": 0.7, "books": 0.3}')) from error
    return shares, repeat


def best_mixture(
    law: MixtureLaw, rows: Mapping[str, int], budget: int, pull: float = PULL, repeat: float = 1.0
) -> Mixture:
    """The mixture that the law predicts best.

    Args:
        law: The law.
        rows: Source → rows of the pool.
        budget: Rows that are to be drawn.
        pull: Nats of log loss per nat of KL(p ‖ natural mix), ≥ 0.
        repeat: How often a row may be drawn at most; caps a source's share at repeat · its rows / budget.

    Raises:
        RequestError: numbers out of range; a source of the pool that is in no run; no mixture is found, as under a law
            that its runs hardly determine.
    """
    total = sum(rows.values())
    for what, right, need in (
        (f"pull={pull}", 0 <= pull < np.inf, "a number from 0 on"),
        (f"repeat={repeat}", 1 <= repeat < np.inf, "a number from 1 on"),
        (f"budget={budget}", 1 <= budget <= repeat * total, f"from 1 to {int(repeat * total)} rows"),
    ):
        if not right:
            raise RequestError(message(what, "it is out of range", f"give {need}"))
    if unknown := sorted(set(rows) - set(law.sources)):
        cause = f"no run differs in its share of {', '.join(unknown)}"
        raise RequestError(message("the mixture", cause, "make designed runs of this pool, or leave these rows out"))
    natural = np.array([rows.get(name, 0) / total for name in law.sources])
    most = np.minimum(1.0, repeat * np.array([rows.get(name, 0) for name in law.sources]) / budget)
    notes = []
    radius, start = float(law.rule.radius_ or 0.0), law.distance(natural)
    if start > radius:
        notes.append(f"the natural mix lies {start:.2f} from the mean of the runs, outside their region ({radius:.2f})")
    shares = solve(law, natural, most, max(radius, start), pull)
    gap, half = law.difference(shares, natural)
    log_losses = {"mix": float(law.log_loss(shares)), "natural": float(law.log_loss(natural))}
    predicted = {
        **log_losses,
        "difference": gap,
        "half_width": half,
        "corrected": None,
        "distance": law.distance(shares),
        "radius": radius,
    }
    spread = {}
    again = _on_resamples(law, natural, most, max(radius, start), pull)
    if lost := len(law.resamples) - len(again):
        notes.append(f"no best mixture was found on {lost} of {len(law.resamples)} resamples, which are left out")
    if again:
        own = [float(one.log_loss(p) - one.log_loss(natural)) for one, p in again]
        meant = [float(law.log_loss(p) - law.log_loss(natural)) for _, p in again]
        predicted["corrected"] = gap - float(np.mean(own) - np.mean(meant))  # the optimism: Efron 1983
        limits = np.quantile([p for _, p in again], [0.025, 0.975], axis=0).T.tolist()
        spread = {name: (low, high) for name, (low, high) in zip(law.sources, limits, strict=True)}
    mixed, were, cap = (dict(zip(law.sources, map(float, v), strict=True)) for v in (shares, natural, most))
    return Mixture(mixed, were, cap, budget, repeat, predicted, notes, spread)


def _on_resamples(
    law: MixtureLaw, natural: Floats, most: Floats, radius: float, pull: float
) -> list[tuple[MixtureLaw, Floats]]:
    """The law on each resample, with the mixture that it predicts best; those without one are left out."""
    found = []
    for rule in law.resamples:
        one = replace(law, rule=rule)
        with contextlib.suppress(RequestError):
            found.append((one, solve(one, natural, most, radius, pull, law.region())))
    return found


def solve(
    law: MixtureLaw,
    natural: Floats,
    most: Floats,
    radius: float,
    pull: float,
    region: tuple[Floats, Floats] | None = None,
) -> Floats:
    """The minimum of the problem, float64 [K]; `natural` is inside it, and where the search begins. `region` is the
    law's own by default.

    Raises:
        RequestError: the search ends nowhere.
    """
    from scipy.optimize import minimize

    centre, shape = region or law.region()

    def objective(p: Floats) -> tuple[float, Floats]:
        inside = np.maximum(p, _LEAST)
        ratio = np.log(inside / np.maximum(natural, _LEAST))
        value, slope = float(law.log_loss(p)) + pull * float(p @ ratio), law.gradient(p) + pull * (ratio + 1.0)
        return value / (1 + pull), slope / (1 + pull)  # of one size, as the tolerances are

    free = np.where(natural > 0, most, 0.0)
    if free.sum() <= 1 + 1e-9:  # all rows are wanted
        return natural
    limits = [
        {"type": "eq", "fun": lambda p: p.sum() - 1.0, "jac": lambda p: np.ones(len(p))},
        {
            "type": "ineq",
            "fun": lambda p: radius**2 * (1 + 1e-9) - (p - centre) @ shape @ (p - centre),
            "jac": lambda p: -2.0 * shape @ (p - centre),
        },
    ]

    def feasible(p: Floats) -> bool:
        away = p - centre
        inside = away @ shape @ away <= radius**2 * (1 + 1e-6) + 1e-12
        return bool(inside and abs(p.sum() - 1) < 1e-9 and (p <= free + 1e-6).all())

    bounds = list(zip(np.zeros(len(free)), free, strict=True))
    begin, ended = natural, ""
    for tolerance in (1e-13, 1e-10, 1e-8):  # at the strictest a search that has arrived may end on rounding
        options = {"maxiter": 1000, "ftol": tolerance}
        found = minimize(objective, begin, jac=True, bounds=bounds, constraints=limits, method="SLSQP", options=options)
        p = np.clip(found.x, 0.0, free)
        p, ended = p / max(float(p.sum()), _LEAST), str(found.message)
        if found.success and feasible(p):
            return p
        if feasible(p) and objective(p)[0] < objective(begin)[0]:
            begin = p
    remedy = "name another --method, raise --pull, or make more designed runs"
    raise RequestError(message("the mixture", f"no best one was found ({ended})", remedy))


def check_mixture(mixture: Mapping[str, float], sources: Sequence[str]) -> None:
    """Refuses a mixture of sources that are not there.

    Raises:
        RequestError: names them.
    """
    if absent := sorted(name for name, share in mixture.items() if share > 1e-9 and name not in set(sources)):
        cause = f"the pool has no row of {', '.join(absent)}"
        raise RequestError(message("the mixture", cause, "make the mixture for this pool (im-lightning mix)"))


def mixed(made: RowWeights, sources: Sequence[str], mixture: Mapping[str, float]) -> RowWeights:
    """Weights whose sources have the shares of a mixture, and whose rows within a source the ratios of other weights.

    Args:
        made: Weights of N rows: uniform, or a rule's.
        sources: N names.
        mixture: Source → share; sources not named have none. One without a row of weight leaves its share to others.

    Raises:
        RequestError: no row of weight is of a source with a share.
    """
    names, code = source_codes(sources)
    held = np.bincount(code, made.weights, minlength=len(names))
    share = np.array([mixture.get(name, 0.0) for name in names])
    factor = np.divide(share, held, out=np.zeros_like(share), where=held > 0)
    weights = made.weights * factor[code]
    if not weights.any():
        cause = "no row that can be drawn is of a source with a share"
        raise RequestError(
            message("the mixture", cause, "lower the budget, or make the mixture for this pool and budget")
        )
    weights = weights / weights.sum()
    report = {**made.report, "mixture": dict(mixture), "ess": float(1.0 / (weights @ weights))}
    return replace(made, weights=weights, report={**report, "max_weight": float(weights.max())})
