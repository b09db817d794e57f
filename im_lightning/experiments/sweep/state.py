"""The state of a sweep: which trials there are, with which values and run ids, and what came of them; one JSON file.

It is written before a trial starts and after it ends, so that after a kill the same command goes on: trials that ended
well stay, those that were running or failed are run again under their old run id, and so leave one run in the ledger.
The next trial is the next point of a grid, a random one, or one that TPE proposes (Optuna).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from im_lightning._utils.files import parse_json, write_json
from im_lightning._utils.hashing import digest_file
from im_lightning._utils.optional import require
from im_lightning._utils.progress import log
from im_lightning.errors import DataError, InstructMiningError, RequestError, message
from im_lightning.experiments.sweep.file import SweepFile
from im_lightning.experiments.sweep.merged import MergedRuns
from im_lightning.ledger.record import new_run_id

FORMAT = "im_lightning.sweep"
STATE_FILE = "sweep.json"
SETTLED = ("done", "stopped")
BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass
class Trial:
    """One trial.

    Args:
        number: From 0.
        values: Parameter → value.
        units: Parameter → where in the unit interval the value was taken from; empty for a grid.
        run_id: Of its run in the ledger.
        status: running, done, stopped (early), interrupted or failed.
        attempts: How often it was started.
    """

    number: int
    values: dict[str, Any]
    units: dict[str, float] = field(default_factory=dict)
    run_id: str = field(default_factory=new_run_id)
    status: str = "running"
    attempts: int = 0
    value: float | None = None
    at_bands: dict[str, float] = field(default_factory=dict)
    ledger: str = ""
    losses: dict[str, float | None] = field(default_factory=dict)
    precision: str = ""
    seconds: float = 0.0
    processor_seconds: float = 0.0
    error: str = ""


class SweepState:
    """The trials of a sweep and the file that holds them.

    Args:
        folder: Of the sweep.
        sweep: The file it runs.
        seed: Of random and bayes.

    Raises:
        RequestError: the folder belongs to another sweep, or another process is running this one.
        DataError: its state cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], sweep: SweepFile, seed: int) -> None:
        self.folder = Path(folder)
        self.path = self.folder / STATE_FILE
        self.sweep, self.seed, self.recipes = sweep, seed, _recipes(sweep.command)
        self._lock = _lock(self.folder)
        self.merged = MergedRuns.of(sweep, self.folder)
        self.trials: list[Trial] = []
        if self.path.exists():
            self._read()
        self.waiting = [t for t in self.trials if t.status not in SETTLED]

    def _read(self) -> None:
        remedy = f"pass another --out, or delete {self.folder}"
        try:
            value = parse_json(self.path.read_text(encoding="utf-8"))
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                remedy = "pass another --out"
                raise ValueError("it is no state of a sweep")
            digest, seed = value["digest"], value["seed"]
            self.trials = [Trial(**trial) for trial in value["trials"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(message(str(self.path), f"it cannot be read ({error})", remedy)) from error
        if digest == self.sweep.digest and seed == self.seed:
            self._say_changed(value.get("recipes", {}))
            return  # under their run ids also those that were running: one may have reached the ledger
        if not any(trial.status in SETTLED for trial in self.trials):
            self.trials = []  # nothing to keep: the file was mended
        else:
            what = f"seed {seed}"
            if seed == self.seed:
                what = "another sweep file, of this one before it was changed, or of other --arguments"
            raise RequestError(message(str(self.folder), f"it holds the trials of {what}", remedy))

    def _say_changed(self, recipes: dict[str, str]) -> None:
        """Names the recipes that are no longer those (name → digest) that trials were made by, where others follow."""
        settled = self.count(*SETTLED)
        if not settled or settled == self.sweep.trials:
            return
        for name in [name for name, digest in recipes.items() if self.recipes.get(name) != digest]:
            log(
                f"{name}: IT HAS CHANGED since {settled} of the trials in {self.folder} were made by it; the others "
                "are made by it as it is now, and a refit takes runs of one regime alone"
            )

    def write(self) -> None:
        """Writes the state atomically."""
        write_json(
            self.path,
            {
                "format": FORMAT,
                "file": self.sweep.path,
                "digest": self.sweep.digest,
                "seed": self.seed,
                "recipes": self.recipes,
                "trials": [asdict(trial) for trial in self.trials],
            },
        )

    def close(self) -> None:
        """Lets another process run the sweep."""
        self._lock.release()

    def count(self, *statuses: str) -> int:
        """How many trials have one of the statuses."""
        return sum(trial.status in statuses for trial in self.trials)

    @property
    def reached(self) -> bool:
        """Whether a trial has reached the metric's target."""
        metric = self.sweep.metric
        if metric is None:
            return False
        return any(t.value is not None and t.status == "done" and metric.reached(t.value) for t in self.trials)


def _lock(folder: Path) -> FileLock:
    """A lock that is held as long as this process lives."""
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        cause = "another process is running this sweep"
        raise RequestError(message(str(folder), cause, "wait for it, or pass another --out")) from error
    except OSError as error:
        cause = f"it cannot be written: {error.strerror or error}"
        raise InstructMiningError(message(str(folder), cause, "choose a writable folder with --out")) from error
    return lock


def _recipes(command: Sequence[str]) -> dict[str, str]:
    """Recipe that a command names (--config FILE) → digest of the file, where there is one."""
    named = [after for word, after in itertools.pairwise(command) if word == "--config"]
    named += [word.removeprefix("--config=") for word in command if word.startswith("--config=")]
    return {name: digest_file(name) for name in named if Path(name).is_file()}


def propose(state: SweepState) -> Trial | None:
    """The next trial; None where there is none left. A function of the file, the seed and the trials so far.

    Raises:
        RequestError: bayes without Optuna.
    """
    number, sweep = len(state.trials), state.sweep
    if sweep.trials is not None and number >= sweep.trials:
        return None
    if sweep.method == "grid":
        return Trial(number, _grid_point(sweep, number))
    units = _bayes(state, number) if sweep.method == "bayes" else _random(sweep, state.seed, number)
    return Trial(number, {p.name: p.at(units[p.name]) for p in sweep.parameters}, units)


def _grid_point(sweep: SweepFile, number: int) -> dict[str, Any]:
    points = itertools.product(*((p.grid or []) for p in sweep.parameters))
    values = next(itertools.islice(points, number, None))
    return {p.name: value for p, value in zip(sweep.parameters, values, strict=True)}


def _random(sweep: SweepFile, seed: int, number: int) -> dict[str, float]:
    import numpy as np

    drawn = np.random.default_rng([seed, number]).random(len(sweep.parameters))
    return {p.name: float(u) for p, u in zip(sweep.parameters, drawn, strict=True)}


def _bayes(state: SweepState, number: int) -> dict[str, float]:
    """A point of the unit cube proposed by TPE from the trials that ended well. The study is rebuilt each time, so
    that after a kill it is what it would have been."""
    optuna = require("optuna", "search", "method bayes", "use method random")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep = state.sweep
    space: dict[str, Any] = {}
    for p in sweep.parameters:
        if len(p.choices) > 1:
            space[p.name] = optuna.distributions.CategoricalDistribution(list(range(len(p.choices))))
        elif not p.choices:
            space[p.name] = optuna.distributions.FloatDistribution(0.0, 1.0)
    maximize = sweep.metric is not None and sweep.metric.maximize
    study = optuna.create_study(
        direction="maximize" if maximize else "minimize", sampler=optuna.samplers.TPESampler(seed=state.seed + number)
    )
    for trial in state.trials:
        if trial.status == "done" and trial.value is not None:
            at = {p.name: _coordinate(len(p.choices), trial.units[p.name]) for p in sweep.parameters if p.name in space}
            study.add_trial(optuna.trial.create_trial(params=at, distributions=space, value=trial.value))
    asked = study.ask(fixed_distributions=space).params
    units = {}
    for p in sweep.parameters:
        found = asked.get(p.name, 0)
        units[p.name] = (found + 0.5) / len(p.choices) if p.choices else min(float(found), BELOW_ONE)
    return units


def _coordinate(choices: int, unit: float) -> float | int:
    return min(choices - 1, int(unit * choices)) if choices else unit
