"""Waiting for other ranks by looking at files, inside `setup`, where no collective is pending.

Lightning puts a barrier after `setup`, and a collective gives up after half an hour; scoring takes longer. So ranks
wait by polling: each keeps a heartbeat file fresh while it works, and a rank whose heartbeat stops is named.
The folder must be one that all ranks see.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from im_lightning._progress import log
from im_lightning.errors import InstructMiningError, message

BEAT_SECONDS = 5.0
DEAD_SECONDS = 60.0
POLL_SECONDS = 0.2


class Ranks:
    """The ranks of one fit and the folder in which they see each other.

    Args:
        folder: A folder that all ranks see; made on demand.
        rank: This rank.
        world: Number of ranks.
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self._start = time.time()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Keeps this rank's heartbeat fresh while the block runs; a no-op where there is only one rank."""
        if self.world == 1:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        beat, done = self._beat(self.rank), self._done(self.rank)
        done.unlink(missing_ok=True)
        beat.touch()
        stop = threading.Event()

        def touch() -> None:
            while not stop.wait(BEAT_SECONDS):
                try:
                    os.utime(beat)
                except OSError:  # the folder vanished; whoever waits will say so
                    return

        thread = threading.Thread(target=touch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def finish(self) -> None:
        """Says that this rank's share is done."""
        if self.world > 1:
            self._done(self.rank).touch()

    def wait_for_all(self) -> None:
        """Waits until every rank has called `finish`.

        Raises:
            InstructMiningError: a rank's heartbeat has stopped; names it.
        """
        others = [r for r in range(self.world) if r != self.rank]
        self.wait(lambda: all(self._finished(r) for r in others), others, "their share of the scores")

    def wait(self, ready: Callable[[], bool], on: list[int], what: str) -> None:
        """Polls until `ready`, watching the heartbeats of the ranks waited for.

        Raises:
            InstructMiningError: one of them has not been heard of for a minute.
        """
        said = time.monotonic()
        while not ready():
            now = time.time()
            for rank in on:
                if not self._finished(rank) and now - max(self._last_beat(rank), self._start) > DEAD_SECONDS:
                    if ready():
                        return
                    cause = (
                        f"rank {self.rank} waits for {what}, but rank {rank} has given no sign for {DEAD_SECONDS:g} s"
                    )
                    remedy = f"look at rank {rank}'s own error; all ranks must see the folder {self.folder}"
                    raise InstructMiningError(message("setup", cause, remedy))
            if time.monotonic() - said > 60:
                said = time.monotonic()
                log(f"rank {self.rank} waits for {what} of rank {', '.join(map(str, on))}")
            time.sleep(POLL_SECONDS)

    def _beat(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.alive"

    def _done(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.done"

    def _finished(self, rank: int) -> bool:
        return _mtime(self._done(rank)) > 0

    def _last_beat(self, rank: int) -> float:
        return _mtime(self._beat(rank))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def share(costs: list[int], rank: int, world: int) -> list[int]:
    """The rows of one rank: sorted by cost, the dearest first, and dealt in turn, so that the shares cost alike.

    >>> [share([5, 1, 9, 3], rank, 2) for rank in (0, 1)]
    [[2, 3], [0, 1]]
    """
    order = sorted(range(len(costs)), key=lambda row: -costs[row])
    return order[rank::world]
