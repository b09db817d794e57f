"""One trial of a sweep: an `im-lightning fit` in this process, or, on several ranks, in a process of its own.

A process of its own is needed there because Lightning starts further ranks by running the program's own command
again: the sweep's command would start a sweep on every rank.

    python -m im_lightning.experiments.sweep.trial REQUEST.json RESULT.json

A trial's metric: its history as wandb would see it, kept in a file, and early stopping by it.
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from im_lightning._lightning import Callback, quiet, submodule
from im_lightning._utils.files import parse_json, write_json
from im_lightning._utils.progress import log
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.models.device import PRECISIONS
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.cli import run_fit
from im_lightning.training.merging import CONFIG
from im_lightning.training.module import InstructTuningModule
from im_lightning.training.run.encoded_pool import base_model_name
from im_lightning.training.run.run_record import subset_digest
from im_lightning.training.shared_base import return_base

HISTORY = "metric.json"
Logger: Any = submodule("loggers").Logger


@dataclass(frozen=True)
class TrialRequest:
    """What a trial needs to know; JSON-like.

    Args:
        number: Of the trial, from 0.
        arguments: Of `im-lightning fit`.
        run_id: Under which the run goes into the ledger.
        folder: Of the trial: its configuration and the history of the metric.
        metric: Name of the metric, or None.
        maximize: Whether more is better.
        bands: Positions in the metric's history where the trial may be stopped.
        peers: Band → the metric there, of the trials that ended before this one began.
        eta: The best 1/eta of the trials go on.
        again: Whether the trial was started before.
        precision: Of the sweep's first run, which the others keep; "" for the first.
        subset: Digest of the rows that it must train on; "" for any.
        evaluation: With `subset`: evaluation set → digest of the rows that it must have.
        base: With `subset`: name of the base (`base_model_name`) that it must start from; "" for any.
    """

    number: int
    arguments: list[str]
    run_id: str
    folder: str
    metric: str | None = None
    maximize: bool = False
    bands: list[int] = field(default_factory=list)
    peers: dict[str, list[float]] = field(default_factory=dict)
    eta: float = 3.0
    again: bool = False
    precision: str = ""
    subset: str = ""
    evaluation: dict[str, str] = field(default_factory=dict)
    base: str = ""


class SameData(Callback):
    """Refuses a trial that would not repeat a run, before anything is trained: on other rows, evaluated on others, or
    from another base."""

    def __init__(self, request: TrialRequest) -> None:
        super().__init__()
        self.request = request

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        r, data = self.request, trainer.datamodule
        if data.rows is None or subset_digest(data.pool.ids, data.rows) != r.subset:
            cause = "its rows are not those of the run that it repeats: the pool, its scores or what is left out differ"
            raise RequestError(message("the subset", cause, "pass the score table that those runs had (--scores)"))
        for name, digest in r.evaluation.items():
            if name not in data.eval_sets or data.eval_sets[name].digest != digest:
                cause = "its rows are not those that the run which it repeats was evaluated on"
                remedy = "restore its file as it was, or leave eval_data out of --arguments where they name another"
                raise RequestError(message(f"evaluation set {name!r}", cause, remedy))
        if r.base not in ("", base_model_name(data.coding.model)):
            cause = "it is no longer the model that the run which it repeats was finetuned from"
            raise RequestError(message("the small base", cause, "restore its folder, or leave out --proxy-rates"))


class TrialStopped(InstructMiningError):
    """Early stopping ends a trial; its run is recorded as failed, and stays out of refits."""


class TrialLogger(Logger):
    """Keeps the metric's history, as wandb would see it, and stops a trial that falls behind.

    Its folder becomes the trial's: Lightning writes the configuration there.
    """

    def __init__(self, request: TrialRequest) -> None:
        super().__init__()
        self.request = request
        self.history: list[float] = []

    @property
    def name(self) -> str:
        return "sweep"

    @property
    def version(self) -> str:
        return f"trial {self.request.number}"

    @property
    def save_dir(self) -> str:
        return self.request.folder

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The trial's arguments are in the sweep's state."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Takes the metric out of what is logged.

        Raises:
            TrialStopped: at a band, the value is worse than the best 1/eta of all trials there, or not finite.
        """
        r = self.request
        if r.metric is None or r.metric not in metrics:
            return
        self.history.append(float(metrics[r.metric]))
        band = len(self.history) - 1
        if band in r.bands:
            if not math.isfinite(self.history[band]):
                raise TrialStopped(f"stopped early: {r.metric} is {self.history[band]} at its value {band + 1}")
            limit = band_limit([*r.peers.get(str(band), ()), self.history[band]], r.eta, r.maximize)
            worse = self.history[band] < limit if r.maximize else self.history[band] > limit
            if worse:
                raise TrialStopped(
                    f"stopped early: {r.metric} is {self.history[band]:.6g} at its value {band + 1}, and the best "
                    f"1/{r.eta:g} of the trials reach {limit:.6g}"
                )

    def finalize(self, status: str) -> None:
        """Writes the history: memory of a forked rank does not come back."""
        leader = getattr(submodule("utilities").rank_zero_only, "rank", 0) == 0
        if leader and self.request.metric is not None:
            write_json(Path(self.request.folder) / HISTORY, self.history)


