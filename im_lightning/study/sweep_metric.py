"""A trial's metric: its history as wandb would see it, kept in a file, and early stopping by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from im_lightning._lightning import submodule
from im_lightning._utils.files import write_json
from im_lightning.errors import InstructMiningError

HISTORY = "metric.json"
Logger: Any = submodule("loggers").Logger


@dataclass(frozen=True)
class TrialRequest:
    """What a trial needs to know; JSON-like.

    Args:
        number: Of the trial, from 0.
        arguments: Of `im-lightning fit`.
        run_id: Under which the run goes into the ledger.
        folder: Of the trial: its configuration and the history of the metric.
        metric: Name of the metric, or None.
        maximize: Whether more is better.
        bands: Positions in the metric's history where the trial may be stopped.
        peers: Band → the metric there, of the trials that ended before this one began.
        eta: The best 1/eta of the trials go on.
        again: Whether the trial was started before.
    """

    number: int
    arguments: list[str]
    run_id: str
    folder: str
    metric: str | None = None
    maximize: bool = False
    bands: list[int] = field(default_factory=list)
    peers: dict[str, list[float]] = field(default_factory=dict)
    eta: float = 3.0
    again: bool = False


class TrialStopped(InstructMiningError):
    """Early stopping ends a trial; its run is recorded as failed, and stays out of refits."""


class TrialLogger(Logger):
    """Keeps the metric's history, as wandb would see it, and stops a trial that falls behind.

    Its folder becomes the trial's: Lightning writes the configuration there.
    """

    def __init__(self, request: TrialRequest) -> None:
        super().__init__()
        self.request = request
        self.history: list[float] = []

    @property
    def name(self) -> str:
        return "sweep"

    @property
    def version(self) -> str:
        return f"trial {self.request.number}"

    @property
    def save_dir(self) -> str:
        return self.request.folder

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The trial's arguments are in the sweep's state."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Takes the metric out of what is logged.

        Raises:
            TrialStopped: at a band, the value is worse than the best 1/eta of all trials there.
        """
        r = self.request
        if r.metric is None or r.metric not in metrics or not math.isfinite(float(metrics[r.metric])):
            return
        self.history.append(float(metrics[r.metric]))
        band = len(self.history) - 1
        if band in r.bands:
            limit = band_limit([*r.peers.get(str(band), ()), self.history[band]], r.eta, r.maximize)
            worse = self.history[band] < limit if r.maximize else self.history[band] > limit
            if worse:
                raise TrialStopped(
                    f"stopped early: {r.metric} is {self.history[band]:.6g} at its value {band + 1}, and the best "
                    f"1/{r.eta:g} of the trials reach {limit:.6g}"
                )

    def finalize(self, status: str) -> None:
        """Writes the history: memory of a forked rank does not come back."""
        leader = getattr(submodule("utilities").rank_zero_only, "rank", 0) == 0
        if leader and self.request.metric is not None:
            write_json(Path(self.request.folder) / HISTORY, self.history)


def band_limit(values: list[float], eta: float, maximize: bool) -> float:
    """The value that the best 1/eta of the trials reach at a band, by wandb's rule: sorted, at index ⌊n / eta⌋.

    >>> band_limit([4.0, 1.0, 3.0, 2.0], 2.0, False)
    3.0
    """
    ordered = sorted(values, reverse=maximize)
    return ordered[int(len(ordered) / eta)]
