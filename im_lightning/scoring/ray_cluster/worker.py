"""What a worker elsewhere does: a model loaded once, pieces of the pool in, values by content id out.

Nothing here knows of Ray, and nothing writes to the store: a worker may be killed at any time, and need not share a
file system with whoever asked. What it must share are the models, which is checked by their identities.
"""

from __future__ import annotations

import math
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import Progress, collected
from im_lightning.data.example import Example
from im_lightning.errors import DataError, InstructMiningError, RequestError, message
from im_lightning.indicators.base import Indicator
from im_lightning.scoring.columns import DistinctPool, VectorWork, Work
from im_lightning.scoring.passes.base import Pass
from im_lightning.scoring.settings import Setup
from im_lightning.scoring.store import Join, Store, StoredColumn, StoredVectors, Texts

if TYPE_CHECKING:
    from im_lightning.scoring.estimate import Estimate

DEATHS = 3  # so many workers may die over a piece
_ERRORS: dict[str, type[InstructMiningError]] = {kind.__name__: kind for kind in (RequestError, DataError)}


@dataclass(frozen=True)
class Order:
    """What a worker is to compute: a kind of pass, for these indicators (custom ones travel by value) and perhaps
    vectors ("embeddings", "gradients"; "" for none), with what all workers `shared` of it.
    """

    kind: type[Pass]
    indicators: list[Indicator]
    vectors: str
    setup: Setup
    identities: dict[str, str]  # digest of what the values of each indicator (and the vectors) must depend on
    environment: dict[str, str]  # variables to set before a model is loaded
    shared: bytes | None = None
    # called with a piece's number; how often it was begun by now, by any worker
    begin: Callable[[int], int] = lambda number: 1


@dataclass(frozen=True)
class Piece:
    """Some distinct examples, n of them, by name of the indicator which of them lack it (bool [n]), and `Pass.deal`."""

    number: int
    examples: list[Example]
    wanted: dict[str, NDArray[np.bool_]]
    deal: tuple[int, int] = (0, 1)


@dataclass
class Outcome:
    """What became of a piece; everything by content id."""

    number: int
    # by indicator, parts as `Store.append` takes them (ids, values, reasons, notes)
    values: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    vectors: list[tuple[Any, ...]] = field(default_factory=list)  # parts as `Store.append_vectors` takes them
    # by name, ids and reasons of examples left without a value in this run only, out of memory for instance
    passed_over: dict[str, dict[str, str]] = field(default_factory=dict)
    numerics: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name, how the values were computed
    tokens: int = 0  # tokens that went through the model
    parameters: float = math.nan  # of the model
    seconds: float = 0.0  # how long the piece took, `loading` the model before (with the first piece of a worker)
    loading: float = 0.0
    shared: bytes | None = None  # of `shared`, instead of values, and the tokens that were `trained` on for it
    trained: int = 0
    estimate: Estimate | None = None  # instead of values: what the piece would take, and the most `memory` used (bytes)
    memory: int = 0
    worker: tuple[str, int] = ("", 0)  # host and process
    lines: list[str] = field(default_factory=list)  # what is to be said to the person at the terminal
    error: tuple[str, str] | None = None  # kind and text of an error; nothing else holds then

    def check(self) -> None:
        """Raises the worker's error here."""
        if self.error is not None:
            kind, text = self.error
            raise _ERRORS.get(kind, InstructMiningError)(f"worker {self.worker[1]} on {self.worker[0]}: {text}")


class Tray(Store):
    """In-memory store for a worker: reports all other examples as cached, never writes."""

    def __init__(self, name: str, wanted: NDArray[np.bool_]) -> None:
        super().__init__(Path(tempfile.gettempdir()), name, {}, {})
        self.wanted = wanted
        self.parts: list[tuple[Any, ...]] = []

    def lookup(self, ids: Join, without: tuple[str, Sequence[str]] | None = None) -> StoredColumn:
        column = StoredColumn.empty(len(ids))
        column.present = ~self.wanted
        return column

    def lookup_vectors(self, ids: Join) -> StoredVectors:
        return StoredVectors(~self.wanted, np.empty((len(ids), 0), dtype=np.float32), [])

    def append(self, ids: Sequence[str], values: NDArray[np.float64], reasons: Texts, notes: Texts = ()) -> None:
        self.parts.append((list(ids), values, list(reasons), list(notes)))

    def append_vectors(self, ids: Sequence[str], vectors: NDArray[np.float32]) -> None:
        self.parts.append((list(ids), np.array(vectors)))

    def left(self, pool: DistinctPool, present: NDArray[np.bool_]) -> list[int]:
        """Positions that were wanted, are dealt with, and have nothing to be stored."""
        kept = {id for part in self.parts for id in part[0]}
        at = np.flatnonzero(self.wanted & present)
        return [int(i) for i, id in zip(at, pool.ids_at(at), strict=True) if id not in kept]


class Quiet(Progress):
    """Progress that nobody sees: the driver counts pieces."""

    def advance(self, amount: float = 1.0) -> None:
        self.done += amount


def estimate(order: Order, piece: Piece) -> Outcome:
    """What the pass of an order would take on a piece, measured here; computes nothing for the store."""
    from im_lightning.scoring.estimate import of_pass, peak_memory

    worker = Worker(order, load=False)
    outcome = Outcome(piece.number, worker=(socket.gethostname(), os.getpid()), error=worker.error)
    if outcome.error is None:
        with collected() as outcome.lines:
            try:
                outcome.estimate = of_pass(order.kind(*worker.targets(piece), order.setup))
            except InstructMiningError as error:
                outcome.error = (type(error).__name__, str(error))
        outcome.memory = peak_memory(order.setup.torch_device.type)
    return outcome


