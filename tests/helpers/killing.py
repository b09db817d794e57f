"""Children that are killed: forked from a process that has imported everything, so that each costs little time.

Two ways to die. By the clock: after a random time, wherever the child then is. By the file operation: at the k-th time
that it opens, makes, renames or removes something in a folder, before the operation; that is where a kill could leave
something half done, and every such point can be visited.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from speed import slowness

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.truncate")
LIMIT_SECONDS = 60.0
BROKEN = 70


def child(work: Callable[[], Any], report: Path | None = None, prepare: Callable[[], Any] = lambda: None) -> int:
    """Starts `work` in a forked child that leads a process group of its own; returns its id. `report` gets errors."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        with Path(report or os.devnull).open("a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            prepare()
            work()
            stream.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(BROKEN)
    os._exit(0)


def wait(pid: int, seconds: float = LIMIT_SECONDS) -> int:
    """The child's exit status (negative: the signal that ended it); one that does not end is killed and an error.

    `seconds` are those of an idle machine.
    """
    seconds *= slowness()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the child did not end within {seconds:g} s")


def run(work: Callable[[], Any], report: Path) -> None:
    """Runs `work` in a child to its end; its error is the test's."""
    report.unlink(missing_ok=True)
    status = wait(child(work, report))
    assert status == 0, f"exit status {status}: {report.read_text()[-4000:]}"


def kill(pid: int) -> None:
    """Kills a child with all processes that it started; one that leads no group yet has started none."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def killed_after(seconds: float, work: Callable[[], Any], report: Path) -> bool:
    """Whether the child, with all processes that it started, was killed after a while; else it was done before."""
    pid = child(work, report)
    time.sleep(seconds)
    found, status = os.waitpid(pid, os.WNOHANG)
    if found:
        assert os.waitstatus_to_exitcode(status) == 0, report.read_text()[-4000:]
        return False
    kill(pid)
    return True


def operations(folder: Path, work: Callable[[], Any], report: Path) -> int:
    """How many file operations in `folder` the undisturbed work makes."""
    tally = report.with_suffix(".operations")
    seen = [0]

    def count() -> None:
        _at_operation(folder, lambda: seen.__setitem__(0, seen[0] + 1))

    def counted() -> None:
        work()
        tally.write_text(str(seen[0]))

    status = wait(child(counted, report, count))
    assert status == 0, report.read_text()[-4000:]
    return int(tally.read_text())


def killed_at(operation: int, folder: Path, work: Callable[[], Any], report: Path) -> bool:
    """Whether the child killed itself before its `operation`-th (from 1) file operation in `folder`."""
    left = [operation]

    def die() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    status = wait(child(work, report, lambda: _at_operation(folder, die)))
    assert status in (0, -signal.SIGKILL), report.read_text()[-4000:]
    return status != 0


def _at_operation(folder: Path, act: Callable[[], None]) -> None:
    prefix = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and any(
            str(a).startswith(prefix) for a in arguments[:2] if isinstance(a, str | os.PathLike)
        ):
            act()

    sys.addaudithook(hook)  # for ever, but in a child that is about to end


def spread(total: int, number: int, seed: int) -> list[int]:
    """`number` different places among 1…total, in random order, spread over all of it."""
    rng = random.Random(seed)
    edges = [1 + total * i // number for i in range(number + 1)]
    places = {rng.randrange(a, b) if b > a else a for a, b in pairwise(edges)}
    return rng.sample(sorted(places), len(places))
