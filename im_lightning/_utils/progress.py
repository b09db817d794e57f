"""Progress: a bar on a terminal, a log line now and then elsewhere; the time that stages took."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from im_lightning._utils.files import parse_json, write_json
from im_lightning._utils.numbers import time_text

LOG_FIRST_SECONDS, LOG_EVERY_SECONDS, SEND_EVERY_SECONDS = 5.0, 15.0, 1.0
_open: list[Progress] = []
"""The work under way, the outermost first: what is done inside it shows itself in its lines."""


class Progress:
    """Counts work done towards a known total; `advance` is all that callers need."""

    def __init__(self, description: str, total: float, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0.0
        self.found = 0.0
        """Of it what was there before, and says nothing of the speed."""
        self._start = self._last = time.monotonic()
        self._wait = LOG_FIRST_SECONDS
        self._heard = not _silenced

    def advance(self, amount: float = 1.0) -> None:
        self.done += amount
        (_open[0] if _open else self).show(self)

    def show(self, inner: Progress) -> None:
        """Says how far this work is, and the one within it, when it is time to."""
        now = time.monotonic()
        if now - self._last >= self._wait:
            self._last, self._wait = now, LOG_EVERY_SECONDS
            log(str(self) if inner is self else f"{self}; {inner}", self._heard)

    def __str__(self) -> str:
        """`scoring ppl: 300 of 1,200 rows, 20/s, 45 s left`."""
        spent = time.monotonic() - self._start
        rate = (self.done - self.found) / spent if spent else 0.0
        speed = "no rate yet"
        if rate:
            each = f"{rate:,.0f}/s" if rate >= 1 else f"{1 / rate:,.0f} s each"
            speed = f"{each}, {(self.total - self.done) / rate:,.0f} s left"
        return f"{self.description}: {self.done:,.0f} of {self.total:,.0f} {self.unit}, {speed}"


@contextmanager
def progress(description: str, total: float, unit: str = "rows") -> Iterator[Progress]:
    """A `Progress` that shows itself on standard error; nothing on standard output, which belongs to results."""
    with _bar(description, total, unit) as work:
        _open.append(work)
        try:
            yield work
        finally:
            _open.remove(work)


def already_there() -> None:
    """Tells the work under way that what it advances by next was made before: the time left is reckoned without it."""
    if _open:
        _open[-1].found += 1


@contextmanager
def _bar(description: str, total: float, unit: str) -> Iterator[Progress]:
    """A bar on a terminal, where none is there already."""
    if not sys.stderr.isatty() or total <= 0 or _open or _silenced:
        yield Progress(description, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    name = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    columns = [name, BarColumn(12), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn(compact=True)]
    with Bar(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task(description, total=total)

        class OnTerminal(Progress):
            def show(self, inner: Progress) -> None:
                within = "" if inner is self else f" ({inner.description} {inner.done:,.0f}/{inner.total:,.0f})"
                bar.update(task, completed=self.done, description=self.description + within)

        yield OnTerminal(description, total, unit)


class _Sender(Progress):
    """Stands for the outermost work in a process that another one waits for."""

    def __init__(self, send: Callable[[Progress], None]) -> None:
        super().__init__("", 0, "")
        self._send, self._lock, self._last = send, threading.Lock(), 0.0

    def show(self, inner: Progress) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._last >= SEND_EVERY_SECONDS:
                self._last = now
                self._send(inner)


@contextmanager
def progress_sent(send: Callable[[Progress], None]) -> Iterator[None]:
    """What is under way inside is handed to `send` now and then, in place of being shown here."""
    _open.insert(0, outer := _Sender(send))
    try:
        yield
    finally:
        _open.remove(outer)


_silenced = 0
_collecting: list[str] | None = None


def log(line: str, heard: bool = False) -> None:
    """One line for the person at the terminal, on standard error; `heard` even where others are silenced."""
    if _collecting is not None:
        _collecting.append(line)
    elif heard or not _silenced:
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
        try:
            known = parse_json(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
            return {str(name): float(seconds) for name, seconds in known.items()}
        except (OSError, ValueError, TypeError, AttributeError):  # hours of work must not end because of it
            log(f"{self.path}: it does not hold the times of earlier calls; they are counted anew")
            return {}

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