def band_limit(values: list[float], eta: float, maximize: bool) -> float:
    """The value that the best 1/eta of the trials reach at a band, by wandb's rule: sorted, at index ⌊n / eta⌋.

    >>> band_limit([4.0, 1.0, 3.0, 2.0], 2.0, False)
    3.0
    """
    ordered = sorted(values, reverse=maximize)
    return ordered[int(len(ordered) / eta)]


@dataclass
class TrialResult:
    """What came of a trial; JSON-like.

    Args:
        status: done, stopped or failed.
        value: The metric's last value; None where it was not logged or is not finite.
        at_bands: Band → the metric's value there, the worst of all where it was not finite.
        ledger: Folder of the run's ledger.
        losses: Evaluation set → nats per token.
        precision: Of the run, fp32 or bf16.
        seconds: Wall time.
        processor_seconds: Processor time of this process (without other ranks).
        error: Why it failed.
        wrong_request: Whether the arguments were wrong, so that every trial would fail.
    """

    status: str
    value: float | None = None
    at_bands: dict[str, float] = field(default_factory=dict)
    ledger: str = ""
    losses: dict[str, float | None] = field(default_factory=dict)
    precision: str = ""
    seconds: float = 0.0
    processor_seconds: float = 0.0
    error: str = ""
    wrong_request: bool = False


class _ManyRanks(Exception):
    """The trial wants several ranks."""


class _Recorded(Exception):
    """The ledger has the trial's run: it was killed between its last two writes."""


