"""Passes over the examples on a Ray cluster, or on this machine's cores by Ray: for pools that outgrow one machine.

Ray Data carries pieces of the pool to actors that keep a pass's model loaded, and values by content id back. Whoever
asked writes them to the store: resume is the store's, as without Ray, and workers need not see its folder. A worker
that dies is replaced and its pieces are computed again; their values are taken once.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.files import atomic_path
from im_lightning._utils.progress import log, progress
from im_lightning.data.tokenization import TEMPLATES
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.indicators.base import Scores
from im_lightning.scoring.columns import Clock
from im_lightning.scoring.estimate import SAMPLE_ROWS, Estimate
from im_lightning.scoring.passes.base import CHUNK, Pass, TextPass, TokenPass
from im_lightning.scoring.plan import ScoringPlan
from im_lightning.scoring.ray_cluster.worker import (
    DEATHS,
    Order,
    Outcome,
    Piece,
    Worker,
    estimate,
    identities,
    shared,
    unpacked,
)
from im_lightning.scoring.settings import Engine, Setup

TASKS_PER_WORKER = 2  # at least, so that no worker idles
ROWS_PER_WORKER = 32  # for fewer, loading another model does not pay
_MODELS = ("embedding_model", "reward_model", "unieval_model")
_ENVIRONMENT = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM")


Task = tuple[NDArray[np.int64], tuple[int, int]]
"""Rows of a pass, and which share of their batches: the k-th (from 0) of n."""


def tasks_of(each: Pass, rows: NDArray[np.int64], workers: int) -> list[Task]:
    """The work in tasks, some for each worker: fewer pieces than that are shared out by batches, where the pass can, or
    cut further, where values do not depend on the rows beside."""
    pieces, wanted = each.pieces(rows), workers * TASKS_PER_WORKER
    if each.deals:
        shares = math.ceil(wanted / len(pieces))
        return [(piece, (k, shares)) for piece in pieces for k in range(shares)]
    if isinstance(each, TextPass | TokenPass):
        size = max(CHUNK, math.ceil(len(rows) / wanted))
        pieces = [piece[start : start + size] for piece in pieces for start in range(0, len(piece), size)]
    return [(piece, (0, 1)) for piece in pieces]


class RayEngine:
    """Runs passes on the Ray that this process is connected to, by `workers` actors each; see `ray_engine`."""

    def __init__(self, device: str = "auto", workers: int | None = None) -> None:
        import ray

        total = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.cores = [int(one["CPU"]) for one in total if one.get("CPU", 0) >= 1] or [1]
        self.gpus = sum(int(one.get("GPU", 0)) for one in total)
        self.workers = workers
        self.device = ("cuda" if self.gpus else "cpu") if device == "auto" else device
        if self.device.startswith("cuda") and not self.gpus:
            cause = "the Ray cluster has no GPU"
            raise RequestError(message(f"--device {device}", cause, "name cpu, or start Ray on machines with GPUs"))
        log(f"ray: {len(total)} machine(s), {sum(self.cores)} cores, {self.gpus} GPUs; models on {self.device}")

    def run(self, each: Pass) -> None:
        """As `Pass.run`, on the cluster.

        Raises:
            RequestError: a model cannot be used on a worker; InstructMiningError: the work failed there, or Ray did.
        """
        start = time.monotonic()
        rows = each.rows()
        count, resources = self._actors(each, len(rows))
        self._share(each, resources)
        tasks = tasks_of(each, rows, count)
        count = min(count, len(tasks))
        said: set[str] = set()
        busy = 0.0
        with ExitStack() as stack:
            stack.callback(each.flush)
            bar = stack.enter_context(progress(f"scoring {each.label} on {count} Ray workers", len(rows), "rows"))
            outcomes = stack.enter_context(closing(self._outcomes(each, tasks, count, resources)))
            clock = Clock()
            for outcome in outcomes:
                for line in outcome.lines:
                    if line not in said:
                        log(line)
                said.update(outcome.lines)
                outcome.check()
                piece, (_, shares) = tasks[outcome.number]
                take(each, piece, outcome)
                each.tokens += outcome.tokens
                each.parameters = outcome.parameters
                each.loading = max(each.loading, outcome.loading)
                busy += outcome.seconds + outcome.loading
                bar.advance(len(piece) / shares)
                if clock.due():
                    each.flush()
        if lost := len(each.rows()):
            cause = f"{lost} rows got no value"
            raise InstructMiningError(message(f"scoring {each.label} on Ray", cause, "start again"))
        each.seconds = time.monotonic() - start
        rate = f", {each.tokens / each.seconds:,.0f} tokens/s" if each.tokens else ""
        log(
            f"ray: {each.label}: {len(rows):,} rows in {each.seconds:,.1f} s, {len(rows) / each.seconds:,.0f} rows/s"
            f"{rate}; {count} workers, busy {busy / (count * each.seconds):.0%} of the time"
        )

    def _share(self, each: Pass, resources: dict[str, Any]) -> None:
        """Gives the pass what all its workers share: what is kept here, else what one worker makes now."""
        import ray

        if each.kept is None:
            return
        each.shared = each.read_kept()
        if each.shared is None:
            try:
                task = ray.remote(max_retries=DEATHS, **resources)(shared)
                outcome = ray.get(task.remote(self.order(each), piece_of(each, 0, each.rows()[:1])))
            except ray.exceptions.RayError as error:
                raise InstructMiningError(_told(each.label, error)) from error
            for line in outcome.lines:
                log(line)
            outcome.check()
            each.shared = outcome.shared or b""
            with atomic_path(each.kept) as temporary:
                temporary.write_bytes(each.shared)
            each.trained = outcome.trained

    def estimate(self, plan: ScoringPlan) -> tuple[list[Estimate], int]:
        """As `estimate.estimate`, measured by one worker per pass on a sample, for all workers together."""
        import ray

        found, memory = [], 0
        for each in plan.passes:
            rows = each.rows()
            count, resources = self._actors(each, len(rows))
            sample = np.sort(np.random.default_rng(0).choice(rows, min(SAMPLE_ROWS, len(rows)), replace=False))
            try:
                task = ray.remote(max_retries=DEATHS, **resources)(estimate)
                outcome = ray.get(task.remote(self.order(each), piece_of(each, 0, sample)))
            except ray.exceptions.RayError as error:
                raise InstructMiningError(_told(each.label, error)) from error
            outcome.check()
            if (one := outcome.estimate) is None:
                raise TypeError("a worker estimated nothing and named no error")
            scale = len(rows) / len(sample)
            seconds = one.loading + (one.seconds - one.loading) * scale / count
            how = f"{one.how}, on one of {count} workers"
            found.append(
                Estimate(one.label, len(rows), round(one.tokens * scale), seconds, how, one.loading, one.flops * scale)
            )
            memory = max(memory, outcome.memory)
        return found, memory

    def _actors(self, each: Pass, rows: int) -> tuple[int, dict[str, Any]]:
        """How many actors for a pass, and what each takes of a machine."""
        on_gpus = self.device != "cpu" and not isinstance(each, TextPass | TokenPass)
        most = self.gpus if on_gpus else sum(self.cores)
        count = max(1, min(self.workers or most, most, math.ceil(rows / ROWS_PER_WORKER)))
        if on_gpus:
            return count, {"num_cpus": 1, "num_gpus": 1}
        if self.workers is None:
            return count, {"num_cpus": 1}
        sizes = range(max(self.cores), 0, -1)  # as many cores each as the machines have for so many workers
        return count, {"num_cpus": next(k for k in sizes if sum(c // k for c in self.cores) >= count)}

    def order(self, each: Pass) -> Order:
        """What the workers of a pass are told."""
        driver, device = each.setup, "cpu" if isinstance(each, TextPass | TokenPass) else self.device
        encoding = driver.encoding
        names: dict[str, Any] = {name: _absolute(getattr(driver.models, name)) for name in _MODELS}
        template = encoding.template if encoding.template in TEMPLATES else _absolute(encoding.template)
        own: dict[str, Any] = {
            "model": _absolute(encoding.model),
            "template": template,
            "cache_dir": str(driver.root.absolute()),
        }
        setup = replace(
            driver,
            encoding=replace(encoding, **own),
            models=replace(driver.models, **names),
            numerics=replace(driver.numerics, device=device),
            engine=Engine(),
            target_rows=None if driver.targets is None else driver.targets.rows,
        )
        indicators, vectors = [work.indicator for work in each.works], each.vectors.name if each.vectors else ""
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        told = identities(indicators, vectors, driver)
        return Order(type(each), indicators, vectors, setup, told, environment, each.shared)

    def _outcomes(
        self, each: Pass, tasks: list[Task], count: int, resources: dict[str, Any]
    ) -> Generator[Outcome, None, None]:
        """The outcomes of the tasks as they come."""
        import ray
        import ray.data

        pieces = [{"carried": piece_of(each, number, *task)} for number, task in enumerate(tasks)]
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        order = replace(self.order(each), begin=_counter())
        with ray.data.DataContext.current(context):
            done = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
                Worker,
                fn_constructor_args=(order,),
                compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=count, max_size=count),
                batch_size=None,
                batch_format="numpy",
                **resources,
            )
        try:
            for batch in done.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                yield from unpacked(batch)
        except ray.exceptions.RayError as error:
            raise InstructMiningError(_told(each.label, error)) from error


class _Begun:
    """How often each piece was begun: Ray tries one whose worker died again, for ever if nobody counts."""

    def __init__(self) -> None:
        self.count: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        self.count[number] += 1
        return self.count[number]


def _counter() -> Callable[[int], int]:
    import ray

    actor = ray.remote(num_cpus=0)(_Begun).remote()
    return partial(_begin, actor)


def _begin(actor: Any, number: int) -> int:
    import ray

    return ray.get(actor.begin.remote(number))


def piece_of(each: Pass, number: int, rows: NDArray[np.int64], deal: tuple[int, int] = (0, 1)) -> Piece:
    """The rows of a pass as a worker gets them."""
    wanted = {work.name: work.missing[rows] for work in each.works}
    if each.vectors is not None:
        wanted[each.vectors.name] = each.vectors.missing[rows]
    return Piece(number, each.examples(rows), wanted, deal)


def take(each: Pass, rows: NDArray[np.int64], outcome: Outcome) -> None:
    """Puts what a worker found for `rows` into the pass's works: only what is missing, so nothing comes twice."""
    place = dict(zip(each.pool.ids_at(rows), rows.tolist(), strict=True))
    for work in each.works:
        work.computed_as(outcome.numerics[work.name])
        for ids, values, reasons, notes in outcome.values[work.name]:
            at = np.array([place[id] for id in ids], dtype=np.int64)
            new = np.flatnonzero(work.missing[at])
            work.put(at[new], Scores(values[new], [reasons[i] for i in new], [notes[i] for i in new] if notes else []))
        for id, reason in outcome.passed_over[work.name].items():
            if work.missing[place[id]]:
                work.pass_over(np.array([place[id]]), reason)
    if each.vectors is not None:
        each.vectors.computed_as(outcome.numerics[each.vectors.name])
        for ids, vectors in outcome.vectors:
            at = np.array([place[id] for id in ids], dtype=np.int64)
            new = np.flatnonzero(each.vectors.missing[at])
            each.vectors.put(at[new], vectors[new])
        passed = [place[id] for id in outcome.passed_over[each.vectors.name]]
        each.vectors.pass_over(np.array([at for at in passed if each.vectors.missing[at]], dtype=np.int64))


