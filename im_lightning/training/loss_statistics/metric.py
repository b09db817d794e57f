"""`IndicatorLossStatistics`: how example loss correlates with the indicators while training, from sums only.

The model moves while it trains, so a raw correlation would mostly say which examples came early. Losses and regressors
are therefore centred within windows of steps: the window is a fixed effect, and by Frisch–Waugh the slopes are those of
a regression with one dummy per window. Everything follows from sums over examples and, per window, from what centring
takes away from them; both are additive over examples: whatever the split into updates, ranks and resumes, the numbers
are the same. An example's first exposure is kept apart from its repeats, which the model has already seen.

First the calculation as pure functions of tensors, then the metric that streams their sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torchmetrics import Metric

DECILES = 10
EXPOSURES = ("first", "repeat")
_OPEN = ("count", "loss", "phi")  # sums per open window
_CLOSED = ("n", "windows", "window_loss2", "window_loss_phi", "window_phi2")  # terms of the closed windows


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


def window_terms(count: Tensor, loss: Tensor, phi: Tensor) -> WindowTerms:
    """The terms of whole windows, from the examples [W] and the sums of losses [W] and regressors [W, p] of each."""
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

    Returns:
        n (examples), pearson [p], slope [p] (nats per token and unit of the regressor, one regressor at a time),
        r2 (all regressors together, adjusted for their number, so that it is 0 on average for noise); NaN where there
        is no variation or no more examples than unknowns.
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
        free = terms.n - terms.windows  # noise alone would explain rank / free of the variation
        rank = torch.linalg.matrix_rank(correlation, rtol=1e-10, hermitian=True)
        r2 = 1.0 - (1.0 - r2) * free / (free - rank)
    return {"n": terms.n, "pearson": pearson, "slope": slope, "r2": r2}


def deciles(values: ArrayLike) -> NDArray[np.int8]:
    """The decile of each value [N] among all: 0 (lowest) to 9, -1 for NaN. Equal values share a decile.

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
    """Number of examples and sum of losses in each decile, float64 [S, 10] both; `decile` int64 [n, S] is 0–9 on S
    scales, -1 where unknown, `loss` float64 [n] has no NaN."""
    scales = decile.shape[1]
    known = decile >= 0
    place = (decile + DECILES * torch.arange(scales))[known]
    counts = torch.zeros(scales * DECILES, dtype=torch.float64)
    sums = torch.zeros_like(counts)
    counts.index_add_(0, place, torch.ones(len(place), dtype=torch.float64))
    sums.index_add_(0, place, loss[:, None].expand_as(decile)[known])
    return counts.view(scales, DECILES), sums.view(scales, DECILES)