def shared(order: Order, piece: Piece) -> Outcome:
    """What all workers of an order are to share, made here."""
    worker = Worker(order, load=False)
    outcome = Outcome(piece.number, worker=(socket.gethostname(), os.getpid()), error=worker.error)
    if outcome.error is None:
        with collected() as outcome.lines:
            try:
                each = order.kind(*worker.targets(piece), order.setup)
                outcome.shared, outcome.trained = each.make_shared(), each.trained
            except InstructMiningError as error:
                outcome.error = (type(error).__name__, str(error))
    return outcome


class Worker:
    """Keeps the model of an order loaded (unless not to `load` it), and computes pieces; what `map_batches` takes."""

    def __init__(self, order: Order, load: bool = True) -> None:
        os.environ.update(order.environment)
        self.order, self.loading = order, 0.0
        self.error: tuple[str, str] | None = None
        with collected() as self.lines:
            start = time.monotonic()
            try:
                self._check()
                if load:
                    nothing = Piece(-1, [], {name: np.zeros(0, dtype=np.bool_) for name in order.identities})
                    self.each = order.kind(*self.targets(nothing), order.setup)
                    self.each.shared = order.shared
                    self.each.load()
            except InstructMiningError as error:
                self.error = (type(error).__name__, str(error))
            self.loading = time.monotonic() - start

    def __call__(self, batch: dict[str, NDArray[np.object_]]) -> Iterator[dict[str, NDArray[np.object_]]]:
        """Outcomes of the pieces in a batch, each a batch of its own."""
        for piece in unpacked(batch):
            yield carried(self.compute(piece))

    def compute(self, piece: Piece) -> Outcome:
        """Computes one piece."""
        outcome = Outcome(piece.number, worker=(socket.gethostname(), os.getpid()), error=self.error)
        outcome.lines, self.lines = self.lines, []
        outcome.loading, self.loading = self.loading, 0.0
        if self.error is None and self.order.begin(piece.number) > DEATHS:
            cause = f"{DEATHS} workers died over the same {len(piece.examples):,} rows"
            remedy = "give workers more memory, fewer tokens with --batch-tokens, or fewer workers per machine"
            outcome.error = ("", message("scoring", cause, remedy))
        if outcome.error is not None:
            return outcome
        start, before, each = time.monotonic(), self.each.tokens, self.each
        each.pool, each.works, each.vectors = pool, works, vectors = self.targets(piece)
        each.deal = piece.deal
        with collected() as lines:
            try:
                each.work([each.rows()], Quiet("", len(pool), "rows"))
                each.flush()
            except InstructMiningError as error:
                outcome.error = (type(error).__name__, str(error))
            except Exception as error:  # of an indicator or a model: told where it can be read, not by Ray's wrapping
                cause = f"{type(error).__name__}: {error}"
                outcome.error = ("", message(f"scoring {each.label}", cause, "see the lines of the worker above"))
                lines += traceback.format_exc().splitlines()
        outcome.lines += lines
        if outcome.error is not None:
            return outcome
        setup = self.order.setup
        for work in works:
            _hand_over(outcome, work.name, work)
            outcome.numerics[work.name] = setup.numerics_of(work.indicator)
        if vectors is not None:
            _hand_over(outcome, vectors.name, vectors)
            _, outcome.numerics[vectors.name] = setup.of_vectors(vectors.name)
        outcome.tokens, outcome.seconds = each.tokens - before, time.monotonic() - start
        outcome.parameters = each.parameters
        return outcome

    def targets(self, piece: Piece) -> tuple[DistinctPool, list[Work], VectorWork | None]:
        """A pool of the piece's examples, and what is to be computed of them."""
        pool = DistinctPool(piece.examples)
        works = [Work(pool, one, Tray(one.name, piece.wanted[one.name])) for one in self.order.indicators]
        name = self.order.vectors
        return pool, works, VectorWork(pool, Tray(name, piece.wanted[name]), name) if name else None

    def _check(self) -> None:
        """Refuses to compute anything with other models or code than those that the values will be stored under."""
        found = identities(self.order.indicators, self.order.vectors, self.order.setup)
        for name, digest in self.order.identities.items():
            if found[name] != digest:
                cause = "the model or the im_lightning here is another than where the scoring was started"
                raise RequestError(message(name, cause, "give all machines the same checkpoints and the same version"))


def _hand_over(outcome: Outcome, name: str, target: Work | VectorWork) -> None:
    tray, pool, reasons = target.store, target.pool, target.column.reasons if isinstance(target, Work) else []
    if not isinstance(tray, Tray):
        raise TypeError(f"{name} of a worker has a store of its own")
    if isinstance(target, Work):
        outcome.values[name] = tray.parts
    else:
        outcome.vectors = tray.parts
    left = tray.left(pool, ~target.missing)
    outcome.passed_over[name] = {pool.ids[i].as_py(): (reasons[i] if reasons else "") or "" for i in left}


def identities(indicators: Sequence[Indicator], vectors: str, setup: Setup) -> dict[str, str]:
    """Digest of what the values of each indicator (and the vectors of that name) depend on, on this machine."""
    anew = replace(setup)  # the models may have changed since it last looked at them
    found = {one.name: digest_json(anew.identity_of(one)) for one in indicators}
    return {**found, vectors: digest_json(anew.of_vectors(vectors)[0])} if vectors else found


def carried(value: Any) -> dict[str, NDArray[np.object_]]:
    """A batch of one row that holds a piece or an outcome, for Ray Data to carry."""
    row = np.empty(1, dtype=object)
    row[0] = value
    return {"carried": row}


def unpacked(batch: dict[str, NDArray[np.object_]]) -> list[Any]:
    """The pieces or outcomes in a batch."""
    return list(batch["carried"])
