"""Who runs a sweep's trials: this process, or several worker processes that share its processors and GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import connection, get_context
from typing import Any

from im_lightning._lightning import keep_environment
from im_lightning._utils.progress import Progress, progress_sent
from im_lightning.experiments.sweep.trial import TrialRequest, TrialResult, end_with_parent, run_trial
from im_lightning.training.shared_base import shared_base

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Here:
    """Trials run in this process, one at a time."""

    def __init__(self) -> None:
        self._next: TrialRequest | None = None

    def start(self, request: TrialRequest) -> None:
        """Takes a trial."""
        self._next = request

    def wait(self, show: Callable[[Progress], None]) -> tuple[int, TrialResult]:
        """Runs it, which shows itself; its number and what came of it."""
        request, self._next = self._next, None
        if request is None:
            raise RuntimeError("no trial was started")
        result = run_trial(request)
        if result is None:
            raise RuntimeError("this process is not the first rank")
        return request.number, result

    def close(self) -> None:
        """Nothing is left running."""


class Workers:
    """Trials run side by side, each worker doing many of them, so that it imports and reads files once.

    Args:
        jobs: Number of workers. Each gets its share of the processors as threads, and, where there are several GPUs,
            one of them.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._gpus = _visible_gpus() if jobs > 1 else []
        self._context = get_context("spawn")  # a fork would copy the threads' locks of the libraries
        self._idle: list[tuple[Any, Any, int]] = []
        self._busy: dict[Any, tuple[Any, Any, int, int]] = {}
        self._free = list(range(jobs))

    def start(self, request: TrialRequest) -> None:
        """Gives a trial to an idle worker, or to a new one."""
        process, pipe, slot = self._idle.pop() if self._idle else self._new()
        pipe.send(request)
        self._busy[pipe] = (process, pipe, slot, request.number)

    def wait(self, show: Callable[[Progress], None]) -> tuple[int, TrialResult]:
        """The next trial to end: its number and what came of it. A worker that died is a trial that failed.

        Args:
            show: Gets what is under way in a trial, now and then.
        """
        while True:
            pipe: Any = connection.wait(list(self._busy))[0]
            number = self._busy[pipe][3]
            try:
                result = pipe.recv()
            except (EOFError, OSError):
                result = None
            if not isinstance(result, Progress):
                break
            result.description = f"trial {number + 1}, {result.description}"
            show(result)
        process, pipe, slot, number = self._busy.pop(pipe)
        if result is None:
            process.join()
            code = process.exitcode
            why = ", as where memory runs out (then fewer --jobs)" if code == -9 else ""
            how = f"was killed by signal {-code}{why}" if code is not None and code < 0 else f"ended with status {code}"
            self._free.append(slot)
            return number, TrialResult("failed", error=f"its worker process {how}")
        self._idle.append((process, pipe, slot))
        return number, result

    def close(self) -> None:
        """Ends the workers; trials that were running count as killed."""
        everyone = [*self._idle, *((process, pipe, slot) for process, pipe, slot, _ in self._busy.values())]
        for process, pipe, _ in everyone:
            pipe.close()
            process.terminate()
            process.join()

    def _new(self) -> tuple[Any, Any, int]:
        slot = self._free.pop(0)
        here, there = self._context.Pipe()
        share = _share(self.jobs, slot, self._gpus)
        with keep_environment(*share):
            os.environ.update(share)  # read by libraries while they are imported
            process = self._context.Process(target=work, args=(there,), daemon=False)
            process.start()
        there.close()
        return process, here, slot


def work(pipe: Any) -> None:
    """A worker: trials come through the pipe until it closes."""
    import signal

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    with shared_base():
        while True:
            try:
                request = pipe.recv()
            except (EOFError, OSError):
                return
            with progress_sent(pipe.send):
                result = run_trial(request)
            pipe.send(result)


def _share(jobs: int, slot: int, gpus: list[str]) -> dict[str, str]:
    """Environment of a worker: its threads and its GPU.

    >>> _share(4, 1, ["0", "1"])["CUDA_VISIBLE_DEVICES"]
    '1'
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, processors // jobs))
    out = {name: os.environ.get(name, threads) for name in _THREADS}
    if len(gpus) > 1:
        out["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return out


def _visible_gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part for part in named.split(",") if part]
    return [str(k) for k in range(torch.cuda.device_count())]