def run_trial(request: TrialRequest, own_process: bool = False) -> TrialResult | None:
    """Runs one trial; what goes wrong in it is in the result.

    Args:
        request: The trial.
        own_process: Whether this process was started for it, so that it may run on several ranks.

    Returns:
        None on ranks other than the first.
    """
    Path(request.folder).mkdir(parents=True, exist_ok=True)
    if not request.again:
        (Path(request.folder) / HISTORY).unlink(missing_ok=True)
    ledger: list[RunLedger] = []
    leads: list[bool] = []
    models: list[Any] = []

    def before(cli: Any) -> None:
        callback = next(c for c in cli.trainer.callbacks if isinstance(c, InstructMiningCallback))
        ledger.append(callback.ledger)
        leads.append(cli.trainer.is_global_zero)
        exported = cli.config["fit"].get("export")
        kept = exported is None or (Path(exported) / CONFIG).exists()
        if request.again and kept and _record(callback.ledger, request.run_id) is not None:
            raise _Recorded
        if cli.trainer.world_size > 1:
            if request.bands:
                remedy = "leave early_terminate out, or run each trial on one device (--trainer.devices=1)"
                cause = "trials on several ranks cannot be stopped early: the other ranks would wait for ever"
                raise RequestError(message("early_terminate", cause, remedy))
            if cli.trainer.num_nodes > 1:
                remedy = "run the trials by `wandb agent` under the cluster's launcher, or one node each"
                raise RequestError(message("trainer.num_nodes", "a sweep runs on one node", remedy))
            if not own_process:
                raise _ManyRanks
        models.append(cli.model)
        callback.refit = False  # once, after the sweep
        callback.given_run_id = request.run_id
        if request.precision in PRECISIONS and isinstance(cli.model, InstructTuningModule):
            cli.model.keep_precision(request.precision)
        if request.subset:
            cli.trainer.callbacks.append(SameData(request))
        cli.trainer.loggers = [*cli.trainer.loggers, TrialLogger(request)]

    start, processor = time.monotonic(), time.process_time()
    result = TrialResult("done")
    try:
        with quiet():
            run_fit(request.arguments, before=before)
    except _Recorded:
        pass
    except _ManyRanks:
        result = _in_own_process(request)
    except TrialStopped as stop:
        result = TrialResult("stopped", error=str(stop))
    except SystemExit as stop:
        result = TrialResult("failed", error=f"the fit exited with status {stop.code}")
    except Exception as error:
        ours = isinstance(error, InstructMiningError)
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        result = TrialResult("failed", error=text, wrong_request=isinstance(error, RequestError) and not ledger)
    finally:
        for model in models:
            return_base(model)
        _tidy()
    if leads and not leads[0]:
        return None
    result.seconds = round(time.monotonic() - start, 3)
    result.processor_seconds = result.processor_seconds or round(time.process_time() - processor, 3)
    if ledger:
        result.ledger = str(ledger[0].path)
        _outcome(result, request, ledger[0])
    return result


def _outcome(result: TrialResult, request: TrialRequest, ledger: RunLedger) -> None:
    """The metric and the losses of a trial that ran, from its files."""
    record = _record(ledger, request.run_id)
    if result.status == "done" and record is None:
        result.status, result.error = "failed", "the fit ended without a complete record"
    if record is not None:
        result.losses = {name: e.get("loss") for name, e in record.evaluation.items()}
        result.precision = str(record.numerics.get("precision", ""))
    try:
        history = parse_json((Path(request.folder) / HISTORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        history = []
    if history:
        result.value = float(history[-1]) if math.isfinite(history[-1]) else None
        worst = -math.inf if request.maximize else math.inf
        reached = {str(b): float(history[b]) for b in request.bands if b < len(history)}
        result.at_bands = {band: value if math.isfinite(value) else worst for band, value in reached.items()}


def _record(ledger: RunLedger, run_id: str) -> RunRecord | None:
    """The trial's complete run."""
    path = ledger.path / f"{run_id}.json"
    if not path.exists():
        return None
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError:  # torn: the run is made again
        return None
    record = RunRecord.from_json(value, str(path))
    return record if record.status == "complete" else None


def _in_own_process(request: TrialRequest) -> TrialResult:
    asked, answer = Path(request.folder) / "request.json", Path(request.folder) / "result.json"
    answer.unlink(missing_ok=True)
    write_json(asked, asdict(request))
    command = [sys.executable, "-m", "im_lightning.experiments.sweep.trial", str(asked), str(answer)]
    with (Path(request.folder) / "output.txt").open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if answer.exists():
        return TrialResult(**parse_json(answer.read_text(encoding="utf-8")))
    lines = Path(output.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = f": {lines[-1][:200]}" if lines else ""
    return TrialResult("failed", error=f"its process ended with status {status}{last} (see {output.name})")


def _tidy() -> None:
    """Leaves nothing of a trial to the next one of this process."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        try:
            wandb.finish()
        except Exception as error:  # its service is gone; the trial is in the ledger
            log(f"wandb: the trial's run could not be finished: {type(error).__name__}: {error}")
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone: a trial that nobody waits for would run twice."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str]) -> int:
    """Runs the trial of a request file; rank 0 writes the result."""
    end_with_parent()
    request = TrialRequest(**parse_json(Path(argv[0]).read_text(encoding="utf-8")))
    result = run_trial(request, own_process=True)
    if result is not None:
        write_json(argv[1], asdict(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
