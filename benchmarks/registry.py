"""What a measurement is, what it is given, and the registry that finds them.

A subject is a file `rows_<subject>.py` in this folder:

    @benchmark("mtld")
    def mtld(setting: Setting) -> Iterator[Ratio]:
        times = interleaved({"ours": ours, "lexicalrichness": theirs}, setting.repeats)
        yield Ratio("MTLD against lexicalrichness", ratio(times, "lexicalrichness", "ours"), 5.0, "812 rows/s")

It is found by its name; nothing else has to be edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from im_lightning.data.example import Example
from im_lightning.errors import RequestError, message


@dataclass(frozen=True)
class Ratio:
    """One row of the table.

    Args:
        work: What was measured and against what.
        value: The ratio (or share).
        bar: What it should reach; None for a figure without a bar.
        ours: Our figure with its unit, such as "812 rows/s".
        other: What it is compared with, such as "101 rows/s".
        at_least: Whether `value` should be at least `bar` (else at most).
        digits: Decimals of value and bar.
        note: What limits it, or what else a reader must know.
        details: JSON-like; all that was measured, seconds per repeat included.
    """

    work: str
    value: float
    bar: float | None
    ours: str
    other: str = ""
    at_least: bool = True
    digits: int = 2
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without one."""
        if self.bar is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def as_json(self, subject: str) -> dict[str, Any]:
        return {"subject": subject, **asdict(self), "met": self.met}


@dataclass(frozen=True)
class Setting:
    """What every measurement is given.

    Args:
        folder: An empty folder to work in; removed afterwards.
        data: Folder or file of real rows; None: synthetic rows of the same length distribution.
        quick: Whether to take the short form (fewer rows and repeats).
        repeats: Rounds of an interleaved measurement.
    """

    folder: Path
    data: Path | None = None
    quick: bool = False
    repeats: int = 5

    @cached_property
    def examples(self) -> list[Example]:
        """The rows to measure on, in a fixed random order, so that any beginning of them is a fair sample."""
        import numpy as np

        from benchmarks.examples import made_up_examples

        if self.data is None:
            found = made_up_examples(20_000)
        else:
            from im_lightning.data.loading import load_examples

            found = load_examples(str(self.data))
        return [found[int(i)] for i in np.random.default_rng(0).permutation(len(found))]


Measure = Callable[[Setting], Iterator[Ratio]]
_registered: dict[str, Measure] = {}


def benchmark(subject: str) -> Callable[[Measure], Measure]:
    """Decorator: makes a generator of `Ratio` known as `subject`; subjects run in the order of their file names."""

    def register(measure: Measure) -> Measure:
        _registered[subject] = measure
        return measure

    return register


def subjects(only: str | None = None) -> dict[str, Measure]:
    """The measurements by subject, or those of `only` (names separated by commas).

    Raises:
        RequestError: there is no such subject.
    """
    import benchmarks as package

    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        if module.name.startswith("rows_"):
            importlib.import_module(f"{package.__name__}.{module.name}")
    if only is None:
        return dict(_registered)
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in _registered:
            remedy = f"name some of {', '.join(_registered)}"
            raise RequestError(message(f"--only {only}", f"there is no subject {name!r}", remedy))
    return {name: _registered[name] for name in names}
