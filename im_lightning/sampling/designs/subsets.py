"""Designed subsets: finetune runs whose mean indicators differ enough, and differently enough, to fit a rule on.

Plain random subsets all have nearly the pool's means; mixtures of sources move them in few directions only. So a
design mixes sources by Dirichlet shares and, within each source, tilts rows along one random direction of indicator
space: row i of a source is drawn with probability ∝ exp(tilt · u_i), u_i its whitened coordinate along the direction,
in pool sd. In a Gaussian pool that moves the mean by `tilt` sd along the direction.

Measured on designs of 48 runs of 300 rows, nine correlated heavy-tailed indicators, five sources (tests/sampling
repeats a small form of it): a tilt of 1 gives standard errors of the coefficients 6 times smaller than plain random
subsets, and a condition number nearly 4 times smaller than mixtures alone. A direction for each source instead of one
per run cancels out (errors 1.4 times larger); without whitening the collinearity of the indicators enters squared
(condition number 2.3 times larger); a tilt of 1.5 gains a quarter more but leaves an effective 12 % of a source's rows
where 1 leaves 38 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from im_lightning._utils.rng import DESIGN_DIRECTION, DESIGN_DRAW, DESIGN_SHARES, generator
from im_lightning.errors import RequestError, message
from im_lightning.indicators.transforms import source_codes
from im_lightning.sampling.draws.systematic import Floats, Rows, checked_weights, systematic_sample
from im_lightning.sampling.weights.tilting import TiltProblem

DEFAULT_TILT = 1.0
DROP_PROBABILITY = 0.25
VERSION = 2
"""How the random shares of new designs are drawn. 1 leaves one source out of a quarter of the runs; 2 draws half of the
runs from some of the sources alone, one or several, so that a rule can be tested on sources it has not seen."""


@dataclass(frozen=True)
class DesignedSubset:
    """A designed subset."""

    rows: Rows  # int64 [subset_size], different rows of the pool in random order
    # how it came about, JSON-like: `seed`, `size`, `mixture` (as given), `tilt`, `source_shares` (realised),
    # `shares_wanted`, `dropped` (the sources left out, or None), `version`, `deficit` (source → rows it was short of),
    # `direction` [p] in whitened space, `mean_shift` [p] from the pool's mean in pool sd, `eligible` rows
    design: dict[str, Any]


def designed_subset(
    phi: ArrayLike,
    sources: Sequence[str],
    subset_size: int,
    subset_seed: int,
    subset_mixture: Mapping[str, float] | None = None,
    subset_tilt: float = DEFAULT_TILT,
    eligible: ArrayLike | None = None,
    version: int = 1,
) -> DesignedSubset:
    """Draws a designed subset; for a given pool, size, mixture and tilt `subset_seed` alone determines it.

    Args:
        phi: Regressors float64 [N, p]; rows with a missing value are left out.
        sources: N names.
        subset_size: Rows to draw, without replacement.
        subset_seed: Decides shares, direction and rows. Shares and direction depend on nothing else but the number of
            sources and of indicators.
        subset_mixture: source → share, in place of random shares; scaled to sum 1, sources not named get none.
        subset_tilt: Strength of the tilt in pool sd, ≥ 0; 0 draws uniformly within sources.
        eligible: bool [N], rows that may be drawn.
        version: Of the draw of random shares: 1 or 2, see `VERSION`; the same seed gives other shares under each.

    Raises:
        RequestError: fewer eligible rows than `subset_size`; a mixture of unknown sources or without a positive share;
            an argument out of range.
    """
    return DesignPool(phi, sources, eligible).draw(subset_size, subset_seed, subset_mixture, subset_tilt, version)


class DesignPool:
    """A pool prepared for drawing many designed subsets of it.

    Args: `phi`, `sources` and `eligible` of `designed_subset`.

    Raises:
        RequestError: regressors and sources do not fit together.
    """

    def __init__(self, phi: ArrayLike, sources: Sequence[str], eligible: ArrayLike | None = None) -> None:
        self.phi = np.asarray(phi, dtype=np.float64)
        if self.phi.ndim != 2 or len(sources) != len(self.phi):
            cause = f"regressors of shape {self.phi.shape} and {len(sources)} sources"
            remedy = "pass one row of regressors and one source per example"
            raise RequestError(message("designed subset", cause, remedy))
        usable = np.isfinite(self.phi).all(axis=1)
        if eligible is not None:
            usable &= np.asarray(eligible, dtype=bool)
        self.rows = np.flatnonzero(usable)
        names, self._member = source_codes([sources[at] for at in self.rows.tolist()])
        self.names = np.array(names, dtype=str)
        self._available = np.bincount(self._member, minlength=len(self.names))
        self._inside = [np.flatnonzero(self._member == index) for index in range(len(self.names))]

    @cached_property
    def problem(self) -> TiltProblem:
        """The whitened regressors of the rows that may be drawn."""
        return TiltProblem(self.phi[self.rows])

    def draw(
        self,
        subset_size: int,
        subset_seed: int,
        subset_mixture: Mapping[str, float] | None = None,
        subset_tilt: float = DEFAULT_TILT,
        version: int = 1,
    ) -> DesignedSubset:
        """One subset; as `designed_subset`."""
        x, pool = self.phi, self.rows
        if not 0 <= subset_tilt < np.inf:
            raise RequestError(message(f"subset_tilt={subset_tilt}", "it is not a number from 0 on", "pass 0.5 to 1.5"))
        if not 1 <= subset_size <= len(pool):
            cause = f"{len(pool)} of {len(x)} rows can be drawn"
            raise RequestError(message(f"subset_size={subset_size}", cause, f"choose a size from 1 to {len(pool)}"))
        if version not in range(1, VERSION + 1):
            raise RequestError(message(f"subset_version={version}", "there is no such draw", "pass 1 or 2"))
        wanted, dropped = (_random_shares, _shares_of_some)[version - 1](self.names, subset_seed)
        if subset_mixture is not None:
            wanted, dropped = _given_shares(self.names, subset_mixture), None
        counts, deficit = apportioned(wanted, self._available, int(subset_size))
        direction = _direction(x.shape[1], subset_seed)
        exponents = subset_tilt * self.problem.along(direction)

        rng = generator(subset_seed, purpose=DESIGN_DRAW)
        parts = []
        for index in np.flatnonzero(counts):
            inside = self._inside[index]
            weights = np.exp(exponents[inside] - exponents[inside].max())
            # far rows of a strongly tilted source still belong to it: a source may be needed to its last row
            weights = np.maximum(weights, 1e-300)
            parts.append(pool[inside[systematic_sample(checked_weights(weights), int(counts[index]), rng)]])
        rows = np.concatenate(parts)
        rng.shuffle(rows)

        shift = (x[rows].mean(axis=0) - self.problem.mean) / self.problem.scale
        design = {
            "seed": int(subset_seed),
            "size": int(subset_size),
            "mixture": None if subset_mixture is None else {str(k): float(v) for k, v in subset_mixture.items()},
            "tilt": float(subset_tilt),
            "source_shares": _by_name(self.names, counts / subset_size),
            "shares_wanted": _by_name(self.names, wanted),
            "dropped": dropped,
            "deficit": {str(name): int(short) for name, short in zip(self.names, deficit, strict=True) if short},
            "direction": [float(d) for d in direction],
            "mean_shift": [float(s) for s in shift],
            "eligible": len(pool),
            "version": version,
        }
        return DesignedSubset(rows, design)


def _random_shares(names: Any, seed: int) -> tuple[Floats, str | None]:
    """Dirichlet(1) shares over the sources in order of their names; one of several is left out in a quarter of runs."""
    rng = generator(seed, purpose=DESIGN_SHARES)
    leave_out = rng.random() < DROP_PROBABILITY and len(names) > 1
    which = int(rng.integers(len(names)))
    shares = rng.standard_exponential(len(names))
    if leave_out:
        shares[which] = 0.0
    return shares / shares.sum(), str(names[which]) if leave_out else None


def _shares_of_some(names: Any, seed: int) -> tuple[Floats, str | None]:
    """Dirichlet(1) shares over all sources, or, in half of the runs, over some of them: from one to all but one."""
    rng = generator(seed, purpose=DESIGN_SHARES)
    shares = rng.standard_exponential(len(names))
    if rng.random() < 0.5 and len(names) > 1:
        shares[rng.permutation(len(names))[rng.integers(1, len(names)) :]] = 0.0
    return shares / shares.sum(), ", ".join(map(str, names[shares == 0])) or None


def _given_shares(names: Any, mixture: Mapping[str, float]) -> Floats:
    unknown = [str(name) for name in mixture if str(name) not in set(names)]
    shares = np.array([float(mixture.get(str(name), 0.0)) for name in names])
    if unknown or not np.all((shares >= 0) & (shares < np.inf)) or not shares.sum() > 0:
        cause = f"there are no rows of {', '.join(unknown)}" if unknown else "its shares are not numbers from 0 on"
        remedy = f"give positive shares to some of {', '.join(map(str, names))}"
        raise RequestError(message(f"subset_mixture {dict(mixture)}", cause, remedy))
    return shares / shares.sum()


def _direction(dimensions: int, seed: int) -> Floats:
    """A random unit vector [p]."""
    direction = generator(seed, purpose=DESIGN_DIRECTION).standard_normal(dimensions)
    return direction / max(float(np.linalg.norm(direction)), 1e-300)


def apportioned(shares: Floats, available: Any, size: int) -> tuple[Any, Any]:
    """Rows per source [K] and what each was short of: what a short source lacks goes to the others by their shares,
    and only when all of those are used up to the sources without a share."""
    wanted = _apportion(shares, size)
    counts = np.minimum(wanted, available)
    deficit = wanted - counts
    while (missing := size - int(counts.sum())) > 0:
        room = available - counts
        claims = np.where(room > 0, shares, 0.0)
        if not claims.sum() > 0:
            claims = room.astype(np.float64)
        counts = counts + np.minimum(_apportion(claims / claims.sum(), missing), room)
    return counts, deficit


def _apportion(shares: Floats, size: int) -> Any:
    """Whole rows by largest remainder; ties go to the first source."""
    exact = shares * size
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: size - int(counts.sum())]] += 1
    return counts


def _by_name(names: Any, values: Any) -> dict[str, float]:
    return {str(name): float(value) for name, value in zip(names, values, strict=True)}
