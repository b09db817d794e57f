"""The passes of reward models and of UniEval: one number per text, and each model loaded once.

All questions to UniEval share its one load; each has texts of its own, so each makes its own encoder pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from im_lightning._progress import Progress, log
from im_lightning.indicators.base import Answers, Features, Missing, Scores
from im_lightning.models.batching import plan_batches
from im_lightning.models.judge import Judge, JudgeInput
from im_lightning.scoring.keys import Setup
from im_lightning.scoring.passes import CHUNK, Pass, release_memory
from im_lightning.scoring.work import Clock, Pool, Work

PART_ROWS = 8192  # rows sorted together
NO_TOKENS = "no token to judge"


@dataclass(frozen=True)
class Asked:
    """Distinct examples with something to show a judge (`rows` int64 [n], n `inputs`); by row, why others have none."""

    rows: NDArray[np.int64]
    inputs: list[JudgeInput]
    reasons: dict[int, str | None]


class JudgePass(Pass):
    """Indicators that are the answers of one model.

    Attributes:
        judge: The model, from `load` to `free`.
    """

    def __init__(self, pool: Pool, works: Sequence[Work], setup: Setup) -> None:
        super().__init__(pool, works)
        self.setup = setup
        self.judge: Judge | None = None

    @abstractmethod
    def load_judge(self) -> tuple[str, Judge]:
        """The model's name and the model."""

    def load(self) -> None:
        name, self.judge = self.load_judge()
        chosen = self.setup.number_format
        log(f"{name}: {self.judge.format} format, {chosen.name} ({chosen.why}) on {self.setup.torch_device}")

    def free(self) -> None:
        self.judge = None
        release_memory()

    def work(self, rows: NDArray[np.int64], bar: Progress) -> None:
        clock = Clock()
        pairs = sum(int(work.missing[rows].sum()) for work in self.works)
        share = len(rows) / max(1, pairs)
        for start in range(0, len(rows), PART_ROWS):
            part = rows[start : start + PART_ROWS]
            for work in self.works:
                here = part[work.missing[part]]
                asked = self.ask(work, here)
                if asked.reasons:
                    lacking = Scores(np.full(len(asked.reasons), np.nan), [*asked.reasons.values()])
                    work.put(np.array([*asked.reasons]), lacking)
                    bar.advance(share * len(asked.reasons))
                for batch in self.batches(asked.inputs):
                    inputs = [asked.inputs[i] for i in batch]
                    features = Features(self.examples(asked.rows[batch]), answers=self.answers(inputs))
                    work.put(asked.rows[batch], work.indicator.compute(features))
                    self.tokens += sum(len(one.ids) for one in inputs)
                    bar.advance(share * len(batch))
                    if clock.due():
                        self.flush()

    def ask(self, work: Work, rows: NDArray[np.int64]) -> Asked:
        """What the judge is shown of the distinct examples `rows`, and why of the others nothing."""
        shown: list[Any] = []
        at: list[int] = []
        reasons: dict[int, str | None] = {}
        for row in rows.tolist():
            try:
                shown.append(work.indicator.judged(self.pool.examples[row]))
                at.append(row)
            except Missing as missing:
                reasons[row] = missing.reason
        inputs: list[JudgeInput] = []
        for start in range(0, len(shown), CHUNK):
            inputs += self._judge.encode(shown[start : start + CHUNK])
        pairs = list(zip(at, inputs, strict=True))
        reasons.update({row: one.reason or NO_TOKENS for row, one in pairs if not len(one.ids)})
        kept = [(row, one) for row, one in pairs if len(one.ids)]
        return Asked(np.array([row for row, _ in kept], dtype=np.int64), [one for _, one in kept], reasons)

    def batches(self, inputs: Sequence[JudgeInput]) -> list[NDArray[np.int64]]:
        """Positions among `inputs` per batch, the longest first."""
        return plan_batches([len(one.ids) for one in inputs], self.setup.tokens_per_batch)

    def answers(self, inputs: Sequence[JudgeInput]) -> Answers:
        """One batch through the model."""
        return Answers(self._judge.logits(inputs), [one.note for one in inputs])

    @property
    def _judge(self) -> Judge:
        if self.judge is None:
            raise RuntimeError("the model of this pass is not loaded")
        return self.judge


class RewardPass(JudgePass):
    """`reward`."""

    def load_judge(self) -> tuple[str, Judge]:
        from im_lightning.models.reward import load_reward_model

        name = str(self.setup.reward_model)
        return name, load_reward_model(name, self.setup.number_format.dtype, self.setup.torch_device)


class UniEvalPass(JudgePass):
    """`naturalness`, `coherence`, `understandability`."""

    def load_judge(self) -> tuple[str, Judge]:
        from im_lightning.models.unieval import load_unieval

        name = str(self.setup.unieval_model)
        return name, load_unieval(name, self.setup.number_format.dtype, self.setup.torch_device)


JUDGES: dict[str, type[JudgePass]] = {"reward": RewardPass, "unieval": UniEvalPass}


def judge_passes(pool: Pool, works: Sequence[Work], setup: Setup) -> list[JudgePass]:
    """A pass per model for the works that need one."""
    grouped = {need: [work for work in works if need in work.indicator.needs] for need in JUDGES}
    return [JUDGES[need](pool, some, setup) for need, some in grouped.items() if some]
