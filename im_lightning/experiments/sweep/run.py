"""Running a wandb sweep file without a server: trials one after the other in this process, or side by side in several.

Lightning and the models' libraries are imported once, files are read and encoded once, the pool is scored once, the
base model is loaded and evaluated once. The sweep is the one that decides: a trial on several ranks is one trial.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from im_lightning._utils.progress import log, progress
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.experiments.finetuning import check_seed
from im_lightning.experiments.sweep.file import SweepFile
from im_lightning.experiments.sweep.state import SETTLED, STATE_FILE, SweepState, Trial, propose
from im_lightning.experiments.sweep.trial import TrialRequest, TrialResult
from im_lightning.experiments.sweep.workers import Here, Workers
from im_lightning.training.shared_base import shared_base

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


@dataclass
class SweepSummary:
    """What a sweep's call did.

    Args:
        state: All trials.
        ran: Trials that ended in this call.
    """

    state: SweepState
    ran: list[Trial] = field(default_factory=list)

    @property
    def ledgers(self) -> list[str]:
        """Folders that hold a run, in the order of the trials."""
        return list(dict.fromkeys(t.ledger for t in self.state.trials if t.ledger and t.status == "done"))

    def check(self) -> None:
        """Raises an InstructMiningError that names the trials that failed, if any."""
        trials = self.state.trials
        failed = [t for t in trials if t.status == "failed"]
        if failed:
            named = "; ".join(f"trial {t.number + 1}: {t.error}" for t in failed[:3])
            more = f" (and {len(failed) - 3} more)" if len(failed) > 3 else ""
            cause = f"{len(failed)} of {len(trials)} trials failed: {named}{more}"
            remedy = "mend what they name, and run the same command to try them again"
            raise InstructMiningError(message(str(self.state.folder), cause, remedy))


def run_sweep(
    sweep: SweepFile, folder: str, count: int | None = None, jobs: int = 1, seed: int = 0, max_failures: int = 3
) -> SweepSummary:
    """Runs the trials that are left.

    Args:
        sweep: The file.
        folder: Of the sweep's state; the same folder goes on where the last call ended.
        count: Most trials of this call; None for all that are left.
        jobs: Trials at a time, each in a process of its own where there are several.
        seed: Of random and bayes.
        max_failures: Trials that may fail one after the other before the sweep gives up.

    Raises:
        RequestError: arguments that no trial can run with, or a sweep without an end.
        InstructMiningError: the folder cannot be written.
    """
    _check(sweep, count, jobs, max_failures)
    check_seed(seed)
    state = SweepState(folder, sweep, seed)
    summary = SweepSummary(state)
    try:
        with shared_base():
            _run(state, summary, count, jobs, max_failures)
            _merge(state)
    finally:
        state.close()
    return summary


def trials_left(sweep: SweepFile, folder: str, count: int | None = None, seed: int = 0) -> tuple[int, list[str]]:
    """How many trials a call of `run_sweep` would run, and the arguments of the first; nothing is written.

    Raises:
        RequestError: as `run_sweep`.
    """
    _check(sweep, count, 1, 1)
    check_seed(seed)
    with ExitStack() as stack:
        there = (Path(folder) / STATE_FILE).exists()
        state = SweepState(folder if there else stack.enter_context(TemporaryDirectory()), sweep, seed)
        try:
            first = None if state.reached else next(_left(state, count), None)
            known = None if sweep.trials is None else sweep.trials - state.count(*SETTLED)
        finally:
            state.close()
    left = min(n for n in (count, known) if n is not None)
    return (0, []) if first is None else (left, sweep.arguments(first.values))


def _merge(state: SweepState) -> None:
    """Evaluates the sweep's merged runs, where it has such and all its trials are done."""
    if state.merged is not None and state.sweep.trials == state.count("done"):
        runs = [(trial.ledger, trial.run_id) for trial in state.trials]
        state.merged.evaluate(state.sweep.arguments(state.trials[0].values), runs, state.sweep.digest)


def _check(sweep: SweepFile, count: int | None, jobs: int, max_failures: int) -> None:
    for name, value in (("--count", count), ("--jobs", jobs), ("--max-failures", max_failures)):
        if value is not None and value < 1:
            raise RequestError(message(name, f"it is {value}", "give 1 or more"))
    if sweep.trials is None and count is None:
        cause = f"method {sweep.method} has no end, and there is no run_cap"
        raise RequestError(message(sweep.path, cause, "write run_cap: N, or pass --count N"))
    rank = next((name for name in _RANKS if os.environ.get(name, "0") != "0"), None)
    if rank is not None:
        cause = f"this is process {os.environ[rank]} ({rank}) of several, and each would run every trial"
        raise RequestError(message("sweep", cause, "start it once; each trial starts its own ranks"))


