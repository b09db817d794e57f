"""Timing side by side: A B A B, so that a load on the machine meets both, and medians, so that a hiccup meets none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

_clock: Callable[[], float] = time.perf_counter


def count_processor_time() -> None:
    """From now on seconds are those the process worked, not those that passed: on a busy machine, with one thread."""
    global _clock
    _clock = time.process_time


def now() -> float:
    """Seconds on the clock in use; only differences mean something."""
    return _clock()


def counts_processor_time() -> bool:
    """Whether seconds are those the process worked."""
    return _clock is time.process_time


def interleaved(
    works: Mapping[str, Callable[[], object]], repeats: int, warm_up: bool = True, most_seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Seconds of each work in each round; every second round runs in reverse order.

    Args:
        works: What to time, by name.
        repeats: Rounds, at least 1.
        warm_up: Whether each runs once before, untimed.
        most_seconds: After so long no new round begins.
    """
    if warm_up:
        for work in works.values():
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    begun = time.perf_counter()
    for index in range(max(1, repeats)):
        if index and time.perf_counter() - begun > most_seconds:
            break
        for name in list(works) if index % 2 == 0 else list(works)[::-1]:
            start = _clock()
            works[name]()
            seconds[name].append(_clock() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """How many times as long `slow` takes: the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