def _absolute(model: str | None) -> str | None:
    """A folder or file by its whole path: workers stand elsewhere. Hub ids stay."""
    path = Path(model).expanduser() if model else None
    return str(path.resolve()) if path is not None and path.exists() else model


def _told(label: str, error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    remedy = "look at Ray's logs of the worker; what was finished is in the store, so start again where that is mended"
    return message(f"scoring {label} on Ray", f"{type(error).__name__}: {lines[-1][:300]}", remedy)


@contextmanager
def ray_engine(setup: Setup) -> Iterator[RayEngine]:
    """Connects to Ray: the one this process already uses, the cluster at the engine's address (or $RAY_ADDRESS), else
    one of this machine's cores, which ends with the block.

    Raises:
        RequestError: no cluster answers.
    """
    import ray

    asked = setup.engine
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))  # where Ray tells of workers that died
        for name in ("ray", "ray.data"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if not ray.is_initialized():
            _connect(ray, asked.ray_address or os.environ.get("RAY_ADDRESS") or "local", asked.ray_workers)
            stack.callback(ray.shutdown)
        yield RayEngine(setup.numerics.device, asked.ray_workers)


def _connect(ray: Any, address: str, workers: int | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == "local":
            here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            ray.init(address, num_cpus=here, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        else:
            _probe(address)
            ray.init(address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError, SystemExit) as error:
        cause = f"no Ray answers there ({(str(error).splitlines() or [type(error).__name__])[0][:200]})"
        remedy = "check it with `ray status --address …`, or leave it out to use this machine's cores"
        raise RequestError(message(f"--ray-address {address}", cause, remedy)) from error


def _probe(address: str) -> None:
    """Ray tries a wrong address for two minutes and then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
