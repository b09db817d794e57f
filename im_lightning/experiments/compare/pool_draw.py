"""Which rows of the pool each seed of a comparison may choose from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from im_lightning.errors import RequestError, message

POOL_DRAWS = ("auto", "folds", "same")
FOLD_TOKENS = 2
"""Times the tokens of an arm that a fold must hold before "auto" splits the pool."""


def settle_pool_draw(how: str, pool_tokens: float, tokens: int, seeds: int) -> str:
    """The draw that "auto" means: folds where each holds twice an arm's tokens, else the same rows for all seeds.

    Raises:
        RequestError: an unknown draw, or the bootstrap of earlier versions.
    """
    if how == "bootstrap":
        cause = "its seeds share rows, and a rule of noise alone came out significant in 17 % of comparisons of 5 seeds"
        remedy = "use folds: fewer --seeds or --tokens, or a larger pool, make room for them"
        raise RequestError(message("--pool-draw bootstrap", cause, remedy))
    if how not in POOL_DRAWS:
        raise RequestError(message("pool_draw", f"there is no {how!r}", f"use one of {', '.join(POOL_DRAWS)}"))
    if how != "auto":
        return how
    return "folds" if pool_tokens >= FOLD_TOKENS * tokens * seeds else "same"


def candidate_rows(
    how: str, rows: int, index: int, seeds: int, seed: int, prompts: NDArray[np.int64] | None = None
) -> list[int] | None:
    """Candidate rows of one seed of a comparison.

    Args:
        how: "folds": the index-th of `seeds` disjoint random parts; "same": all; "bootstrap", of earlier versions: the
            different rows among as many drawn with replacement as there are (about 63 %).
        rows: Rows of the pool.
        index: Which of the seeds, from 0.
        seeds: How many there are.
        seed: Decides the draw.
        prompts: The prompt of each row; then rows of one prompt are in one fold, unless they are more than a fold.

    Returns:
        Row numbers, ascending; None for all.
    """
    if how == "same":
        return None
    if how == "folds":
        order = np.random.default_rng([seed, 3]).permutation(rows)
        if prompts is None:
            return np.sort(np.array_split(order, seeds)[index]).tolist()
        many = np.bincount(prompts)[prompts] > rows / seeds  # a prompt that all rows have by nature is no bond
        code = np.where(many, prompts.max() + 1 + np.arange(rows), prompts)[order]
        first = np.full(code.max() + 1, rows)
        np.minimum.at(first, code, np.arange(rows))
        place = np.sort(first[code])  # a prompt stands where its first row does
        ends = np.cumsum([len(part) for part in np.array_split(order, seeds)])
        fold = np.searchsorted(ends, np.searchsorted(place, place), side="right")
        return np.sort(order[np.argsort(first[code], kind="stable")][fold == index]).tolist()
    return np.unique(np.random.default_rng([seed + index, 4]).integers(0, rows, rows)).tolist()
