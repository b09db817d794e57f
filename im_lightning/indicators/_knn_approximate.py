"""Candidates for nearest neighbours in pools too large for every pair: an inverted file (faiss) with measured recall.

Vectors are grouped around centroids and a query looks into the nearest groups only. Codes are float16: 2 d bytes per
vector are alive beside the vectors themselves, which may be a memory map. How many groups are looked into is doubled
until the recall, measured on a sample searched exactly, reaches `RECALL`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.optional import require
from im_lightning._utils.progress import log, progress
from im_lightning.indicators._knn_exact import Candidates, Mask, Vectors, nearest_among, rows_of

RECALL = 0.95
_SAMPLE = 512
_TRAINING = 40  # vectors per group to place the centroids by
_MOST_PROBES = 256
_CHUNK = 4096


def approximately_nearest(
    queries: Vectors, vectors: Vectors, own: NDArray[np.int64], keep: int, rank: int, alive: Mask = None
) -> Candidates:
    """Candidates like those of `neighbours.nearest_among`, some perhaps missed; logs the recall of the first `rank`."""
    faiss = require("faiss", "ann", f"neighbours among {len(vectors):,} examples")
    positions = np.arange(len(vectors)) if alive is None else np.flatnonzero(alive)
    groups = max(1, min(int(4 * np.sqrt(len(positions))), len(positions) // _TRAINING))
    rng = np.random.default_rng(0)
    sample = np.sort(rng.permutation(len(positions))[: groups * _TRAINING])
    width = vectors.shape[1]
    codes, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(width), width, groups, codes, metric)
    index.train(np.asarray(vectors[positions[sample]], dtype=np.float32))
    for start in range(0, len(vectors), 1 << 15):
        part = rows_of(vectors, start, start + (1 << 15))
        here = np.arange(start, start + len(part))
        if alive is not None:
            part, here = part[alive[here]], here[alive[here]]
        index.add_with_ids(part, here)
    recall = _choose_probes(index, queries, vectors, own, rank, alive)
    log(
        f"neighbours among {len(positions):,} vectors: approximate, {index.nprobe} of {groups:,} groups looked into, "
        f"recall {recall:.3f} on {min(_SAMPLE, len(queries))} rows searched exactly"
    )
    found = Candidates(len(queries), keep)
    with progress("neighbours", len(queries)) as bar:
        for start in range(0, len(queries), _CHUNK):
            rows = rows_of(queries, start, start + _CHUNK)
            at = slice(start, start + len(rows))
            found.similarity[at], found.index[at] = _search(index, rows, own[at], keep)
            bar.advance(len(rows))
    return found


def _search(index: Any, rows: NDArray[np.float32], own: NDArray[np.int64], keep: int) -> tuple:
    """Similarities and positions [n, keep] without the query itself; -1 where there are fewer."""
    rows = np.nan_to_num(rows)
    similarity, position = index.search(rows, keep + 1)
    similarity = np.where((position == own[:, None]) | (position < 0), -np.inf, similarity)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :keep]
    similarity = np.take_along_axis(similarity, order, axis=1)
    position = np.where(np.isneginf(similarity), -1, np.take_along_axis(position, order, axis=1))
    return similarity, position.astype(np.int32)


def _choose_probes(
    index: Any, queries: Vectors, vectors: Vectors, own: NDArray[np.int64], rank: int, alive: Mask
) -> float:
    """Sets how many groups are looked into; the share of the sample's `rank` nearest that are then found."""
    sample = np.sort(np.random.default_rng(1).permutation(len(queries))[:_SAMPLE])
    rows = np.asarray(queries[sample], dtype=np.float32)
    sample, rows = sample[np.isfinite(rows).all(axis=1)], rows[np.isfinite(rows).all(axis=1)]
    exact = nearest_among(rows, vectors, own[sample], rank, "cpu", alive)
    lowest = exact.floor[:, None] - 1e-6  # one equal neighbour is as good as another
    recall, probes = 0.0, 8
    while True:
        index.nprobe = min(probes, index.nlist)
        _, position = _search(index, rows, own[sample], rank)
        near = np.asarray(vectors[position.reshape(-1)], dtype=np.float32).reshape(*position.shape, -1)
        similarity = np.where(position < 0, -np.inf, np.einsum("rkd,rd->rk", near, rows))
        recall = float((similarity >= lowest).mean()) if len(rows) else 1.0
        if recall >= RECALL or probes >= min(_MOST_PROBES, index.nlist):
            return recall
        probes *= 2
