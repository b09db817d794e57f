"""Candidates for nearest neighbours among unit vectors, exact or approximate, without an N x N matrix.

On a CPU the similarities are made once per *pair* of blocks (S of rows I and J serves both), and only entries above a
row's worst candidate so far are looked at: the maxima of groups of 32 entries tell where those are. Elsewhere torch
makes them a block at a time. What is alive at once is a block of similarities and the candidates, whatever N is; the
vectors may be a memory map of float16 or float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32] | NDArray[np.float16]
Mask = NDArray[np.bool_] | None

BLOCK = 2048  # rows and columns: 16 MiB of similarities on a CPU, within its caches
_GROUP = 32
_DEVICE_COLUMNS = 16384


class Candidates:
    """The `keep` most similar vectors of each of n queries, found so far.

    Attributes:
        similarity: float32 [n, keep], in no order; -inf where fewer are known.
        index: int32 [n, keep], their positions; -1 where fewer are known.
        floor: float32 [n], the smallest similarity kept: no other vector seen is above it.
    """

    def __init__(self, n: int, keep: int) -> None:
        self.similarity = np.full((n, keep), -np.inf, dtype=np.float32)
        self.index = np.full((n, keep), -1, dtype=np.int32)
        self.floor = np.full(n, -np.inf, dtype=np.float32)

    def offer(self, first: int, rows: NDArray[np.int64], index: NDArray[np.int32], values: NDArray[np.float32]) -> None:
        """Takes similarities `values` [m] of queries first + `rows` (ascending) with the vectors at `index`."""
        if not len(rows):
            return
        keep = self.similarity.shape[1]
        starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
        counts = np.diff(np.r_[starts, len(rows)])
        at = first + rows[starts]
        line = np.repeat(np.arange(len(starts)), counts)
        slot = keep + np.arange(len(rows)) - starts[line]
        width = keep + int(counts.max())
        similarity = np.full((len(at), width), -np.inf, dtype=np.float32)
        found = np.full((len(at), width), -1, dtype=np.int32)
        similarity[:, :keep], found[:, :keep] = self.similarity[at], self.index[at]
        similarity[line, slot], found[line, slot] = values, index
        best = np.argpartition(similarity, width - keep, axis=1)[:, width - keep :]
        similarity = np.take_along_axis(similarity, best, axis=1)
        self.similarity[at], self.index[at] = similarity, np.take_along_axis(found, best, axis=1)
        self.floor[at] = similarity.min(axis=1)


def rows_of(vectors: Vectors, start: int, stop: int) -> NDArray[np.float32]:
    """Rows as float32, contiguous; a copy only where they are stored otherwise."""
    return np.ascontiguousarray(vectors[start:stop], dtype=np.float32)


def nearest_within(vectors: Vectors, keep: int, device: str = "cpu", alive: Mask = None) -> Candidates:
    """For each of N unit vectors [N, d] the `keep` most similar *other* ones; those not `alive` are no vectors."""
    n = len(vectors)
    if device != "cpu":
        return _nearest_on_device(vectors, vectors, np.arange(n), keep, device, alive)
    found = Candidates(n, keep)
    block = Block(min(BLOCK, n))
    for i in range(0, n, BLOCK):  # first within the blocks: what follows then has a high bar to pass
        own = rows_of(vectors, i, i + BLOCK)
        block.multiply(own, own, _part(alive, i), _part(alive, i))
        np.fill_diagonal(block.buffer, -np.inf)
        block.offer_rows(found, i, i)
    for i in range(0, n, BLOCK):
        rows = rows_of(vectors, i, i + BLOCK)
        for j in range(i + BLOCK, n, BLOCK):
            block.multiply(rows, rows_of(vectors, j, j + BLOCK), _part(alive, i), _part(alive, j))
            block.offer_rows(found, i, j)
            block.offer_columns(found, j, i)
    return found


def nearest_among(
    queries: Vectors, vectors: Vectors, own: NDArray[np.int64], keep: int, device: str = "cpu", alive: Mask = None
) -> Candidates:
    """For each of n queries the `keep` most similar of N vectors; `own` [n] is the one left out, or -1."""
    if device != "cpu":
        return _nearest_on_device(queries, vectors, own, keep, device, alive)
    found = Candidates(len(queries), keep)
    block = Block(BLOCK)
    for i in range(0, len(queries), BLOCK):
        rows = rows_of(queries, i, i + BLOCK)
        mine = own[i : i + BLOCK]
        for j in range(0, len(vectors), BLOCK):
            block.multiply(rows, rows_of(vectors, j, j + BLOCK), None, _part(alive, j))
            here = np.flatnonzero((mine >= j) & (mine < j + BLOCK))
            block.buffer[here, mine[here] - j] = -np.inf
            block.offer_rows(found, i, j)
    return found


def _part(alive: Mask, start: int) -> Mask:
    return None if alive is None else alive[start : start + BLOCK]


def _nearest_on_device(
    queries: Vectors, vectors: Vectors, own: NDArray[np.int64], keep: int, device: str, alive: Mask
) -> Candidates:
    import torch

    found = Candidates(len(queries), keep)
    with torch.no_grad(), _full_precision():
        for i in range(0, len(queries), 4 * BLOCK):
            rows = torch.from_numpy(rows_of(queries, i, i + 4 * BLOCK)).to(device)
            mine = torch.from_numpy(own[i : i + 4 * BLOCK]).to(device)
            best = torch.empty((len(rows), 0), device=rows.device)
            index = torch.empty((len(rows), 0), dtype=torch.int32, device=rows.device)
            for j in range(0, len(vectors), _DEVICE_COLUMNS):
                columns = torch.from_numpy(rows_of(vectors, j, j + _DEVICE_COLUMNS)).to(device)
                similarity = rows @ columns.T
                if alive is not None:
                    similarity[:, torch.from_numpy(~alive[j : j + _DEVICE_COLUMNS]).to(device)] = -torch.inf
                here = ((mine >= j) & (mine < j + len(columns))).nonzero()[:, 0]
                similarity[here, mine[here] - j] = -torch.inf
                value, position = similarity.topk(min(keep, len(columns)), dim=1)
                best = torch.cat([best, value], dim=1)
                index = torch.cat([index, (position + j).int()], dim=1)
                if best.shape[1] > keep:
                    best, position = best.topk(keep, dim=1)
                    index = index.gather(1, position)
            at, known = slice(i, i + len(rows)), best.shape[1]
            found.similarity[at, :known], found.index[at, :known] = best.cpu().numpy(), index.cpu().numpy()
    found.index[np.isneginf(found.similarity)] = -1
    found.floor = found.similarity.min(axis=1, initial=np.inf)
    return found


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 inside, whatever was set for training: its three digits are too few to tell neighbours apart."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Block:
    """Similarities of two blocks of vectors, in a buffer that is used again; -inf beyond a ragged edge."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // _GROUP) * _GROUP
        self.buffer = np.full((self.size, self.size), -np.inf, dtype=np.float32)

    def multiply(
        self, left: NDArray[np.float32], right: NDArray[np.float32], left_alive: Mask, right_alive: Mask
    ) -> None:
        if len(left) == len(right) == self.size:
            np.matmul(left, right.T, out=self.buffer)
        else:
            self.buffer[:] = -np.inf
            self.buffer[: len(left), : len(right)] = left @ right.T
        if left_alive is not None:
            self.buffer[: len(left)][~left_alive] = -np.inf
        if right_alive is not None:
            self.buffer[:, : len(right)][:, ~right_alive] = -np.inf

    def offer_rows(self, found: Candidates, first: int, offset: int) -> None:
        """Candidates of queries first, first + 1, ... among the columns, which start at position `offset`."""
        groups = self.size // _GROUP
        grouped = self.buffer.reshape(self.size, _GROUP, groups)  # group g holds columns g, g + groups, ...
        highest = grouped.max(axis=1)
        floor = self._floor(found, first, highest)
        rows, group = np.nonzero(highest > floor[:, None])
        values = grouped[rows, :, group]
        line, member = np.nonzero(values > floor[rows, None])
        index = (member * groups + group[line] + offset).astype(np.int32)
        found.offer(first, rows[line], index, values[line, member])

    def offer_columns(self, found: Candidates, first: int, offset: int) -> None:
        """The same for the columns, whose queries start at `first`, among the rows, which start at `offset`."""
        groups = self.size // _GROUP
        grouped = self.buffer.reshape(groups, _GROUP, self.size)  # group g holds rows 32 g ... 32 g + 31
        highest = np.ascontiguousarray(grouped.max(axis=1).T)
        floor = self._floor(found, first, highest)
        columns, group = np.nonzero(highest > floor[:, None])
        values = grouped[group, :, columns]
        line, member = np.nonzero(values > floor[columns, None])
        index = (group[line] * _GROUP + member + offset).astype(np.int32)
        found.offer(first, columns[line], index, values[line, member])

    def _floor(self, found: Candidates, first: int, highest: NDArray[np.float32]) -> NDArray[np.float32]:
        """What an entry must exceed; for queries without candidates the keep-th of their groups' maxima, just below."""
        known = found.floor[first : first + self.size]
        floor = np.full(self.size, np.inf, dtype=np.float32)
        floor[: len(known)] = known
        keep, groups = found.similarity.shape[1], highest.shape[1]
        new = np.flatnonzero(np.isneginf(floor))
        if len(new) and keep <= groups:
            bound = np.partition(highest[new], groups - keep, axis=1)[:, groups - keep]
            floor[new] = np.nextafter(bound, np.float32(-np.inf))
        return floor
