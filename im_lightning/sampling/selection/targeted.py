"""Rows like those that are wanted: round robin over target examples by the cosine of embeddings.

Each target in turn takes the nearest row of the pool that is still there, until the budget is full (RDS+: Ivison et
al. 2025, "Large-Scale Data Selection for Instruction Tuning"). So every target counts alike, however many rows lie near
it. The vectors are those of the pool's `knn_<i>`: of the base model's mean hidden states (RDS+ weighs later tokens
more), or of an embedding model. Time O(m N d) for m targets; memory 320 MiB beside the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.hashing import digest_strings
from im_lightning.data.example import Example
from im_lightning.data.overlap.keys import EvaluationRows
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.sampling.draws.systematic import Rows

_SIMILARITIES = 1 << 26  # made at a time
_KEPT = 1 << 24  # nearest rows known at a time, of all targets together
_CHUNK = 1 << 14

Unit = Callable[[Rows], NDArray[np.float32]]
"""Unit vectors of n rows of the pool, float32 [n, d]."""


@dataclass(frozen=True)
class Targeting:
    """Examples of what is wanted."""

    target: str | None = None
    """Rows like those that are wanted, a file or data set, for method targeted; rows of the pool that share a prompt
    with one are left out."""
    target_model: str | None = None
    """The model that the pool's knn_<i> was scored by, for the vectors of targets that the score store lacks."""


@dataclass(frozen=True)
class Targets:
    """What rows are chosen for, m targets.

    Args:
        vectors: float32 [m, d], in the space of the pool's vectors, of any length but 0.
        shared: bool [N], rows of the pool that share a prompt with a target and are left out.
        rows: int64 [m], where each target stands among those given.
        digest: Of the targets' ids.
        in_evaluation: Targets left out, since evaluation sets have their prompt.
        without_vector: Targets left out, since they have no embedding.
    """

    vectors: NDArray[np.float32]
    shared: NDArray[np.bool_]
    rows: Rows
    digest: str
    in_evaluation: int = 0
    without_vector: int = 0

    def text(self) -> str:
        """What a reader must know, in one line."""
        lines = [f"{len(self.rows):,} targets", f"{int(self.shared.sum()):,} rows of the pool share a prompt with one"]
        without = {"share one with the evaluation": self.in_evaluation, "have no embedding": self.without_vector}
        lines += [f"{count:,} more targets {why} and are left out" for why, count in without.items() if count]
        return "; ".join(lines)


def targets_of(
    examples: Sequence[Example],
    table: ScoreTable,
    pool: Iterable[Example],
    evaluation: Sequence[Example] = (),
    model: str | None = None,
    cache_dir: str | None = None,
) -> Targets:
    """Targets for choosing from a scored pool, by the embedding that its `knn_<i>` was calculated from.

    Args:
        examples: Those wanted.
        table: Scores of the pool, N rows.
        pool: The N examples of the table.
        evaluation: Rows of evaluation sets; targets of the same prompt are left out.
        model: The base or embedding model behind the vectors, needed where the score store lacks those of the targets.
        cache_dir: The score store.

    Returns:
        The m targets that are left: `vectors` float32 [m, d], `rows` int64 [m] (positions in `examples`), `shared`
        bool [N] (rows of the pool that share a prompt with one); what `select_subset(targets=)` takes.

    Raises:
        RequestError: no target is left; the table has no `knn_<i>`; the model is not named, or is another one.
    """
    from im_lightning.sampling.selection.embeddings import embedding_identity, example_vectors, rows_with_vectors

    seen = EvaluationRows(evaluation)
    rows = np.array([at for at, one in enumerate(examples) if seen.shared(one) is None], dtype=np.int64)
    vectors = example_vectors([examples[at] for at in rows], embedding_identity(table), model, cache_dir)
    there = rows_with_vectors(vectors)
    if not there.any():
        cause = f"of its {len(examples)} rows {len(examples) - len(rows)} share a prompt with the evaluation, and "
        cause += f"{len(rows)} have no embedding"
        raise RequestError(message("--target", cause, "name examples of what is wanted that are evaluated nowhere"))
    kept = [examples[at] for at in rows[there]]
    wanted = EvaluationRows(kept)
    shared = np.array([wanted.shared(one) is not None for one in pool], dtype=np.bool_)
    counts = len(examples) - len(rows), int((~there).sum())
    return Targets(vectors[there], shared, rows[there], digest_strings(one.id for one in kept), *counts)


def round_robin(
    unit: Unit,
    targets: NDArray[np.float32],
    usable: NDArray[np.bool_],
    offer: Callable[[int], bool],
    full: Callable[[], bool],
    rng: np.random.Generator,
) -> dict[int, int]:
    """Offers rows to be taken, each target's nearest in turn, until it is full; a row not taken costs no turn.

    Args:
        unit: Unit vectors of rows of the pool.
        targets: float32 [m, d].
        usable: bool [N], rows that may be offered.
        offer: Whether a row is taken.
        full: Whether enough are.
        rng: Decides the order of the targets, and among rows equally near.

    Returns:
        Row taken → target it was taken for, in the order taken.
    """
    left, found = usable.copy(), dict[int, int]()
    turns, rank = cycle(rng.permutation(len(targets)).tolist()), rng.permutation(len(usable))
    lengths = np.sqrt(np.einsum("md,md->m", targets, targets))[:, None]
    target = next(turns)
    while not full() and left.any():
        nearest = [iter(line) for line in _nearest(unit, targets / lengths, np.flatnonzero(left), rank)]
        while not full():
            row = next((int(row) for row in nearest[target] if left[row] and _taken(int(row), left, offer)), None)
            if row is None:
                break  # all that was known of its neighbours is gone: look among the rows left
            found[row] = target
            target = next(turns)
    return found


def _taken(row: int, left: NDArray[np.bool_], offer: Callable[[int], bool]) -> bool:
    left[row] = False
    return offer(row)


def _nearest(unit: Unit, targets: NDArray[np.float32], rows: Rows, rank: Rows) -> list[NDArray[np.int32]]:
    """For each of m unit targets the nearest of these rows, nearest first; as many as may be known at a time."""
    keep = min(len(rows), max(64, _KEPT // len(targets)))
    step, out = max(1, _SIMILARITIES // len(rows)), list[NDArray[np.int32]]()
    for start in range(0, len(targets), step):
        part = targets[start : start + step]
        distance = np.empty((len(part), len(rows)), dtype=np.float32)
        for at in range(0, len(rows), _CHUNK):
            distance[:, at : at + _CHUNK] = -(part @ unit(rows[at : at + _CHUNK]).T)
        for line in distance:
            near = np.argpartition(line, keep - 1)[:keep] if keep < len(rows) else np.arange(keep)
            out.append(rows[near[np.lexsort((rank[rows[near]], line[near]))]].astype(np.int32))
    return out


def describe(targets: Targets, unit: Unit, found: dict[int, int]) -> dict[str, Any]:
    """What a report says of a choice: how many targets have a row, and how near their rows are."""
    at = np.array(list(found.values()), dtype=np.int64)
    vectors = targets.vectors[at].astype(np.float64)
    near = np.einsum("nd,nd->n", vectors, unit(np.array(list(found), dtype=np.int64)))
    cosine = near / np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    return {
        "targets": len(targets.rows),
        "served": len(set(found.values())),
        "mean_cosine": float(cosine.mean()) if len(cosine) else None,
        "in_evaluation": targets.in_evaluation,
        "rows_sharing_a_prompt": int(targets.shared.sum()),
    }
