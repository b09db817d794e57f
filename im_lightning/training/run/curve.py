"""Where in a run the evaluation is measured before the end, and where the run ends early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from im_lightning._lightning import Trainer
from im_lightning._utils.files import plain
from im_lightning._utils.progress import log
from im_lightning.errors import RequestError, message
from im_lightning.ledger.curve import point_of, read_points, step_of, stopped
from im_lightning.ledger.record import RunRecord


class EvaluationCurve:
    """The points of one run: those asked for, and what was measured at them.

    Args:
        eval_at: Where to measure besides the end: shares of the optimiser steps (below 1) or numbers of them.
        stop_at: Where to end the run, likewise; the Trainer's limits and so the learning-rate schedule stay.

    Raises:
        RequestError: one of them is no point of a run.
    """

    def __init__(self, eval_at: Sequence[float] | float | str | None, stop_at: float | None) -> None:
        self._asked = read_points("eval_at", eval_at)
        stops = read_points("stop_at", stop_at)
        self._stop = stops[0] if stops else None
        self.points: list[dict[str, Any]] = []
        self.steps = 0
        self.due_at: set[int] = set()
        self.ends_at: int | None = None

    @property
    def flags(self) -> list[str]:
        """The arguments of `im-lightning fit` that ask for the same."""
        given = [] if not self._asked else [f"--mining.eval_at={','.join(f'{point:g}' for point in self._asked)}"]
        return given if self._stop is None else [*given, f"--mining.stop_at={self._stop:g}"]

    def cost(self, steps: int) -> tuple[float, int]:
        """Of a run of so many optimiser steps: the share that is trained, and how many evaluations, with the last.

        >>> EvaluationCurve("0.2,0.5", 0.5).cost(10)
        (0.5, 2)
        """
        end = steps if self._stop is None else step_of(self._stop, steps)
        return end / steps, 1 + len({at for point in self._asked if (at := step_of(point, steps)) < end})

    def begin(self, trainer: Trainer, points: Sequence[dict[str, Any]]) -> None:
        """Settles the steps, when the Trainer knows how many there are; `points` are those that a checkpoint had.

        Raises:
            RequestError: the run has no such step, or is beyond its end already, or has no known end.
        """
        self.points, self.due_at, self.ends_at = list(points), set(), None
        wanted = [*self._asked, *([] if self._stop is None else [self._stop])]
        total = trainer.estimated_stepping_batches
        self.steps = int(total) if math.isfinite(total) else 0  # also of points that a checkpoint had
        if not wanted or not math.isfinite(total):
            if wanted:
                cause = "the Trainer has no end, so that a point of the run is not known"
                raise RequestError(message("eval_at, stop_at", cause, "give the Trainer max_epochs or max_steps"))
            return
        steps = [step_of(point, self.steps) for point in wanted]
        if max(steps) >= self.steps:
            at = wanted[steps.index(max(steps))]
            cause = f"the run has {self.steps} optimiser steps, and is measured at their end anyway"
            raise RequestError(message(f"eval_at, stop_at: {at:g}", cause, "name an earlier point"))
        if self._stop is not None:
            self.ends_at = steps[-1]
            self._check_end(trainer, self.ends_at)
        self.due_at = {s for s in steps[: len(self._asked)] if self.ends_at is None or s < self.ends_at}
        self.due_at -= {point["steps"] for point in self.points}
        if passed := sorted(step for step in self.due_at if step < trainer.global_step):
            log(f"the checkpoint is of step {trainer.global_step}: the curve lacks {', '.join(map(str, passed))}")

    def _check_end(self, trainer: Trainer, end: int) -> None:
        if trainer.global_step >= end:
            cause = f"the checkpoint is of step {trainer.global_step}, and the run would end after step {end}"
            raise RequestError(message("stop_at", cause, "leave it out, or start anew"))
        if trainer.min_epochs or trainer.min_steps:
            cause = "the Trainer has min_epochs or min_steps, and would go on"
            raise RequestError(message("stop_at", cause, "leave these out"))

    def add(self, record: RunRecord) -> None:
        """Keeps a record that was made in the middle of the run, after one of the steps that were due."""
        self.points.append(plain(point_of(record)))
        self.due_at.discard(record.steps)

    def put_into(self, record: RunRecord) -> RunRecord:
        """The record of the run with its curve, and if the run was stopped, as that of a stopped one."""
        read = record.compute.get("tokens_evaluated")
        if read is not None:
            record.compute["tokens_evaluated"] = read * (1 + len(self.points))
        if self.points or self.ends_at is not None:
            record.curve = {"steps": self.steps, "points": self.points}
        return record if record.steps != self.ends_at else stopped(record, record.steps, self.steps)
