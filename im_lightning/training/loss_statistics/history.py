"""How the loss of each quality decile went over the steps of a fit: a point per window, in bounded memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from im_lightning.training.loss_statistics.functional import DECILES

MOST_POINTS = 256


class LossHistory:
    """Mean loss by decile on S scales, a point per window of steps.

    Points are kept as (examples, sum of losses), so that two neighbours merge into one exactly; above `MOST_POINTS`
    they do, in pairs, and later points are as wide as they. Equal on all ranks, since it is made of reduced sums.

    Args:
        scales: S names.
    """

    def __init__(self, scales: list[str]) -> None:
        self.scales = scales
        shape = (len(scales), DECILES)
        self.steps: list[int] = []
        self._points: list[tuple[Tensor, Tensor]] = []
        self._before = (torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))
        self._width, self._waiting = 1, 0  # windows per point; windows gathered for the next one

    def add(self, step: int, counts: Tensor, sums: Tensor) -> Tensor:
        """Notes what has come up to `step`.

        Args:
            step: Optimiser step.
            counts: float64 [S, 10], examples of the run so far, over all ranks.
            sums: float64 [S, 10], their losses (nats per token) summed up.

        Returns:
            Mean loss of what came since the last point, [S, 10]; NaN where nothing did.
        """
        new = (counts - self._before[0], sums - self._before[1])
        self._waiting += 1
        if self._waiting >= self._width:
            self.steps.append(step)
            self._points.append(new)
            self._before, self._waiting = (counts.clone(), sums.clone()), 0
            if len(self.steps) > MOST_POINTS:
                self._merge()
        return _mean(*new)

    def _merge(self) -> None:
        odd = len(self.steps) % 2
        pairs = zip(self._points[odd::2], self._points[odd + 1 :: 2], strict=True)
        self._points = [*self._points[:odd], *((a[0] + b[0], a[1] + b[1]) for a, b in pairs)]
        self.steps = [*self.steps[:odd], *self.steps[odd + 1 :: 2]]
        self._width *= 2

    def rows(self, scale: str, step: int, counts: Tensor, sums: Tensor) -> list[list[Any]]:
        """[step, decile (1–10), mean loss] of every point, and of what has come since the last; `add` explains."""
        at = self.scales.index(scale)
        last = (step, (counts - self._before[0], sums - self._before[1]))
        out: list[list[Any]] = []
        for when, (n, total) in [*zip(self.steps, self._points, strict=True), last]:
            losses = _mean(n[at], total[at]).tolist()
            out += [[when, d + 1, loss] for d, loss in enumerate(losses) if loss == loss]
        return out

    def state(self) -> dict[str, Any]:
        """Plain ints and tensors, for a checkpoint."""
        empty = torch.zeros((0, *self._before[0].shape), dtype=torch.float64)
        return {
            "steps": list(self.steps),
            "counts": torch.stack([p[0] for p in self._points]) if self._points else empty,
            "sums": torch.stack([p[1] for p in self._points]) if self._points else empty,
            "before": torch.stack(self._before),
            "width": self._width,
            "waiting": self._waiting,
        }

    def adopt(self, state: dict[str, Any]) -> None:
        """Starts from what `state` returned; every rank does."""
        self.steps = [int(step) for step in state["steps"]]
        self._points = list(zip(state["counts"].unbind(), state["sums"].unbind(), strict=True))
        self._before = (state["before"][0].clone(), state["before"][1].clone())
        self._width, self._waiting = int(state["width"]), int(state["waiting"])


def _mean(counts: Tensor, sums: Tensor) -> Tensor:
    return sums / torch.where(counts > 0, counts, torch.nan)
