"""`LiveStatistics`: what a fit says of indicators and losses while it runs; the calculation, without a Trainer.

Between flushes nothing is read from the device: a step only keeps two references. A flush, once per window of steps,
reads all losses at once and adds them to sums on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from im_lightning._utils.progress import log
from im_lightning.data.score_table import ScoreTable
from im_lightning.rule.regressors import Regressors
from im_lightning.training.loss_statistics.exposures import Exposures
from im_lightning.training.loss_statistics.functional import deciles
from im_lightning.training.loss_statistics.history import LossHistory
from im_lightning.training.loss_statistics.metric import EXPOSURES, IndicatorLossStatistics, flat, summary

PREDICTED = "predicted_log_loss"

AllSum = Callable[[Tensor], Tensor] | None


class LiveStatistics:
    """Joins the losses of training examples to the indicators of their rows.

    Indicators, φ and deciles are those of the rule that the fit began with, also after a refit inside the fit: numbers
    under two definitions could not be added up.

    Args:
        rows: Rows of the pool.
        table: Its scores, or None: then only exposures are counted.
        scored: Its regressors under the run's rule, or None like the table.
        every: Optimiser steps per window.
        ess: Effective sample size of the weights drawn from, in rows.
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
        """Ends a window and says how things stand, as flat numbers to log. A collective.

        Args:
            step: Optimiser steps made.
            all_sum: Sums a tensor over the ranks; None where there is one.
            leader: True on global rank 0, which keeps the sums of all ranks.
        """
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
        """How things stand in the middle of a window: flat numbers to log, and all of it for a file. A collective."""
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
