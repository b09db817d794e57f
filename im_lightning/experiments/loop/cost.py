"""What a loop costs on this machine: tokens, and seconds by some steps that are timed."""

from __future__ import annotations

from dataclasses import dataclass

from im_lightning.errors import RequestError, message
from im_lightning.experiments.fit_estimate import Speed
from im_lightning.experiments.loop.settings import LEAST_RUNS, MOST_RUNS


@dataclass(frozen=True)
class Sizes:
    """How large the parts of a loop are; tokens with the prompts and the template.

    Args:
        rows: Of the pool.
        row_tokens: Mean tokens of one.
        subset_rows: Rows of a designed run, and of an arm.
        batch_size: Rows of an optimiser step.
        epochs: Passes over them.
        fit_tokens, verdict_tokens: Of the two evaluation sets.
        seeds: Of the comparison.
        candidates: Rows of one of its seeds.
        passes: Of the base over the pool in scoring: perplexity, and without an embedding model the states of knn_6.
    """

    rows: int
    row_tokens: float
    subset_rows: int
    batch_size: int
    epochs: int
    fit_tokens: float
    verdict_tokens: float
    seeds: int
    candidates: int
    passes: int = 2

    @property
    def steps(self) -> int:
        """Optimiser steps of a designed run."""
        return -(-self.subset_rows // self.batch_size)


def subset_rows_of(rows: int, batch_size: int) -> int:
    """Rows of a designed run: a twelfth of the pool, 32 to 256, whole batches: subsets differ, and each moves the loss.

    >>> [subset_rows_of(rows, 8) for rows in (100, 600, 20_000)]
    [32, 48, 256]
    """
    wanted = min(256, max(32, rows // 12))
    return max(1, wanted // batch_size) * batch_size


def seconds_of(sizes: Sizes, speed: Speed, runs: int, full: bool) -> dict[str, float]:
    """Stage → seconds. `full` is whether the comparison has an arm of all rows.

    >>> one = Sizes(100, 10.0, 20, 10, 1, 30.0, 50.0, 2, 60)
    >>> {stage: round(s, 1) for stage, s in seconds_of(one, Speed(0.02, 0.01, 1.0), 9, False).items()}
    {'scoring': 20.0, 'designed runs': 47.7, 'comparison': 22.5}
    """
    trained = sizes.subset_rows * sizes.row_tokens * sizes.epochs
    run = speed.start + trained * speed.train + sizes.fit_tokens * speed.read
    arm = speed.start + trained * speed.train + sizes.verdict_tokens * speed.read
    comparison = sizes.seeds * 2 * arm + sizes.verdict_tokens * speed.read
    if full:
        more = sizes.candidates * sizes.row_tokens * sizes.epochs * speed.train
        comparison += sizes.seeds * (speed.start + more + sizes.verdict_tokens * speed.read)
    return {
        "scoring": sizes.passes * sizes.rows * sizes.row_tokens * speed.read,
        "designed runs": runs * run,
        "comparison": comparison,
    }


def runs_within(sizes: Sizes, speed: Speed, minutes: float) -> tuple[int, bool]:
    """The designed runs that a budget allows, and whether it allows an arm of all rows, too.

    Raises:
        RequestError: not even the least; says what that takes.
    """
    for full in (True, False):
        base = seconds_of(sizes, speed, 0, full)
        each = seconds_of(sizes, speed, 1, full)["designed runs"]
        runs = int((60 * minutes - sum(base.values())) / each)
        if runs >= LEAST_RUNS:
            return min(runs, MOST_RUNS), full
    least = sum(seconds_of(sizes, speed, LEAST_RUNS, False).values()) / 60
    cause = f"the smallest loop on these data ({LEAST_RUNS} runs, {sizes.seeds} seeds) takes about {least:.0f} minutes"
    raise RequestError(message(f"--budget-minutes {minutes:g}", cause, "allow them, or use a smaller model or pool"))
