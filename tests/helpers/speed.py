"""How slow this machine is right now: time limits of tests are those of an idle core, and grow with it."""

from __future__ import annotations

import time

IDLE_SECONDS = 0.053  # what `_work` takes on an idle core of the machine that the limits were set on
_MEASURED_FOR = 20.0  # seconds, since others come and go

_last: tuple[float, float] | None = None


def slowness() -> float:
    """How many times longer a fixed piece of work takes here and now, by the clock on the wall; 1 at least."""
    global _last
    start = time.monotonic()
    if _last is None or start - _last[0] > _MEASURED_FOR:
        _work()
        end = time.monotonic()
        _last = (end, max(1.0, (end - start) / IDLE_SECONDS))
    return _last[1]


def _work() -> int:
    return sum(i * i for i in range(300_000))
