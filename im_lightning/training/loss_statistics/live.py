"""`LiveStatistics`: what a fit says of indicators and losses while it runs; the calculation, without a Trainer.

Between flushes nothing is read from the device: a step only keeps two references. A flush, once per window of steps,
reads all losses at once and adds them to sums on the CPU. Beside those sums stand how often each row was trained on
(`Exposures`) and how the loss of each decile went over the steps (`LossHistory`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from im_lightning._utils.progress import log
from im_lightning.data.score_table import PREDICTED, ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.rule.linear_rule import Regressors
from im_lightning.training.loss_statistics.metric import (
    DECILES,
    EXPOSURES,
    IndicatorLossStatistics,
    deciles,
    flat,
    summary,
)

MOST_POINTS = 256

AllSum = Callable[[Tensor], Tensor] | None
_CONTRACT = (
    'return {"loss": …, "example_loss": mean nats per response token of each example [B], "row": batch["row"]} from '
    "training_step, both detached"
)


def step_losses(module: Any, outputs: Any) -> tuple[Tensor, Tensor] | None:
    """example_loss float [B] and row int64 [B] of a training step, detached; None where the step was skipped.

    Raises:
        RequestError: the module's `training_step` returned something else.
    """
    if outputs is None:
        return None
    if not isinstance(outputs, dict) or "example_loss" not in outputs or "row" not in outputs:
        has = f"with {', '.join(outputs)}" if isinstance(outputs, dict) else f"as a {type(outputs).__name__}"
        lacks = [k for k in ("example_loss", "row") if not isinstance(outputs, dict) or k not in outputs]
        cause = f"its training_step returned {has}: {' and '.join(lacks)} missing"
        raise RequestError(message(type(module).__name__, cause, _CONTRACT))
    loss, row = outputs["example_loss"].detach(), outputs["row"].detach()
    if loss.shape != row.shape or loss.ndim != 1:
        cause = f"example_loss has shape {tuple(loss.shape)} and row {tuple(row.shape)}, not [B] both"
        raise RequestError(message(type(module).__name__, cause, _CONTRACT))
    return loss, row


class Exposures:
    """Counts per row: `total` is known on all ranks, `recent` is this rank's since the last `reduce`.

    Within an epoch ranks see disjoint rows, so counting over ranks once per epoch tells first exposures from repeats
    exactly; under draws with replacement a repeat within one epoch on another rank is noticed at its end only.
    """

    def __init__(self, rows: int) -> None:
        self.total = np.zeros(rows, dtype=np.int32)
        self.recent = np.zeros(rows, dtype=np.int32)

    def see(self, rows: np.ndarray) -> np.ndarray:
        """Counts the rows (int64 [B], in order) and returns bool [B]: which had been seen before."""
        before = (self.total[rows] + self.recent[rows]) > 0
        if len(np.unique(rows)) < len(rows):  # a row twice in one batch: the second time is a repeat
            first = np.zeros(len(rows), dtype=bool)
            first[np.unique(rows, return_index=True)[1]] = True
            before |= ~first
        np.add.at(self.recent, rows, 1)
        return before

    def reduce(self, all_sum: AllSum) -> None:
        """Moves the recent counts of all ranks into the total; a collective where `all_sum` is given."""
        recent = self.recent if all_sum is None else all_sum(torch.from_numpy(self.recent.copy())).cpu().numpy()
        self.total = self.total + recent
        self.recent = np.zeros_like(self.recent)

    def state(self) -> dict[str, Tensor]:
        """The total as rows and counts: plain tensors for a checkpoint."""
        rows = np.flatnonzero(self.total)
        return {"rows": torch.from_numpy(rows), "counts": torch.from_numpy(self.total[rows])}

    def adopt(self, state: dict[str, Tensor]) -> None:
        """Starts from what `state` returned. Every rank adopts it: the total is not summed over ranks again."""
        self.total = np.zeros_like(self.total)
        self.total[state["rows"].numpy()] = state["counts"].numpy()
        self.recent = np.zeros_like(self.recent)


class LossHistory:
    """Mean loss by decile on S scales, a point per window of steps.

    Points are kept as (examples, sum of losses), so that two neighbours merge into one exactly; above `MOST_POINTS`
    they do, in pairs, and later points are as wide as they. Equal on all ranks, since it is made of reduced sums.
    """

    def __init__(self, scales: list[str]) -> None:
        self.scales = scales
        shape = (len(scales), DECILES)
        self.steps: list[int] = []
        self._points: list[tuple[Tensor, Tensor]] = []
        self._before = (torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))
        self._last = self._before  # where the last window ended; `_before`: where the last point did
        self._width, self._waiting = 1, 0  # windows per point; windows gathered for the next one

    def add(self, step: int, counts: Tensor, sums: Tensor) -> Tensor:
        """Notes what has come up to `step`: examples of the run so far, over all ranks, and their losses summed up,
        float64 [S, 10] both. Returns the mean loss of what came since the last window, [S, 10]; NaN where nothing did.
        """
        new = (counts - self._before[0], sums - self._before[1])
        within = (counts - self._last[0], sums - self._last[1])
        self._last, self._waiting = (counts.clone(), sums.clone()), self._waiting + 1
        if self._waiting >= self._width:
            self.steps.append(step)
            self._points.append(new)
            self._before, self._waiting = self._last, 0
            if len(self.steps) > MOST_POINTS:
                self._merge()
        return _mean(*within)

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
            "last": torch.stack(self._last),
            "width": self._width,
            "waiting": self._waiting,
        }

    def adopt(self, state: dict[str, Any]) -> None:
        """Starts from what `state` returned; every rank does."""
        self.steps = [int(step) for step in state["steps"]]
        self._points = list(zip(state["counts"].unbind(), state["sums"].unbind(), strict=True))
        self._before = (state["before"][0].clone(), state["before"][1].clone())
        last = state.get("last", state["before"])  # earlier versions kept none
        self._last = (last[0].clone(), last[1].clone())
        self._width, self._waiting = int(state["width"]), int(state["waiting"])


class LiveStatistics:
    """Joins the losses of training examples to the indicators of their rows.

    Indicators, φ and deciles are those of the rule that the fit began with, also after a refit inside the fit: numbers
    under two definitions could not be added up.

    Without scores of the pool and its regressors under the run's rule only exposures are counted. A window has `every`
    optimiser steps; `ess` is the effective sample size of the weights drawn from, in rows.
    """

    def __init__(self, rows: int, table: ScoreTable | None, scored: Regressors | None, every: int, ess: float) -> None:
        self.every, self.ess = every, ess
        self.window, self._opened = 0, 0  # windows so far; optimiser steps // every where this one began
        self.exposures = Exposures(rows)
        self._buffer: list[tuple[Tensor, Tensor]] = []
        self.metric: IndicatorLossStatistics | None = None
        self.history = LossHistory([])
        if table is None or scored is None:
            return
        names, self._phi = scored.of_indicators(table)
        known = ~np.isnan(self._phi).any(axis=1)
        self._centre = self._phi[known].mean(axis=0) if known.any() else 0.0  # sums of squares keep their digits
        scales = {} if scored.predicted is None else {PREDICTED: scored.predicted}
        scales |= {name: table.values[name] for name in names}
        self._deciles = np.column_stack([deciles(values) for values in scales.values()])
        self._led = list(scales)[: 1 if PREDICTED in scales else None]  # the scales whose deciles are logged
        self.metric = IndicatorLossStatistics(names, list(scales))
        self.history = LossHistory(list(scales))

    # steps

    def see(self, loss: Tensor, row: Tensor) -> None:
        """Keeps a batch for the next flush: loss float [B] (mean nats per response token), row int64 [B]."""
        self._buffer.append((loss, row))

    def due(self, step: int) -> bool:
        """Whether the optimiser step opens another window."""
        return step // self.every != self._opened

    def flush(self) -> None:
        """Moves the batches kept so far into the sums."""
        if not self._buffer:
            return
        sizes = [len(row) for _, row in self._buffer]
        loss = torch.cat([loss for loss, _ in self._buffer]).to("cpu", torch.float64)
        rows = torch.cat([row for _, row in self._buffer]).cpu().numpy()
        self._buffer = []
        repeated = np.concatenate([self.exposures.see(part) for part in np.split(rows, np.cumsum(sizes)[:-1])])
        if self.metric is not None:
            phi = torch.from_numpy(self._phi[rows] - self._centre)
            decile = torch.from_numpy(self._deciles[rows]).long()
            self.metric.update(phi, loss, torch.from_numpy(repeated), self.window, decile)

    def close(self, step: int, all_sum: AllSum, leader: bool) -> dict[str, float]:
        """Ends a window; returns the statistics so far as scalars for the loggers. A collective; global rank 0, the
        leader, keeps the sums of all ranks."""
        self.flush()
        self.exposures.reduce(all_sum)
        self.window, self._opened = self.window + 1, step // self.every
        out: dict[str, float] = {}
        if self.metric is not None:
            sums = self.metric.close(self.window, all_sum, leader)
            means = self.history.add(step, *_totals(sums))
            out = {**flat(summary(sums), self.metric.names), **self._binned(means)}
        return {**out, **self._whole()}

    def standing(self, step: int, all_sum: AllSum) -> tuple[dict[str, float], dict[str, Any]]:
        """Current statistics, in the middle of a window: scalars for the loggers, and the whole for the ledger. A
        collective."""
        self.flush()
        self.exposures.reduce(all_sum)
        if self.metric is None:
            return self._whole(), {"steps": step, **self._whole()}
        sums = self.metric.sums(all_sum)
        return {**flat(summary(sums), self.metric.names), **self._whole()}, self._file(step, sums)

    def _whole(self) -> dict[str, float]:
        seen = np.count_nonzero(self.exposures.total) / max(1, len(self.exposures.total))
        return {"pool_seen": float(seen), **({"ess": self.ess} if self.ess == self.ess else {})}

    def _binned(self, means: Tensor) -> dict[str, float]:
        """Loss by decile in the window just closed; without a rule the extreme deciles of each indicator."""
        out = {}
        for at, scale in enumerate(self._led):
            for d, loss in enumerate(means[at].tolist()):
                if loss == loss and (scale == PREDICTED or d in (0, means.shape[1] - 1)):
                    out[f"decile_loss/{scale}/{d + 1}"] = loss
        return out

    def _file(self, step: int, sums: dict[str, Any]) -> dict[str, Any]:
        assert self.metric is not None
        names, scales, computed = self.metric.names, self.metric.scales, summary(sums)
        kinds = [
            {
                "examples": int(computed["n"][k]),
                "pearson": dict(zip(names, computed["pearson"][k].tolist(), strict=True)),
                "slope": dict(zip(names, computed["slope"][k].tolist(), strict=True)),
                "r2": float(computed["r2"][k]),
                "by_decile": {s: computed["decile_loss"][k, at].tolist() for at, s in enumerate(scales)},
                "decile_examples": {s: computed["decile_count"][k, at].long().tolist() for at, s in enumerate(scales)},
            }
            for k in range(len(EXPOSURES))
        ]
        series = {scale: self.history.rows(scale, step, *_totals(sums)) for scale in scales}
        return {
            "steps": step,
            "indicators": names,
            **kinds[0],
            "repeat": kinds[1],
            "left_out": int(computed["left_out"].sum()),
            **self._whole(),
            "deciles_of": scales[0],
            "deciles": series.pop(scales[0]),
            "other_deciles": series,
        }

    # checkpoints

    def state(self, all_sum: AllSum) -> dict[str, Any]:
        """Plain values for a checkpoint; `sums` are reduced. A collective."""
        self.flush()
        self.exposures.reduce(all_sum)
        out: dict[str, Any] = {"exposures": self.exposures.state(), "window": [self.window, self._opened, self.every]}
        if self.metric is not None:
            of = [list(self.metric.names), list(self.metric.scales)]
            out |= {"statistics": self.metric.sums(all_sum), "statistics_of": of, "history": self.history.state()}
        return out

    def adopt(self, state: dict[str, Any], step: int, leader: bool) -> None:
        """Starts from what `state` returned, at an optimiser step; anew where that was of other indicators or rows, as
        in a resume with on_mismatch=warn."""
        self._opened = step // self.every
        if "window" in state:
            self.window, opened, every = state["window"]
            self._opened = opened if every == self.every else self._opened
        if "exposures" in state:
            if max(state["exposures"]["rows"].tolist(), default=0) < len(self.exposures.total):
                self.exposures.adopt(state["exposures"])
            elif leader:
                log("the checkpoint's counts of rows are of a larger pool: they begin anew")
        if self.metric is not None and "statistics" in state:
            of = [self.metric.names, self.metric.scales]
            if state.get("statistics_of", of) == of:
                self.metric.adopt(state["statistics"], add=leader)
                self.history.adopt(state["history"])
            elif leader:
                log("the checkpoint's training statistics are of other indicators: they begin anew")


def _totals(sums: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Examples and summed losses by decile, [S, 10] both: first exposures and repeats together."""
    return sums["decile_count"].sum(0), sums["decile_loss"].sum(0)


def _mean(counts: Tensor, sums: Tensor) -> Tensor:
    return sums / torch.where(counts > 0, counts, torch.nan)
