"""How an example's training loss goes with its indicators, from sums only, exact over ranks and resumes.

The model moves while it trains, so a raw correlation would mostly say which examples came early. Losses and regressors
are therefore centred within windows of steps (the window is a fixed effect: by Frisch–Waugh the slopes are those of a
regression with one dummy per window), and an example's first exposure is kept apart from its repeats, which the model
has already seen. All that is stored is linear in the examples: whatever the split into updates, ranks and resumes, the
sums are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

EXPOSURES = ("first", "repeat")


def within_windows(
    count: Tensor, loss: Tensor, phi: Tensor, loss2: Tensor, loss_phi: Tensor, phi2: Tensor
) -> dict[str, Tensor]:
    """Pearson correlation, slope and joint R² of loss on regressors, both centred within windows.

    Args:
        count: [W], examples per window.
        loss: [W], sum of losses (nats per token) per window.
        phi: [W, p], sum of regressors per window.
        loss2: Scalar, sum of squared losses over all windows.
        loss_phi: [p], sum of loss times regressor.
        phi2: [p, p], sum of outer products of regressors.

    Returns:
        n (examples), pearson [p], slope [p] (nats per token and unit of the regressor, one regressor at a time),
        r2 (all regressors together); NaN where there is no variation or no more examples than unknowns.
    """
    full = count > 0
    size = count.clamp(min=1)
    syy = loss2 - (loss**2 / size).sum()
    sxy = loss_phi - (phi * (loss / size)[:, None]).sum(0)
    sxx = phi2 - torch.einsum("wi,wj,w->ij", phi, phi, 1 / size)
    n = count.sum()
    var = sxx.diagonal().clone()
    # What is left of a sum of squares after centring is rounding where nothing varied.
    var[var <= 1e-12 * phi2.diagonal()] = torch.nan
    syy = torch.where(syy <= 1e-12 * loss2, torch.nan, syy)
    slope = sxy / var
    pearson = (sxy / (var * syy).sqrt()).clamp(-1.0, 1.0)
    r2 = torch.full_like(syy, torch.nan)
    keep = ~var.isnan()
    if keep.any() and not syy.isnan() and n > keep.sum() + full.sum():
        scale = var[keep].sqrt()
        correlation = sxx[keep][:, keep] / torch.outer(scale, scale)
        target = sxy[keep] / scale
        r2 = (target @ torch.linalg.pinv(correlation, rtol=1e-10, hermitian=True) @ target / syy).clamp(0.0, 1.0)
    return {"n": n, "pearson": pearson, "slope": slope, "r2": r2}


class IndicatorLossStatistics(Metric):
    """Streams (regressors, loss) of training examples into sufficient statistics.

    Memory: 8·(p + 2) bytes per window and kind of exposure, besides a few p × p sums. An example with a NaN among its
    regressors or a NaN loss is left out, and counted.

    Args:
        names: The p indicators, for the keys of `scalars`.

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

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        p, kinds = len(self.names), len(EXPOSURES)
        shapes: dict[str, tuple[int, ...]] = {
            "count": (kinds, 0), "loss": (kinds, 0), "phi": (kinds, 0, p), "loss2": (kinds,), "loss_phi": (kinds, p),
            "phi2": (kinds, p, p), "left_out": (kinds,),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, phi: Tensor, loss: Tensor, repeated: Tensor, window: int) -> None:
        """Adds examples.

        Args:
            phi: float [B, p] regressors.
            loss: float [B], mean nats per response token.
            repeated: bool [B], whether the run had trained on the example before.
            window: Which window of steps they belong to, from 0. All ranks call with the same windows.
        """
        self._grow(window + 1)
        device = self.count.device
        phi, loss = phi.to(device, torch.float64), loss.to(device, torch.float64)
        known = ~(phi.isnan().any(1) | loss.isnan())
        for kind, chosen in enumerate((~repeated.to(device), repeated.to(device))):
            self.left_out[kind] += (chosen & ~known).sum()
            x, y = phi[chosen & known], loss[chosen & known]
            self.count[kind, window] += len(y)
            self.loss[kind, window] += y.sum()
            self.phi[kind, window] += x.sum(0)
            self.loss2[kind] += y @ y
            self.loss_phi[kind] += y @ x
            self.phi2[kind] += x.T @ x

    def _grow(self, windows: int) -> None:
        more = windows - self.count.shape[1]
        if more > 0:
            for name in ("count", "loss", "phi"):
                state = getattr(self, name)
                fill = state.new_zeros((state.shape[0], more, *state.shape[2:]))
                setattr(self, name, torch.cat([state, fill], dim=1))

    def compute(self) -> dict[str, Tensor]:
        """n [2], left_out [2], pearson [2, p], slope [2, p], r2 [2]; the first axis is (first exposure, repeats)."""
        parts = [
            within_windows(self.count[k], self.loss[k], self.phi[k], self.loss2[k], self.loss_phi[k], self.phi2[k])
            for k in range(len(EXPOSURES))
        ]
        out = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return {**out, "left_out": self.left_out.clone()}

    def scalars(self) -> dict[str, float]:
        """What `compute` gives as flat numbers to log: `pearson_first/<indicator>`, `slope_repeat/<indicator>`,
        `r2_first`, `examples_first`, `left_out`. Kinds of exposure without examples are absent. A collective."""
        values = self.compute()
        out: dict[str, float] = {"left_out": float(values["left_out"].sum())}
        for kind, name in enumerate(EXPOSURES):
            if not values["n"][kind] > 0:
                continue
            out[f"examples_{name}"] = float(values["n"][kind])
            out[f"r2_{name}"] = float(values["r2"][kind])
            for j, indicator in enumerate(self.names):
                out[f"pearson_{name}/{indicator}"] = float(values["pearson"][kind, j])
                out[f"slope_{name}/{indicator}"] = float(values["slope"][kind, j])
        return {k: v for k, v in out.items() if v == v}  # NaN: not known yet

    def sums(self) -> dict[str, Any]:
        """The sums over all ranks, on the CPU: what a checkpoint keeps. A collective: call it on every rank."""
        with self.sync_context(should_sync=torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {name: getattr(self, name).detach().cpu().clone() for name in self._defaults}

    def adopt(self, sums: dict[str, Any], add: bool) -> None:
        """Starts from what `sums` returned.

        Args:
            sums: Reduced over all ranks already.
            add: True on global rank 0, False on the others, which start from zeros of the same shape: sums that every
                rank adopted would count as often as there are ranks.
        """
        for name in self._defaults:
            value = sums[name].to(getattr(self, name).device)
            setattr(self, name, value.clone() if add else torch.zeros_like(value))
        self._update_count = max(self._update_count, 1)  # restored sums count as an update
        self._computed = None
