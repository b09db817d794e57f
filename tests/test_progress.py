"""What is said of work under way: the speed of slow work too, whose runs per second are all zero."""

from __future__ import annotations

import io
import re

import pytest

from im_lightning._utils import progress as _progress
from im_lightning._utils.progress import Progress, already_there, log, progress, silence


@pytest.mark.parametrize(
    ("seconds", "amount", "said"),
    [(40.0, 1.0, "1 of 50 runs, 40 s each, 1,960 s left"), (20.0, 50.0, "50 of 50 runs, 2/s, 0 s left")],
)
def test_slow_work_has_a_speed(monkeypatch, capsys, seconds: float, amount: float, said: str) -> None:
    """A comparison's finetunes take minutes each: "0/s" says nothing about when to come back."""
    clock = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: clock[0])
    work = Progress("finetunes", 50, "runs")
    clock[0] = seconds
    work.advance(amount)
    assert said in capsys.readouterr().err


def test_what_was_there_before_says_nothing_of_the_speed(monkeypatch, capsys) -> None:
    """After an interrupt 59 s were left, and then more and more: the runs that were found took no time."""
    clock = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: clock[0])
    with progress("runs", 10, "runs") as runs:
        for _ in range(6):
            already_there()
            runs.advance()
        clock[0] = 20.0
        assert str(runs) == "runs: 6 of 10 runs, no rate yet"
        runs.advance()
    assert capsys.readouterr().err == "runs: 7 of 10 runs, 20 s each, 60 s left\n"


def test_work_within_work_shows_itself_even_where_it_is_silenced(monkeypatch, capsys) -> None:
    """A trial of a sweep trains for minutes, and says nothing of its own: the sweep's line says how far it is."""
    clock = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: clock[0])
    with progress("trials", 4, "trials") as trials:
        clock[0] = 3.0
        trials.advance()
        with silence():
            log("of no interest")
            steps = Progress("training", 100, "batches")
            clock[0] = 4.0
            steps.advance(10)
            assert not capsys.readouterr().err, "five seconds without a word are enough"
            clock[0] = 13.0
            steps.advance(10)
            shown = capsys.readouterr().err
            assert shown == "trials: 1 of 4 trials, 13 s each, 39 s left; training: 20 of 100 batches, 2/s, 40 s left\n"
            clock[0] = 20.0
            steps.advance(10)
            assert not capsys.readouterr().err
    with silence(), progress("inner", 4) as inner:
        clock[0] = 99.0
        inner.advance()
    assert not capsys.readouterr().err


class Terminal(io.StringIO):
    """Standard error of a terminal of 80 columns."""

    def isatty(self) -> bool:
        return True


def test_bar_count_and_time_fit_into_80_columns(monkeypatch) -> None:
    """The main scoring pass has a long name; what was cut off was how far it is and how long it takes."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    name = "scoring length_input, length_output, ppl, ppl_unconditional, ifd, mtld and the vectors of knn_6"
    with progress(name, 12_000, "rows") as work:
        work.advance(3_000)
        with progress("a second bar would break the first", 5) as inner:
            inner.advance()
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]", terminal.getvalue())]
    shown = [line for line in lines if "3000/12000" in line]
    assert shown and all(len(line.rstrip()) <= 80 for line in lines)
    assert all("scoring length_input" in line and "…" in line and "rows" in line and "━" in line for line in shown)
    assert any(re.search(r"(\d+:\d\d|--:--)\s*$", line) for line in shown), "how long it will take"
