"""How example loss goes with indicators, as pure functions of arrays: what `IndicatorLossStatistics` streams.

The model moves while it trains, so a raw correlation would mostly say which examples came early. Losses and regressors
are therefore centred within windows of steps: the window is a fixed effect, and by Frisch–Waugh the slopes are those of
a regression with one dummy per window. Everything follows from sums over examples and, per window, from what centring
takes away from them; both are additive, so streams may be cut anywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

DECILES = 10


class CrossSums(NamedTuple):
    """Sums over examples: loss2 (scalar, Σ y²), loss_phi [p] (Σ y·x), phi2 [p, p] (Σ x·xᵀ)."""

    loss2: Tensor
    loss_phi: Tensor
    phi2: Tensor


class WindowTerms(NamedTuple):
    """What centring within windows takes away: the `CrossSums` of window means (n_w times the product of means, summed
    over windows), the number of examples, and the number of windows that have any."""

    n: Tensor
    windows: Tensor
    loss2: Tensor
    loss_phi: Tensor
    phi2: Tensor

    def plus(self, other: WindowTerms) -> WindowTerms:
        """The terms of two disjoint sets of windows."""
        return WindowTerms(*(a + b for a, b in zip(self, other, strict=True)))


def cross_sums(phi: Tensor, loss: Tensor) -> CrossSums:
    """The sums of examples: phi float64 [n, p], loss float64 [n]."""
    return CrossSums(loss @ loss, loss @ phi, phi.T @ phi)


def window_terms(count: Tensor, loss: Tensor, phi: Tensor) -> WindowTerms:
    """The terms of whole windows.

    Args:
        count: [W], examples per window.
        loss: [W], sum of losses (nats per token) per window.
        phi: [W, p], sum of regressors per window.
    """
    size = count.clamp(min=1)
    return WindowTerms(
        count.sum(),
        (count > 0).sum().to(count.dtype),
        (loss**2 / size).sum(),
        (phi * (loss / size)[:, None]).sum(0),
        torch.einsum("wi,wj,w->ij", phi, phi, 1 / size),
    )


def within_windows(sums: CrossSums, terms: WindowTerms) -> dict[str, Tensor]:
    """Pearson correlation, slope and joint R² of loss on regressors, both centred within windows.

    Args:
        sums: Of all examples.
        terms: Of all windows.

    Returns:
        n (examples), pearson [p], slope [p] (nats per token and unit of the regressor, one regressor at a time),
        r2 (all regressors together); NaN where there is no variation or no more examples than unknowns.
    """
    syy, sxy, sxx = sums.loss2 - terms.loss2, sums.loss_phi - terms.loss_phi, sums.phi2 - terms.phi2
    var = sxx.diagonal().clone()
    # What is left of a sum of squares after centring is rounding where nothing varied.
    var[var <= 1e-12 * sums.phi2.diagonal()] = torch.nan
    syy = torch.where(syy <= 1e-12 * sums.loss2, torch.nan, syy)
    slope = sxy / var
    pearson = (sxy / (var * syy).sqrt()).clamp(-1.0, 1.0)
    r2 = torch.full_like(syy, torch.nan)
    keep = ~var.isnan()
    if keep.any() and not syy.isnan() and terms.n > keep.sum() + terms.windows:
        scale = var[keep].sqrt()
        correlation = sxx[keep][:, keep] / torch.outer(scale, scale)
        target = sxy[keep] / scale
        r2 = (target @ torch.linalg.pinv(correlation, rtol=1e-10, hermitian=True) @ target / syy).clamp(0.0, 1.0)
    return {"n": terms.n, "pearson": pearson, "slope": slope, "r2": r2}


def indicator_loss_statistics(phi: ArrayLike, loss: ArrayLike, window: ArrayLike | None = None) -> dict[str, Tensor]:
    """Statistics of examples at hand; `IndicatorLossStatistics` gives the same from a stream of them.

    Args:
        phi: [n, p] regressors.
        loss: [n], mean nats per response token.
        window: int [n], the window of steps of each example; by default all in one.

    Returns:
        As `within_windows`. Examples with a NaN are left out.

    >>> out = indicator_loss_statistics([[0.0], [1.0], [2.0]], [1.0, 1.5, 2.0])
    >>> round(out["slope"].item(), 6), round(out["pearson"].item(), 6)
    (0.5, 1.0)
    """
    x = torch.as_tensor(np.asarray(phi, dtype=np.float64))
    y = torch.as_tensor(np.asarray(loss, dtype=np.float64))
    where = np.zeros(len(y), dtype=np.int64) if window is None else np.asarray(window)
    known = ~(x.isnan().any(1) | y.isnan())
    x, y = x[known], y[known]
    place = torch.as_tensor(np.unique(where[known.numpy()], return_inverse=True)[1].reshape(-1))
    size = int(place.max()) + 1 if len(y) else 0
    count = torch.zeros(size, dtype=torch.float64).index_add_(0, place, torch.ones_like(y))
    per_loss = torch.zeros(size, dtype=torch.float64).index_add_(0, place, y)
    per_phi = torch.zeros((size, x.shape[1]), dtype=torch.float64).index_add_(0, place, x)
    return within_windows(cross_sums(x, y), window_terms(count, per_loss, per_phi))


def deciles(values: ArrayLike) -> NDArray[np.int8]:
    """The decile of each value among all: 0 (lowest) to 9, -1 for NaN. Equal values share a decile.

    Args:
        values: [N] (a predicted loss or an indicator, over the pool).

    >>> deciles([3.0, 1.0, 2.0, float("nan")]).tolist()
    [9, 0, 5, -1]
    """
    given = np.asarray(values, dtype=np.float64)
    known = np.isfinite(given)
    out = np.full(given.shape, -1, dtype=np.int8)
    if known.any():
        edges = np.quantile(given[known], np.arange(1, DECILES) / DECILES)
        out[known] = np.searchsorted(edges, given[known], side="right")
    return out


def decile_sums(decile: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Number of examples and sum of losses in each decile.

    Args:
        decile: int64 [n, S], deciles 0–9 on S scales, -1 where unknown.
        loss: float64 [n], without NaN.

    Returns:
        counts and sums, float64 [S, 10] both.
    """
    scales = decile.shape[1]
    known = decile >= 0
    place = (decile + DECILES * torch.arange(scales))[known]
    counts = torch.zeros(scales * DECILES, dtype=torch.float64)
    sums = torch.zeros_like(counts)
    counts.index_add_(0, place, torch.ones(len(place), dtype=torch.float64))
    sums.index_add_(0, place, loss[:, None].expand_as(decile)[known])
    return counts.view(scales, DECILES), sums.view(scales, DECILES)
