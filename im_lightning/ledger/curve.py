"""The evaluation curve of a run, and runs that were stopped early.

A run may record its evaluation loss after chosen optimiser steps, each time with the means of what it had trained on by
then; and it may be stopped at one, on the learning-rate schedule of the full run. A full run seen at a point of its
curve is what the same run stopped there would have recorded, so that the two may stand in one fit; a stopped run is of
a regime of its own (`stopped_at`), so that nothing else mixes it with full ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from im_lightning.errors import RequestError, message
from im_lightning.ledger.record import RunRecord

STOPPED = "stopped_at"
"""The field of a regime that says where its runs were stopped: {"step": …, "of": optimiser steps of the full run}."""
OF_A_POINT = (
    *("evaluation", "indicator_means", "phi_means", "basis_means", "source_phi_means"),
    *("tokens", "steps", "seconds", "compute"),
)
OF_ITS_ROWS = ("rows_seen", "exposures", "source_shares")


def read_points(what: str, given: str | float | Sequence[float] | None) -> list[float]:
    """Points of a run, each a share of its optimiser steps (below 1) or a number of them.

    Args:
        what: Names the argument in messages.
        given: One, several, or a text of them separated by commas.

    Raises:
        RequestError: one is no number, not positive, or above 1 and not whole.

    >>> read_points("eval_at", "0.2, 50")
    [0.2, 50.0]
    """
    parts = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int | float) else given or []
    points = []
    for part in parts:
        try:
            point = float(part)
        except (TypeError, ValueError):
            point = math.nan
        if not (0 < point < 1 or (point >= 1 and point.is_integer())) or isinstance(part, bool):
            cause = f"{part!r} is neither a share of the steps between 0 and 1 nor a number of steps"
            raise RequestError(message(what, cause, "write for example 0.2,0.5 or 50,100; the end is measured anyway"))
        points.append(point)
    return points


def step_of(point: float, steps: int) -> int:
    """The optimiser step of a point in a run of so many; at least the first.

    >>> step_of(0.2, 48), step_of(30, 48)
    (10, 30)
    """
    return max(1, round(point * steps)) if point < 1 else int(point)


def stopped_text(record: RunRecord) -> str:
    """`stopped at step 10 of 50`, or nothing for a full run."""
    at = record.regime.get(STOPPED)
    return f"stopped at step {at['step']} of {at['of']}" if at else ""


def stopped(record: RunRecord, step: int, of: int) -> RunRecord:
    """The record as that of a run stopped after `step` of its `of` optimiser steps."""
    return replace(record, regime={**record.regime, STOPPED: {"step": step, "of": of}})


def point_of(record: RunRecord) -> dict[str, Any]:
    """What the curve keeps of a record that was made in the middle of a run."""
    point = {name: getattr(record, name) for name in OF_A_POINT}
    return {**point, "subset": {name: record.subset[name] for name in OF_ITS_ROWS}}


def at_point(record: RunRecord, point: float) -> RunRecord | None:
    """What the run would have recorded, had it been stopped at a point; None where it has no such point.

    Args:
        record: A full run with a curve, or a stopped one.
        point: A share of its optimiser steps, or a number of them.
    """
    of = int(record.curve.get("steps") or 0)
    step = step_of(point, of)
    if record.regime.get(STOPPED) == {"step": step, "of": of}:
        return replace(record, curve={})
    for one in record.curve.get("points", ()) if of else ():
        if one["steps"] == step:
            known = {"source_phi_means": {}, **{name: one[name] for name in OF_A_POINT if name in one}}
            for name in ("indicator_means", "phi_means"):
                known[name] = {k: math.nan if v is None else v for k, v in one[name].items()}
            subset = {**record.subset, **one["subset"]}
            return stopped(replace(record, subset=subset, curve={}, scores={}, **known), step, of)
    return None