class IndicatorLossStatistics(Metric):
    """Streams (regressors, loss) of training examples into sufficient statistics.

    Memory: p·p numbers, and p + 2 for each window that is open; `close` turns windows into terms that are summed up, so
    that whoever closes them uses constant memory. An example with a NaN among its regressors or a NaN loss is left out,
    and counted.

    Args:
        names: The p indicators, for the keys of `scalars`.
        scales: S quantities in whose deciles losses are summed, for example the rule's predicted loss.

    >>> metric = IndicatorLossStatistics(["ppl"])
    >>> phi, loss, repeated = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.0, 1.5, 2.0]), torch.zeros(3).bool()
    >>> metric.update(phi, loss, repeated, window=0)
    >>> round(metric.compute()["slope"][0].item(), 6)
    0.5
    """

    full_state_update = False
    count: Tensor
    loss: Tensor
    phi: Tensor
    loss2: Tensor
    loss_phi: Tensor
    phi2: Tensor
    left_out: Tensor
    decile_count: Tensor
    decile_loss: Tensor

    def __init__(self, names: Sequence[str], scales: Sequence[str] = ()) -> None:
        super().__init__()
        self.names, self.scales, self._first = list(names), list(scales), 0
        p, s, kinds = len(self.names), len(self.scales), len(EXPOSURES)
        shapes: dict[str, tuple[int, ...]] = {"count": (0,), "loss": (0,), "phi": (0, p)}
        shapes |= {"loss2": (), "loss_phi": (p,), "phi2": (p, p)}
        shapes |= {"n": (), "windows": (), "window_loss2": (), "window_loss_phi": (p,), "window_phi2": (p, p)}
        shapes |= {"left_out": (), "decile_count": (s, DECILES), "decile_loss": (s, DECILES)}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros((kinds, *shape), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, phi: Tensor, loss: Tensor, repeated: Tensor, window: int, decile: Tensor | None = None) -> None:
        """Adds examples.

        Args:
            phi: float [B, p] regressors.
            loss: float [B], mean nats per response token.
            repeated: bool [B], whether the run had trained on the example before.
            window: Which window of steps they belong to, from 0, not closed yet. All ranks call with the same windows.
            decile: int64 [B, S], the decile (0–9, -1 unknown) of each example on each scale.

        Raises:
            ValueError: the window is closed.
        """
        if window < self._first:
            raise ValueError(f"window {window} is closed, the first open one is {self._first}")
        self._grow(window)
        device, at = self.count.device, window - self._first
        phi, loss = phi.to(device, torch.float64), loss.to(device, torch.float64)
        heard, known = ~loss.isnan(), ~(phi.isnan().any(1) | loss.isnan())
        for kind, chosen in enumerate((~repeated.to(device), repeated.to(device))):
            self.left_out[kind] += (chosen & ~known).sum()
            x, y = phi[chosen & known], loss[chosen & known]
            self.count[kind, at] += len(y)
            self.loss[kind, at] += y.sum()
            self.phi[kind, at] += x.sum(0)
            self.loss2[kind] += y @ y
            self.loss_phi[kind] += y @ x
            self.phi2[kind] += x.T @ x
            if decile is not None:
                counts, sums = decile_sums(decile[(chosen & heard).cpu()], loss[chosen & heard].cpu())
                self.decile_count[kind] += counts.to(device)
                self.decile_loss[kind] += sums.to(device)

    def _grow(self, window: int) -> None:
        more = window + 1 - self._first - self.count.shape[1]
        if more > 0:
            for name in _OPEN:
                state = getattr(self, name)
                fill = state.new_zeros((state.shape[0], more, *state.shape[2:]))
                setattr(self, name, torch.cat([state, fill], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """n [2], left_out [2], pearson [2, p], slope [2, p], r2 [2], decile_count [2, S, 10] and decile_loss [2, S, 10]
        (mean nats per token, NaN without examples); the first axis is (first exposure, repeats)."""
        return summary({name: getattr(self, name) for name in self._defaults})

    def scalars(self) -> dict[str, float]:
        """`compute` as flat numbers, see `flat`. A collective."""
        return flat(self.compute(), self.names)

    def sums(self, all_sum: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
        """The sums over all ranks, on the CPU: what a checkpoint keeps. A collective: call it on every rank.

        Args:
            all_sum: Sums a tensor over the ranks; all states go through it at once. By default torchmetrics'
                own synchronisation, one state after the other, where a process group is there.
        """
        names = list(self._defaults)
        if all_sum is None:
            group = torch.distributed.is_available() and torch.distributed.is_initialized()
            with self.sync_context(should_sync=group):
                out: dict[str, Any] = {name: getattr(self, name).detach().cpu().clone() for name in names}
        else:
            states = [getattr(self, name) for name in names]
            total = all_sum(torch.cat([state.reshape(-1) for state in states])).cpu()
            parts = total.split([state.numel() for state in states])
            out = {name: part.view(state.shape) for name, part, state in zip(names, parts, states, strict=True)}
        return {**out, "first_window": self._first}

    def close(self, window: int, all_sum: Callable[[Tensor], Tensor] | None = None, add: bool = True) -> dict[str, Any]:
        """Closes the windows before `window`: no example of theirs is to come. A collective: call it on every rank.

        Returns the sums over all ranks; `all_sum` is as for `sums`, `add` as for `adopt`.
        """
        self._grow(window)
        sums = self.sums(all_sum)
        done = window - self._first
        for kind in range(len(EXPOSURES)):
            terms = window_terms(*(sums[name][kind, :done] for name in _OPEN))
            for name, term in zip(_CLOSED, terms, strict=True):
                sums[name][kind] += term
        for name in _OPEN:
            sums[name] = sums[name][:, done:].clone()
        sums["first_window"] = window
        self.adopt(sums, add)
        return sums

    def adopt(self, sums: dict[str, Any], add: bool) -> None:
        """Starts from what `sums` returned: `add` on global rank 0 alone. The others start from zeros of the same
        shape: sums that every rank adopted would count as often as there are ranks."""
        for name in self._defaults:
            value = sums[name].to(getattr(self, name).device)
            setattr(self, name, value.clone() if add else torch.zeros_like(value))
        self._first = int(sums["first_window"])
        self._update_count = max(self._update_count, 1)  # restored sums count as an update
        self._computed = None

    def reset(self) -> None:
        super().reset()
        self._first = 0


def summary(sums: dict[str, Any]) -> dict[str, Tensor]:
    """What `IndicatorLossStatistics.compute` says, of sums that have been reduced already."""
    parts = []
    for k in range(len(EXPOSURES)):
        still_open = window_terms(*(sums[name][k] for name in _OPEN))
        terms = WindowTerms(*(sums[name][k] for name in _CLOSED)).plus(still_open)
        parts.append(within_windows(CrossSums(*(sums[name][k] for name in ("loss2", "loss_phi", "phi2"))), terms))
    out = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    counts = sums["decile_count"].clone()
    return {
        **out,
        "left_out": sums["left_out"].clone(),
        "decile_count": counts,
        "decile_loss": sums["decile_loss"] / torch.where(counts > 0, counts, torch.nan),
    }


def flat(computed: dict[str, Tensor], names: Sequence[str]) -> dict[str, float]:
    """Flat numbers to log: `pearson_first/<indicator>`, `slope_repeat/<indicator>`, `r2_first`, `examples_first`,
    `left_out`. Kinds of exposure without examples are absent, and so is what is not known yet (NaN)."""
    n, r2, pearson, slope = (computed[name].tolist() for name in ("n", "r2", "pearson", "slope"))
    out: dict[str, float] = {"left_out": float(computed["left_out"].sum())}
    for kind, name in enumerate(EXPOSURES):
        if not n[kind] > 0:
            continue
        out[f"examples_{name}"], out[f"r2_{name}"] = n[kind], r2[kind]
        for j, indicator in enumerate(names):
            out[f"pearson_{name}/{indicator}"] = pearson[kind][j]
            out[f"slope_{name}/{indicator}"] = slope[kind][j]
    return {k: v for k, v in out.items() if v == v}
