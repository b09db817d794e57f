"""What the next trial of a sweep tries: the next point of a grid, a random one, or one that TPE proposes (Optuna)."""

from __future__ import annotations

import itertools
import math
from typing import Any

from im_lightning._utils.optional import require
from im_lightning.experiments.sweep.file import SweepFile
from im_lightning.experiments.sweep.state import SweepState, Trial

BELOW_ONE = math.nextafter(1.0, 0.0)


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
    """A point of the unit cube proposed by TPE from the trials that ended well. The study is made anew each time, so
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
