"""The passes of reward models and of UniEval: one number per text, and each model loaded once.

All questions to UniEval share its one load; each has texts of its own, so each makes its own encoder pass.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.progress import Progress, log
from im_lightning.indicators.base import Answers, Features, Missing, Scores
from im_lightning.models.batching import NO_MEMORY, Budget, release_memory
from im_lightning.models.device import Lanes
from im_lightning.models.scorer import ScorerInput, ScorerModel
from im_lightning.scoring.columns import Clock, DistinctPool, VectorWork, Work
from im_lightning.scoring.passes.base import CHUNK, Pass
from im_lightning.scoring.settings import Setup

if TYPE_CHECKING:
    import torch

    from im_lightning.models.device import ModelWork, Precision

PART_ROWS = 8192  # rows sorted together
NO_TOKENS = "no token to judge"
Answered = list[tuple[NDArray[np.int64], Answers | None]]  # the rows of a batch, in pieces where memory was short


@dataclass(frozen=True)
class Asked:
    """Distinct examples with something to show (`rows` int64 [n], n `inputs`); by row, why others have nothing."""

    rows: NDArray[np.int64]
    inputs: list[ScorerInput]
    reasons: dict[int, str | None]


class ScorerPass(Pass):
    """Indicators that are the answers of one model, which `argument` names; `scorer` holds it from `load` to `free`."""

    argument: str
    deals = True

    def __init__(self, pool: DistinctPool, works: Sequence[Work], vectors: VectorWork | None, setup: Setup) -> None:
        super().__init__(pool, works, vectors, setup)
        self.budget = Budget(setup.tokens_per_batch, setup.torch_device.type, self.label)
        self.scorer: ScorerModel | None = None
        self._work: ModelWork | None = None

    @property
    def model(self) -> str:
        """Its folder or hub id."""
        return str(getattr(self.setup.models, self.argument))

    @property
    def number_format(self) -> Precision:
        return self.setup.format_of(self.model)

    @abstractmethod
    def check(self) -> None:
        """Refuses a model by its settings alone: asked before any pass begins."""

    @abstractmethod
    def load_scorer(self, dtype: torch.dtype) -> ScorerModel:
        """The model, its weights of that type."""

    def load(self) -> None:
        from im_lightning.models.device import model_work

        chosen = self.number_format
        scorer = self.scorer = self.load_scorer(chosen.dtype)
        log(f"{self.model}: {scorer.format} format, {chosen.name} ({chosen.why}) on {self.setup.torch_device}")
        work = model_work(scorer.body)
        if work is not None and not scorer.causal:  # every token looks at all, not at half of them on average
            work = replace(work, attention=2 * work.attention)
        self._work, self.width = work, int(getattr(scorer.body.config, "hidden_size", 0) or 1024)
        self.parameters = math.nan if work is None else work.parameters
        self.budget.suit(work, self.width, self.setup.numerics.batch_tokens is not None)

    def free(self) -> None:
        self.scorer = None
        release_memory()

    def pieces(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        return [rows[start : start + PART_ROWS] for start in range(0, len(rows), PART_ROWS)]

    def work(self, pieces: Sequence[NDArray[np.int64]], bar: Progress) -> None:
        clock = Clock()
        pairs = sum(int(work.missing[rows].sum()) for work in self.works for rows in pieces)
        share = sum(map(len, pieces)) / max(1, pairs)
        with Lanes(self.setup.torch_device.type) as lanes:
            for work, asked in self._asked(pieces):
                if asked.reasons:
                    lacking = Scores(np.full(len(asked.reasons), np.nan), [*asked.reasons.values()])
                    work.put(np.array([*asked.reasons]), lacking)
                    bar.advance(share * len(asked.reasons))
                for batch, results in lanes.map(partial(self.through, asked), self.batches(asked.inputs)):
                    self._keep(work, asked, batch, results)
                    bar.advance(share * len(batch))
                    if clock.due():
                        self.flush()

    def _asked(self, pieces: Sequence[NDArray[np.int64]]) -> Iterator[tuple[Work, Asked]]:
        """What the model is shown, part by part; while one is in use, the next is tokenised."""
        parts = [(work, rows[work.missing[rows]]) for rows in pieces for work in self.works]
        with ThreadPoolExecutor(1, "tokenise") as background:
            coming = background.submit(self.ask, *parts[0])
            for (work, _), following in zip(parts, [*parts[1:], None], strict=True):
                asked = coming.result()
                if following is not None:
                    coming = background.submit(self.ask, *following)
                yield work, asked

    def through(self, asked: Asked, batch: NDArray[np.int64]) -> Answered:
        """Runs one batch, split where memory is short. Thread-safe: changes nothing of the pass."""
        lengths = np.array([len(asked.inputs[i].ids) for i in batch])
        return list(self.budget.run(batch, lengths, lambda at: self.answers([asked.inputs[i] for i in at])))

    def _keep(self, work: Work, asked: Asked, batch: NDArray[np.int64], results: Answered) -> None:
        """Puts the answers of a batch into the work."""
        for piece, answers in results:
            rows = asked.rows[piece]
            if answers is None:
                work.pass_over(rows, NO_MEMORY)
            else:
                work.put(rows, work.indicator.compute(Features(self.examples(rows), answers=answers)))
        lengths = np.array([len(asked.inputs[i].ids) for i in batch])
        self.tokens += int(lengths.sum())
        if self._work is not None:
            self.flops += self._work.flops(lengths, 0)

    def ask(self, work: Work, rows: NDArray[np.int64]) -> Asked:
        """What the model is shown of the distinct examples `rows`, and why of the others nothing."""
        shown: list[Any] = []
        at: list[int] = []
        reasons: dict[int, str | None] = {}
        for row in rows.tolist():
            try:
                shown.append(work.indicator.judged(self.pool.examples[row]))
                at.append(row)
            except Missing as missing:
                reasons[row] = missing.reason
        inputs: list[ScorerInput] = []
        for start in range(0, len(shown), CHUNK):
            inputs += self._scorer.encode(shown[start : start + CHUNK])
        pairs = list(zip(at, inputs, strict=True))
        reasons.update({row: one.reason or NO_TOKENS for row, one in pairs if not len(one.ids)})
        kept = [(row, one) for row, one in pairs if len(one.ids)]
        return Asked(np.array([row for row, _ in kept], dtype=np.int64), [one for _, one in kept], reasons)

    def batches(self, inputs: Sequence[ScorerInput]) -> list[NDArray[np.int64]]:
        """Positions among `inputs` per batch (of those shared out, this one's), the longest first."""
        k, n = self.deal
        return self.budget.plan([len(one.ids) for one in inputs])[k::n]

    def answers(self, inputs: Sequence[ScorerInput]) -> Answers:
        """One batch through the model."""
        return Answers(self._scorer.logits(inputs), [one.note for one in inputs])

    @property
    def _scorer(self) -> ScorerModel:
        if self.scorer is None:
            raise RuntimeError("the model of this pass is not loaded")
        return self.scorer


class RewardPass(ScorerPass):
    """`reward`."""

    argument = "reward_model"

    def check(self) -> None:
        from im_lightning.models.reward import reward_config

        reward_config(self.model)

    def load_scorer(self, dtype: torch.dtype) -> ScorerModel:
        from im_lightning.models.reward import load_reward_model

        return load_reward_model(self.model, dtype, self.setup.torch_device)


class UniEvalPass(ScorerPass):
    """`naturalness`, `coherence`, `understandability`."""

    argument = "unieval_model"

    def check(self) -> None:
        from im_lightning.models.unieval import unieval_config

        unieval_config(self.model)

    def load_scorer(self, dtype: torch.dtype) -> ScorerModel:
        from im_lightning.models.unieval import load_unieval

        return load_unieval(self.model, dtype, self.setup.torch_device)


SCORERS: dict[str, type[ScorerPass]] = {"reward": RewardPass, "unieval": UniEvalPass}


def scorer_passes(pool: DistinctPool, works: Sequence[Work], setup: Setup) -> list[ScorerPass]:
    """A pass per model for the works that need one."""
    grouped = {need: [work for work in works if need in work.indicator.needs] for need in SCORERS}
    return [SCORERS[need](pool, some, None, setup) for need, some in grouped.items() if some]
