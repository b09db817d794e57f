"""Several ranks: waiting for others by looking at files, inside `setup`, where no collective is pending.

Lightning puts a barrier after `setup`, and a collective gives up after half an hour; scoring takes longer. So ranks
wait by polling: each keeps a heartbeat file fresh while it works, and a rank whose heartbeat stops, or that leaves an
error, is named. The folder must be one that all ranks see; their clocks, and the file server's, need not agree.

And resuming on another number of ranks (`translate_batches`). Our stream resumes at a row, counted over all ranks;
Lightning resumes at a *number of batches of one rank*, and ends the epoch by that number. Batch 3 of 6 on two ranks is
batch 6 of 12 on one: left as it stands in the checkpoint, the count would end an epoch early, and rows would never be
trained on.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from im_lightning._lightning import Trainer
from im_lightning._utils.files import write_text
from im_lightning._utils.progress import log
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.sampling.draws.sampler import QualityWeightedSampler

BEAT_SECONDS = 5.0
DEAD_SECONDS = 50.0  # named within a minute, the wait between two looks included
POLL_SECONDS = 0.2


class Ranks:
    """The ranks of one fit, this one's number, and the folder in which they all see each other, made on demand."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self._failed_before = {r: _mtime(self._error(r)) for r in range(world)}  # left by an earlier attempt

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Keeps this rank's heartbeat fresh while the block runs; a no-op where there is only one rank."""
        if self.world == 1:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        beat = self._beat(self.rank)
        for path in (self._done(self.rank), self._error(self.rank)):
            path.unlink(missing_ok=True)
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
        except Exception as error:  # the others need not wait for the heartbeat to stop
            with contextlib.suppress(InstructMiningError):
                write_text(self._error(self.rank), f"{error}".encode(errors="replace").decode())
            raise
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
            InstructMiningError: one of them has failed, or has not been heard of for most of a minute; names it.
        """
        said = time.monotonic()
        seen = {rank: (self._last_beat(rank), said) for rank in on}  # heartbeat, and when it was new to us
        while not ready():
            for rank in on:
                now, beat = time.monotonic(), self._last_beat(rank)
                if beat != seen[rank][0]:
                    seen[rank] = beat, now
                told = self._told(rank)
                if told is None and (self._finished(rank) or now - seen[rank][1] <= DEAD_SECONDS):
                    continue
                if ready():
                    return
                cause = f"rank {rank} has given no sign for {DEAD_SECONDS:g} s" if told is None else told
                remedy = f"look at rank {rank}'s own error; all ranks must see the folder {self.folder}"
                raise InstructMiningError(message("setup", f"rank {self.rank} waits for {what}, but {cause}", remedy))
            if time.monotonic() - said > 60:
                said = time.monotonic()
                log(f"rank {self.rank} waits for {what} of rank {', '.join(map(str, on))}")
            time.sleep(POLL_SECONDS)

    def _beat(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.alive"

    def _done(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.done"

    def _error(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.failed"

    def _told(self, rank: int) -> str | None:
        """The error that a rank left in this attempt."""
        path = self._error(rank)
        if _mtime(path) in (0.0, self._failed_before[rank]):
            return None
        try:
            return f"rank {rank} failed: {path.read_text(encoding='utf-8').strip()}"
        except (OSError, ValueError):
            return None

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


def translate_batches(
    trainer: Trainer, sampler: QualityWeightedSampler, batch_size: int, state: Mapping[str, Any]
) -> None:
    """Rewrites the batch counts of the checkpoint being restored for this number of ranks and this batch size; those
    that wrote it are in `state`, which is the data module's.

    Call it while the data module is restored, which is before Lightning restores its loops; the sampler is already at
    the checkpoint's position.

    Raises:
        RequestError: this Lightning keeps its counts elsewhere, so rows would be left out.
    """
    before, now = (state["ranks"], state["draw"]["batch_size"]), (sampler.num_replicas, batch_size)
    if before == now:
        return
    try:  # Lightning offers no public way to the checkpoint from a data module
        progress = trainer._checkpoint_connector._loaded_checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        current, finished = progress["current"], progress["is_last_batch"]
        counts = {name: int(current[name]) for name in ("ready", "started", "processed", "completed")}
    except (AttributeError, KeyError, TypeError) as error:
        cause = f"the checkpoint was written by {before[0]} ranks with batches of {before[1]}, and its count of "
        cause += f"batches was not found for these {now[0]} and {now[1]}"
        remedy = f"resume on {before[0]} ranks with batch_size={before[1]}"
        raise RequestError(message("resume", cause, remedy)) from error
    batches = math.ceil(len(sampler) / batch_size)
    left = 0 if finished else math.ceil(sampler.remaining() / batch_size)
    moved = batches - left - counts["ready"]
    # One and the same shift: which of them runs ahead of the others tells Lightning where in a batch it was stopped.
    current.update({name: count + moved for name, count in counts.items()})
