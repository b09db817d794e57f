"""Blocks: disjoint designed sets of rows, and convex mixtures of them whose mean indicators span a region.

Each block is finetuned on once. A mixture α is a point of the simplex over the blocks: its mean regressors are Σ α_b
times those of the blocks, a run trained on it draws its rows from the blocks in these shares, and a merged model
(`training.merging`) stands in for that run. As mixtures lie between their blocks, the blocks have to lie far apart:
they are drawn one after the other from the rows that are left, each the one of many designed subsets that raises the
determinant of the information most.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from im_lightning._utils.files import parse_json, write_json
from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import progress
from im_lightning._utils.rng import DESIGN_MIXTURES, generator
from im_lightning.errors import DataError, RequestError, message
from im_lightning.rule.validation.diagnostics import constant_columns
from im_lightning.sampling.designs.d_optimal import with_intercept
from im_lightning.sampling.designs.subsets import VERSION, DesignPool, apportioned
from im_lightning.sampling.draws.systematic import Floats

FORMAT = "im_lightning.blocks"
MOST_MIXED = 6
"""Blocks in a mixture, at most, where their rows allow it: of more the mean is always near the middle."""
MOST_SHARE = 0.6
"""Of a mixture that is one block's: a block alone is trained already."""
TWINS = 12
BLOCKS = 16
_CANDIDATES = 60  # subsets that each block is chosen from
_RIDGE = 1e-9
_REMEDY = "make it again (im-lightning design --kind merged)"


@dataclass(frozen=True)
class MergedSettings:
    """What merged runs are made of."""

    blocks: int | None = None
    """With --kind merged: sets of rows that are finetuned on once and merged in shares; 16 unless told otherwise. They
    tell as much as so many runs, however many mixtures of them are evaluated."""
    block_size: int | None = None
    """With --kind merged: rows of a block; by default as many as a run's. Fewer are cheaper, and reach less far."""
    twins: int | None = None
    """With --kind merged: how many of the merged runs are also made by training, to see how well they agree (12)."""

    @property
    def given(self) -> list[str]:
        """Flags of those that are set."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]


@dataclass(frozen=True)
class Blocks:
    """Blocks of a pool, and the mixtures of them that are to be evaluated.

    Args:
        pool_digest: Of the pool whose rows these are.
        rows: Block → positions of its rows, which no other block has.
        block_size: Rows that each block is finetuned on.
        subset_size: Rows of a run that a mixture stands for.
        mixtures: [n] block → share, those without a share left out; every share is a whole number of `subset_size`.
        twins: How many of the mixtures, from the first on, are also trained on.
    """

    pool_digest: str
    rows: dict[str, list[int]]
    block_size: int
    subset_size: int
    mixtures: list[dict[str, float]]
    twins: int

    @property
    def digest(self) -> str:
        """Of the rows of the blocks: what mixtures of them mean."""
        return digest_json([self.pool_digest, self.rows])

    def names_of(self, pool_digest: str, size: int) -> list[str]:
        """The block of each of the pool's N rows, "" for none.

        Raises:
            RequestError: the blocks are of another pool.
        """
        if pool_digest != self.pool_digest:
            cause = "they are blocks of another pool (other rows, or another order)"
            raise RequestError(message("blocks", cause, "pass the data that were designed on, or design again"))
        names = [""] * size
        for name, rows in self.rows.items():
            for row in rows:
                names[row] = name
        return names

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes them as JSON, atomically."""
        write_json(path, {"format": FORMAT, **asdict(self)})


