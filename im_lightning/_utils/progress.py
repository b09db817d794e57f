"""Progress: a bar on a terminal, a log line now and then elsewhere; the time that stages took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from im_lightning._utils.files import parse_json, write_json
from im_lightning._utils.numbers import time_text

LOG_EVERY_SECONDS = 15.0


class Progress:
    """Counts work done towards a known total; `advance` is all that callers need."""

    def __init__(self, description: str, total: float, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0.0
        self._start = self._last = time.monotonic()

    def advance(self, amount: float = 1.0) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self._last >= LOG_EVERY_SECONDS:
            self._last = now
            rate = self.done / (now - self._start)
            speed = "no rate yet"
            if rate:
                each = f"{rate:,.0f}/s" if rate >= 1 else f"{1 / rate:,.0f} s each"
                speed = f"{each}, {(self.total - self.done) / rate:,.0f} s left"
            log(f"{self.description}: {self.done:,.0f} of {self.total:,.0f} {self.unit}, {speed}")


@contextmanager
def progress(description: str, total: float, unit: str = "rows") -> Iterator[Progress]:
    """A `Progress` that shows itself on standard error; nothing on standard output, which belongs to results."""
    if not sys.stderr.isatty() or total <= 0:
        yield Progress(description, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit)]
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)

        class OnTerminal(Progress):
            def advance(self, amount: float = 1.0) -> None:
                self.done += amount
                bar.advance(task, amount)

        yield OnTerminal(description, total, unit)


_silenced = 0
_collecting: list[str] | None = None


def log(line: str) -> None:
    """One line for the person at the terminal, on standard error."""
    if _collecting is not None:
        _collecting.append(line)
    elif not _silenced:
        print(line, file=sys.stderr, flush=True)


class Stages:
    """The stages of long work: each is named on standard error, and its wall time kept.

    Args:
        path: JSON file of the times, added up over interrupted calls.

    Attributes:
        here: Stage → seconds of this call.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.here: dict[str, float] = {}

    def total(self) -> dict[str, float]:
        """Stage → seconds of all calls."""
        return dict(parse_json(self.path.read_text())) if self.path.exists() else {}

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        """Around one stage."""
        log(f"{name}: {what}")
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = self.here[name] = time.monotonic() - start
            known = self.total()
            write_json(self.path, {**known, name: round(known.get(name, 0.0) + seconds, 3)})
        log(f"  {time_text(seconds)}")


@contextmanager
def collected() -> Iterator[list[str]]:
    """The lines that `log` gets inside, in place of saying them: work elsewhere sends them to who asked for it."""
    global _collecting
    before, _collecting = _collecting, []
    try:
        yield _collecting
    finally:
        _collecting = before


@contextmanager
def silence() -> Iterator[None]:
    """`log` says nothing inside: for studies, whose hundred short runs would each say the same."""
    global _silenced
    _silenced += 1
    try:
        yield
    finally:
        _silenced -= 1


@contextmanager
def without_bars() -> Iterator[None]:
    """Keeps the loading bars of transformers off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