def _run(state: SweepState, summary: SweepSummary, count: int | None, jobs: int, max_failures: int) -> None:
    left = _left(state, count)
    running: dict[int, Trial] = {}
    executor = Workers(jobs) if jobs > 1 else Here()
    known = state.sweep.trials
    counts = [n for n in (count, None if known is None else known - state.count(*SETTLED)) if n is not None]
    try:
        with progress(f"trials of {state.sweep.path}", min(counts), "trials") as bar:
            while True:
                while len(running) < jobs and not state.reached and _failures(summary.ran) < max_failures:
                    trial = next(left, None)
                    if trial is None:
                        break
                    running[trial.number] = trial
                    executor.start(_start(state, trial))
                if not running:
                    return
                number, result = executor.wait(bar.show)
                _finish(state, summary, running.pop(number), result, count)
                bar.advance()
    except KeyboardInterrupt:
        for trial in running.values():
            trial.status = "interrupted"
        state.write()
        raise
    finally:
        executor.close()


def _left(state: SweepState, count: int | None) -> Iterator[Trial]:
    """Trials to run: those that a kill or a failure left, then new ones."""
    for done in itertools.count():
        if done == count:
            return
        trial = state.waiting.pop(0) if state.waiting else propose(state)
        if trial is None:
            return
        yield trial


def _start(state: SweepState, trial: Trial) -> TrialRequest:
    """Notes that the trial runs, before it does."""
    sweep = state.sweep
    if trial.number == len(state.trials):
        state.trials.append(trial)
    again = trial.attempts > 0
    trial.status, trial.attempts, trial.error = "running", trial.attempts + 1, ""
    state.write()
    bands = sweep.early.bands if sweep.early is not None else ()
    peers = {
        str(b): [t.at_bands[str(b)] for t in state.trials if str(b) in t.at_bands and t is not trial] for b in bands
    }
    return TrialRequest(
        number=trial.number,
        arguments=[*sweep.arguments(trial.values), *(state.merged.export(trial.number) if state.merged else ())],
        run_id=trial.run_id,
        folder=str(state.folder / "trials" / f"{trial.number:04d}"),
        metric=None if sweep.metric is None else sweep.metric.name,
        maximize=sweep.metric is not None and sweep.metric.maximize,
        bands=list(bands),
        peers={band: values for band, values in peers.items() if values},
        eta=3.0 if sweep.early is None else sweep.early.eta,
        again=again,
        precision=next((t.precision for t in state.trials if t.precision and t is not trial), ""),
    )


def _finish(
    state: SweepState, summary: SweepSummary, trial: Trial, result: TrialResult, count: int | None = None
) -> None:
    sweep = state.sweep
    if result.wrong_request:
        trial.status, trial.error = "failed", result.error  # under its number: later ones may have begun
        state.write()
        raise RequestError(f"{sweep.path}: trial {trial.number + 1} ({_values(sweep, trial)}): {result.error}")
    for name, value in vars(result).items():
        if name != "wrong_request":
            setattr(trial, name, value)
    if trial.status == "done" and trial.value is None and sweep.method == "bayes" and sweep.metric is not None:
        trial.status = "failed"
        trial.error = f"it logged no {sweep.metric.name}, which bayes optimises (the callback logs im/eval_loss/<set>)"
    state.write()
    summary.ran.append(trial)
    log(_line(state, trial, "" if count is None else f", {len(summary.ran)} of {count} in this call"))


def _failures(ran: list[Trial]) -> int:
    """How many trials failed one after the other, up to the last."""
    return next((k for k, trial in enumerate(reversed(ran)) if trial.status != "failed"), len(ran))


def _line(state: SweepState, trial: Trial, call: str = "") -> str:
    """`trial 3 of 60 (data.subset_seed=2): eval 2.3456 nats per token, 4.1 s, run 2026…`."""
    total = state.sweep.trials
    head = f"trial {trial.number + 1}{f' of {total}' if total else ''}{call} ({_values(state.sweep, trial)})"
    if trial.status != "done":
        return f"{head}: {trial.status}: {trial.error}"
    metric = state.sweep.metric
    if metric is not None and trial.value is not None:
        shown = f"{metric.name} {trial.value:.4f}"
    else:
        shown = ", ".join(f"{n} {v:.4f}" for n, v in trial.losses.items() if v is not None) or "no evaluation loss"
    return f"{head}: {shown}, {trial.seconds:.1f} s, run {trial.run_id}"


def _values(sweep: SweepFile, trial: Trial) -> str:
    """The trial's values; those that all trials share only where there are no others."""
    fixed = {p.name for p in sweep.parameters if p.distribution == "constant"}
    shown = {name: value for name, value in trial.values.items() if name not in fixed} or trial.values
    words = (f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items())
    text = ", ".join(words)
    return text if len(text) <= 100 else text[:97] + "…"
