"""The score table of a run: from a file, or scored up front, by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from im_lightning.data.example import Example
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.indicators.base import get_indicators
from im_lightning.scoring.api import REWARD_INDICATORS, UNIEVAL_INDICATORS, make_setup, score_examples
from im_lightning.scoring.passes.base import Pass
from im_lightning.scoring.plan import Plan
from im_lightning.training.pool import Pool
from im_lightning.training.ranks import Ranks, share

DESIGNED_INDICATORS = ("length_input", "length_output", "ppl", "mtld", "knn_6")
"""What a designed run is scored for unless told otherwise: the paper's regressors that need no other models."""


def designed_indicators(reward_model: str | None, unieval_model: str | None) -> tuple[str, ...]:
    """Those, and the paper's others whose model is named."""
    return (
        *DESIGNED_INDICATORS,
        *(REWARD_INDICATORS if reward_model is not None else ()),
        *(UNIEVAL_INDICATORS if unieval_model is not None else ()),
    )


@dataclass(frozen=True)
class Scorer:
    """How to score; the data module's arguments of the same names, and the device."""

    indicators: tuple[str, ...]
    model: str | None
    revision: str | None
    embedding_model: str | None
    template: str
    max_length: int
    batch_tokens: int | None
    precision: str
    device: str
    cache_dir: str | None
    reward_model: str | None = None
    unieval_model: str | None = None
    knn_reference: str | None = None

    def __call__(self, examples: Sequence[Example]) -> ScoreTable:
        """Scores what the store lacks; does no model work where it lacks nothing."""
        return score_examples(examples, list(self.indicators), **self._how)

    def passes(self, examples: Sequence[Example]) -> list[Pass]:
        """The work on the models that the store lacks: values and vectors of single examples, nothing of the pool and
        of a reference, which is left to the rank that puts the table together."""
        how = {name: value for name, value in self._how.items() if name != "knn_reference"}
        return Plan(examples, get_indicators(self.indicators), make_setup(**how)).passes

    @property
    def _how(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "indicators"}


def score_own_share(scorer: Scorer, pool: Pool, ranks: Ranks) -> None:
    """Scores this rank's share of the pool into the store: the work on models, which is nearly all of it.

    The share is a pure function of the pool, so that ranks need not talk: rows sorted by the length of their text,
    dealt in turn.
    """
    if ranks.world == 1:
        return
    costs = [sum(len(turn.content) for turn in example.messages) for example in pool.examples]
    rows = share(costs, ranks.rank, ranks.world)
    for each in scorer.passes([pool.examples[row] for row in rows]) if rows else []:
        each.run()


def score_together(scorer: Scorer, pool: Pool, ranks: Ranks, finish: Callable[[ScoreTable], None]) -> None:
    """All ranks score their shares; rank 0 puts the table together, with what depends on the whole pool, and hands it
    to `finish`."""
    score_own_share(scorer, pool, ranks)
    if ranks.rank:
        ranks.finish()
        return
    ranks.wait_for_all()
    finish(scorer(pool.examples))


def read_scores(path: str, pool: Pool) -> ScoreTable:
    """A table of scores, its rows put into the pool's order.

    Raises:
        RequestError: it lacks rows of the pool, or there is no such file.
        DataError: it is torn or foreign.
    """
    table = ScoreTable.read(path)
    if table.pool_digest == pool.digest:
        return table
    place = {id: row for row, id in reversed(list(enumerate(table.id)))}
    absent = [row for row, id in enumerate(pool.ids) if id not in place]
    if absent:
        cause = f"it has no scores for {len(absent)} of the pool's {len(pool)} rows, first row {absent[0]}"
        remedy = "score this pool (im-lightning score DATA … --out scores.parquet), or leave out scores="
        raise RequestError(message(path, cause, remedy))
    taken = table.take(np.array([place[id] for id in pool.ids], dtype=np.int64))
    return ScoreTable(np.arange(len(pool)), pool.ids, pool.sources, taken.values, taken.reasons, taken.keys, taken.meta)