def read_blocks(path: str | os.PathLike[str]) -> Blocks:
    """Blocks as `Blocks.save` wrote them.

    Raises:
        RequestError: there is no such file. DataError: it holds something else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise RequestError(message(str(path), "there is no such file of blocks", _REMEDY))
    try:
        value = parse_json(file.read_bytes())
        if value.pop("format") != FORMAT:
            raise ValueError("it is of another format")
        blocks = Blocks(**value)
        every = [row for rows in blocks.rows.values() for row in rows]
        if len(set(every)) < len(every) or not every:
            raise ValueError("its blocks are not disjoint")
        for mixture in blocks.mixtures:
            if not set(mixture) <= set(blocks.rows) or abs(sum(mixture.values()) - 1) > 1e-6:
                raise ValueError("a mixture has no shares of the blocks that sum to 1")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(message(str(path), f"it does not hold blocks ({error})", _REMEDY)) from error
    return blocks


def designed_blocks(
    phi: ArrayLike,
    sources: Sequence[str],
    eligible: ArrayLike,
    count: int,
    size: int,
    tilt: float,
    first_seed: int = 0,
) -> tuple[list[np.ndarray], Floats]:
    """Draws disjoint blocks.

    Args:
        phi: Regressors float64 [N, p].
        sources: N names.
        eligible: bool [N], rows that may be drawn.
        count: Blocks, B.
        size: Rows of each, n.
        tilt: How far a candidate leans along a random direction of indicator space, in sd of the rows that are left.
        first_seed: The candidates are the subset seeds from this one on.

    Returns:
        Rows of each block (int64 [n]), and the mean regressors of the blocks, float64 [B, p], in sd of the pool from
        its mean.

    Raises:
        RequestError: fewer eligible rows than the blocks take.
    """
    pool = DesignPool(phi, sources, eligible)
    if count * size > len(pool.rows):
        cause = f"{count} blocks of {size:,} rows take {count * size:,}, and {len(pool.rows):,} can be drawn"
        raise RequestError(message("--blocks", cause, "make fewer blocks, or smaller ones (--block-size)"))
    mean, scale = pool.problem.mean, pool.problem.scale
    constant = constant_columns(pool.phi[pool.rows])
    free = np.zeros(len(pool.phi), dtype=bool)
    free[pool.rows] = True
    information = _RIDGE * np.eye(pool.phi.shape[1] + 1)
    rows: list[np.ndarray] = []
    points: list[Floats] = []
    with progress("blocks", count, "blocks") as bar:
        for block in range(count):
            left = DesignPool(phi, sources, free)
            seeds = range(first_seed + block * _CANDIDATES, first_seed + (block + 1) * _CANDIDATES)
            drawn = [left.draw(size, seed, subset_tilt=tilt, version=VERSION).rows for seed in seeds]
            means = np.array([(pool.phi[one].mean(axis=0) - mean) / scale for one in drawn])
            means[:, constant] = 0.0  # exactly: what rounding leaves there is no information
            ones = with_intercept(means)
            gains = np.einsum("ij,ij->i", ones, np.linalg.solve(information, ones.T).T)
            best = int(np.argmax(gains))
            information = information + np.outer(ones[best], ones[best])
            free[drawn[best]] = False
            rows.append(drawn[best])
            points.append(means[best])
            bar.advance()
    return rows, np.array(points)


def candidate_mixtures(available: ArrayLike, subset_size: int, count: int, seed: int = 0) -> Floats:
    """Random mixtures, float64 [at most count, B], no two alike: Dirichlet(1) shares of two to `MOST_MIXED` blocks.

    Every share is a whole number of `subset_size` rows, and none is above `MOST_SHARE` or takes more rows than its
    block has (`available`, int [B]): what is too much goes to the mixture's other blocks, and then to further ones.
    """
    rows = np.minimum(np.asarray(available, dtype=np.int64), math.ceil(MOST_SHARE * subset_size))
    rng = generator(seed, purpose=DESIGN_MIXTURES)
    out = np.zeros((count, len(rows)))
    fewest = max(2, -(-subset_size // int(rows.max())))
    for each in out:
        mixed = rng.permutation(len(rows))[: rng.integers(fewest, max(fewest, min(MOST_MIXED, len(rows))) + 1)]
        shares = np.zeros(len(rows))
        shares[mixed] = rng.standard_exponential(len(mixed))
        each[:] = apportioned(shares / shares.sum(), rows, subset_size)[0] / subset_size
    return out[np.sort(np.unique(out, axis=0, return_index=True)[1])]
