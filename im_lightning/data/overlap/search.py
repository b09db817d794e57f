"""`find_overlaps`: every row of a pool that evaluation rows give away, with how, and which row it is like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.progress import log
from im_lightning.data.example import Example
from im_lightning.data.loading import LoadedRow
from im_lightning.data.overlap.keys import EXCLUSIONS, EvaluationRows, turns_of
from im_lightning.data.overlap.near import NearRows
from im_lightning.errors import RequestError, message

KINDS = (*EXCLUSIONS, "near", "semantic")
"""From the strongest on; a row of the pool is counted in the first that holds."""

CHUNK = 1 << 14

Embed = Callable[[Sequence[Example]], NDArray[np.float32]]
"""Unit vectors of n examples, float32 [n, d]."""


@dataclass(frozen=True)
class Overlap:
    """One row of the pool, and the evaluation row that it is like."""

    kind: str  # one of `KINDS`
    row: int  # of the pool, from 0
    place: str  # file:line
    evaluation_row: int  # among the evaluation rows, from 0
    evaluation_place: str
    similarity: float  # Jaccard of shingles for "near", cosine for "semantic", else 1
    text: str  # prompt and response of the row
    evaluation_text: str


def find_overlaps(
    pool: Iterable[LoadedRow],
    evaluation: Sequence[LoadedRow],
    near: float | None = 0.8,
    embed: Embed | None = None,
    semantic: float = 0.9,
) -> Iterator[Overlap]:
    """Rows of the pool that are in the evaluation sets, in the order of the pool; the pool is read once, in parts.

    Args:
        pool: Its rows (`iter_rows`), of which some thousands are held at a time.
        evaluation: Rows of all evaluation sets.
        near: Least Jaccard similarity of the shingles; None for no such search. No pair above it is missed.
        embed: Vectors of examples; None for no semantic search.
        semantic: Least cosine of them.

    Raises:
        RequestError: a similarity out of range.
    """
    if embed is not None and not 0 < semantic <= 1:
        cause = "a cosine from which rows are alike lies above 0, and at 1 at most"
        raise RequestError(message(f"semantic={semantic}", cause, "give such as 0.9"))
    asked = [one.example for one in evaluation]
    there = EvaluationRows(asked)
    nearly = None if near is None else NearRows([turns_of(one) for one in asked], near)
    vectors = None if embed is None else embed(asked)
    if vectors is not None and (blank := int(np.isnan(vectors).any(axis=1).sum())):
        log(f"{blank:,} of {len(asked):,} evaluation rows have no vector, and are not compared by meaning")
    rows, start = iter(pool), 0
    while part := list(islice(rows, CHUNK)):
        examples = [one.example for one in part]
        found: list[tuple[str, int, float] | None] = [None] * len(part)
        turns = [turns_of(example) for example in examples]
        for at, example in enumerate(examples):
            if (shared := there.shared(example, turns[at])) is not None:
                found[at] = (*shared, 1.0)
        if nearly is not None:
            _add(found, "near", *nearly.search(turns))
        if embed is not None and vectors is not None:
            _add(found, "semantic", *_alike(embed, vectors, examples, found, semantic))
        for at, one in enumerate(found):
            if one is not None:
                kind, other, similarity = one
                ours, theirs = part[at], evaluation[other]
                texts = (f"{e.prompt}\n{e.response}" for e in (ours.example, theirs.example))
                yield Overlap(kind, start + at, ours.place, other, theirs.place, similarity, *texts)
        start += len(part)


def _add(found: list[Any], kind: str, rows: NDArray[np.int64], similarity: NDArray[np.float64]) -> None:
    """Enters what was found, where nothing stronger was; −1 is none."""
    for at in np.flatnonzero(rows >= 0).tolist():
        if found[at] is None:
            found[at] = (kind, int(rows[at]), float(similarity[at]))


def _alike(
    embed: Embed, vectors: NDArray[np.float32], examples: Sequence[Example], found: list[Any], least: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The evaluation row of the greatest cosine for each example without a finding; −1 below `least`."""
    rows, similarity = np.full(len(examples), -1, dtype=np.int64), np.zeros(len(examples))
    left = [at for at, one in enumerate(found) if one is None]
    if left and len(vectors):
        cosines = np.nan_to_num(embed([examples[at] for at in left]) @ vectors.T, nan=-1.0)  # a text without a vector
        best = cosines.argmax(axis=1)
        value = cosines[np.arange(len(left)), best]
        rows[left], similarity[left] = np.where(value >= least, best, -1), value
    return rows, similarity
