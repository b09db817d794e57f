"""Passes over the examples: each loads its model once, gives every indicator that reads it its features, frees it.

A pass takes the distinct examples that lack a value. Its results reach the store as they come: whatever ends a pass,
what was finished is written.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.progress import Progress, progress
from im_lightning.indicators.base import Features
from im_lightning.indicators.knn import unit_rows
from im_lightning.models.batching import release_memory
from im_lightning.models.cost import operations
from im_lightning.models.device import Precision
from im_lightning.scoring.columns import Clock, DistinctPool, Target, VectorWork, Work
from im_lightning.scoring.settings import Setup

CHUNK = 1024
TEXT_PIECE = 16 * CHUNK
FIRST_TEXTS = 64
"""Taken at once at the beginning: an own indicator may take seconds for each."""


class Pass(ABC):
    """One sweep over the examples of a `pool` that lack something: the indicators of `works`, and perhaps `vectors`."""

    deals = False  # whether the batches of a piece can be shared out
    kept: Path | None = None  # where that is kept which all workers must have alike, if there is such a thing

    def __init__(self, pool: DistinctPool, works: Sequence[Work], vectors: VectorWork | None, setup: Setup) -> None:
        self.pool, self.works, self.vectors, self.setup = pool, works, vectors, setup
        self.deal = (0, 1)  # the k-th (from 0) of n who share the batches of the same pieces
        self.label = ", ".join([work.name for work in works] + ([vectors.name] if vectors else []))  # what it computes
        self.shared: bytes | None = None  # that thing, once it is known
        self.seconds = self.loading = 0.0  # how long it took, and how much of it the loading of the model
        self.tokens = 0  # that went through a model, padding left out
        self.flops = 0.0  # useful floating-point operations of the model; 0 where they are not known
        self.width = 0  # of the model, for a matmul rate to compare with
        self.parameters = math.nan  # of the model, as `models.cost` counts them; NaN where they are not known
        self.trained = 0  # tokens that the model was trained on before

    def operations(self, tokens: int) -> float:
        """Floating-point operations of the model over so many tokens, with what it was trained on before."""
        return operations(self.parameters, read=tokens, trained=self.trained)

    def targets(self) -> Iterable[Target]:
        return [*self.works, *([self.vectors] if self.vectors else [])]

    def rows(self) -> NDArray[np.int64]:
        """Distinct examples that lack a value of this pass."""
        missing = np.zeros(len(self.pool), dtype=np.bool_)
        for target in self.targets():
            missing |= target.missing
        return np.flatnonzero(missing)

    def run(self) -> None:
        """Computes and stores what is missing; frees its model; writes what is finished even when interrupted."""
        start = time.monotonic()
        rows = self.rows()
        with ExitStack() as stack:
            stack.callback(self.free)
            stack.callback(self.flush)
            self.load()
            self.loading = time.monotonic() - start
            bar = stack.enter_context(progress(f"scoring {self.label}", len(rows), "rows"))
            self.work(self.pieces(rows), bar)
        self.seconds = time.monotonic() - start

    def flush(self) -> None:
        for target in self.targets():
            target.flush()

    def load(self) -> None:  # noqa: B027 - a pass without a model has nothing to load
        """Loads what the pass needs."""

    def read_kept(self) -> bytes | None:
        """What is kept, where it is there and sound."""
        return None

    def make_shared(self) -> bytes | None:
        """What all workers must have alike; None where there is nothing."""
        return None

    def free(self) -> None:  # noqa: B027
        """Lets go of it, so that the next pass has the memory to itself."""

    def pieces(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The rows in pieces whose batches hold no other rows: each may be worked on elsewhere, for the same values."""
        return _cut(rows, CHUNK)

    @property
    def number_format(self) -> Precision:
        """Of the model's weights."""
        return self.setup.number_format

    @abstractmethod
    def work(self, pieces: Sequence[NDArray[np.int64]], bar: Progress) -> None:
        """Computes the distinct examples of some `pieces` and puts the results into the works."""

    def examples(self, rows: NDArray[np.int64]) -> list:
        return [self.pool.examples[i] for i in rows]


class TextPass(Pass):
    """Indicators of the text alone."""

    def pieces(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        return _cut(rows, TEXT_PIECE)

    def work(self, pieces: Sequence[NDArray[np.int64]], bar: Progress) -> None:
        clock, size = Clock(), FIRST_TEXTS
        for rows in pieces:
            start = 0
            while start < len(rows):
                chunk = rows[start : start + size]
                begun = time.monotonic()
                for work in self.works:
                    here = chunk[work.missing[chunk]]
                    if len(here):
                        work.put(here, work.indicator.compute(Features(self.examples(here))))
                bar.advance(len(chunk))
                start += len(chunk)
                seconds = time.monotonic() - begun
                if seconds < 0.5:
                    size = min(2 * size, TEXT_PIECE)  # fast indicators are faster on many texts at once
                elif seconds > 2.0:
                    size = max(1, size // 2)  # an interrupt loses what slow ones have in hand
                if clock.due():
                    self.flush()


class TokenPass(Pass):
    """Indicators of the tokenizer alone; no model is loaded."""

    def load(self) -> None:
        self.tokenizer, self.template = self.setup.tokenizer_and_template()

    def work(self, pieces: Sequence[NDArray[np.int64]], bar: Progress) -> None:
        from im_lightning.data.tokenization import encode_examples

        clock = Clock()
        for chunk in pieces:
            examples = self.examples(chunk)
            encoded = encode_examples(examples, self.tokenizer, self.template, self.setup.encoding.max_length)
            for work in self.works:
                here = np.flatnonzero(work.missing[chunk])
                if len(here):
                    features = Features([examples[i] for i in here], [encoded[i] for i in here])
                    work.put(chunk[here], work.indicator.compute(features))
            bar.advance(len(chunk))
            if clock.due():
                self.flush()


class EmbeddingPass(Pass):
    """One vector per example by a sentence-transformers model."""

    _embedder: object = None

    def load(self) -> None:
        from im_lightning.models.device import model_work
        from im_lightning.models.embedding import load_embedder

        self._embedder = embedder = load_embedder(
            str(self.setup.models.embedding_model), device=self.setup.torch_device
        )
        work = model_work(getattr(embedder[0], "auto_model", embedder[0]))
        self.parameters = math.nan if work is None else work.parameters
        embedder[0].register_forward_pre_hook(self._count)

    def _count(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Tokens of a batch as the model gets it, padding left out."""
        found = inputs[0]
        self.tokens += int(found["attention_mask"].sum() if "attention_mask" in found else found["input_ids"].numel())

    def free(self) -> None:
        self._embedder = None
        release_memory()

    def embed(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Unit vectors [n, d] of the distinct examples `rows`."""
        from im_lightning.models.embedding import embed, embedding_text

        texts = [embedding_text(example, self.setup.models.embed) for example in self.examples(rows)]
        return unit_rows(embed(self._embedder, texts))  # type: ignore[arg-type]

    def work(self, pieces: Sequence[NDArray[np.int64]], bar: Progress) -> None:
        clock, vectors = Clock(), self.vectors
        if vectors is None:
            return
        for chunk in pieces:
            vectors.put(chunk, self.embed(chunk))
            bar.advance(len(chunk))
            if clock.due():
                self.flush()


def _cut(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
