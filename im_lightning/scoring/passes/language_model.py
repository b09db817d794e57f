"""The pass of the base model: lengths, likelihoods with and without prompt, mean hidden states.

One tokenisation and one forward pass give lengths, `ppl` and the pooled states; a second, over the responses alone,
gives `ppl_unconditional`. Rows are taken in parts; within a part they are sorted by length into token-budget batches.
The next part is tokenised in the background while this one goes through the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.progress import Progress, log
from im_lightning.data.example import Example
from im_lightning.errors import RequestError, message
from im_lightning.indicators.base import Features, Likelihood
from im_lightning.indicators.knn import unit_rows
from im_lightning.models.batching import NO_MEMORY, Budget, release_memory
from im_lightning.models.device import Lanes
from im_lightning.models.likelihood import collate, padding_id
from im_lightning.scoring.columns import Clock, DistinctPool, VectorWork, Work
from im_lightning.scoring.passes.base import Pass
from im_lightning.scoring.settings import Setup

if TYPE_CHECKING:
    from im_lightning.data.tokenization import Encoded

PART_ROWS = 8192  # rows tokenised and sorted together: enough for even batches, little enough to stream
SIDES = ("conditional", "unconditional", "tuned")
FIRST_ROWS = 1024  # of the first part, which the model has to wait for


@dataclass
class Side:
    """Likelihoods of a part on one side (with or without prompt), filled batch by batch."""

    name: str
    wanted: NDArray[np.bool_]
    encoded: list[Encoded]
    likelihood: Likelihood
    done: NDArray[np.bool_]

    @classmethod
    def of(cls, name: str, wanted: NDArray[np.bool_], encoded: list[Encoded]) -> Side:
        n = len(wanted)
        return cls(name, wanted, encoded, Likelihood(np.full(n, np.nan), np.zeros(n, np.int64)), np.zeros(n, np.bool_))


@dataclass(frozen=True)
class Output:
    """What the model says of B rows: nats and response tokens [B], vectors [B, H] (of the mean hidden states) if they
    are wanted, and the tokens of the batch, padding included.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]
    pooled: NDArray[np.float32] | None
    tokens: int


@dataclass
class Part:
    """Some of the pass's rows, n of them: positions among the distinct examples, tokens, results so far."""

    rows: NDArray[np.int64]
    examples: list[Example]
    encoded: list[Encoded]
    sides: dict[str, Side] = field(default_factory=dict)

    def ready(self, work: Work) -> NDArray[np.int64]:
        """Positions in the part where everything the indicator needs is there and it has no value yet."""
        ready = work.missing[self.rows]
        for need in work.indicator.needs:
            if need in SIDES:
                ready = ready & self.sides[need].done
        return np.flatnonzero(ready)

    def features(self, at: NDArray[np.int64]) -> Features:
        given, alone, tuned = (self.sides[name] for name in SIDES)
        return Features(
            [self.examples[i] for i in at],
            [self.encoded[i] for i in at],
            [alone.encoded[i] for i in at] if alone.encoded else None,
            Likelihood(given.likelihood.sums[at], given.likelihood.counts[at]),
            Likelihood(alone.likelihood.sums[at], alone.likelihood.counts[at]),
            Likelihood(tuned.likelihood.sums[at], tuned.likelihood.counts[at]),
        )


class LanguageModelPass(Pass):
    """Everything that reads the base model."""

    deals = True
    sweeps = 1  # through the model, the way back included

    def __init__(self, pool: DistinctPool, works: Sequence[Work], vectors: VectorWork | None, setup: Setup) -> None:
        super().__init__(pool, works, vectors, setup)
        self.budget = Budget(setup.tokens_per_batch, setup.torch_device.type, self.label)
        self.padded_tokens = 0

    def load(self) -> None:
        from im_lightning.data.tokenization import resolve_template
        from im_lightning.models.checkpoint import load_causal_lm, load_config, load_tokenizer, vocabulary
        from im_lightning.models.device import model_work

        asked, name = self.setup.encoding, str(self.setup.encoding.model)
        self.tokenizer = load_tokenizer(name, asked.revision)
        self.template = resolve_template(asked.template, self.tokenizer)
        self.embeddings = vocabulary(name, asked.revision)
        positions = getattr(load_config(name, asked.revision), "max_position_embeddings", None)
        if isinstance(positions, int) and 0 < positions < asked.max_length:
            cause = f"the model has {positions} positions, fewer than max_length {asked.max_length}"
            raise RequestError(message(name, cause, f"pass --max-length {positions} (max_length={positions})"))
        chosen, device = self.number_format, self.setup.torch_device
        log(f"{name}: {self.template.name} template, {chosen.name} ({chosen.why}) on {device}")
        self.model = load_causal_lm(name, asked.revision, chosen.dtype, device)
        self._work = model_work(self.model)
        self.parameters = math.nan if self._work is None else self._work.parameters
        self.width = int(getattr(self.model.config, "hidden_size", 0) or 1024)
        self.budget.suit(self._work, self.width, self.setup.numerics.batch_tokens is not None)

    def free(self) -> None:
        self.__dict__.pop("model", None)
        release_memory()

    def pieces(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        borders = [0, *range(FIRST_ROWS, len(rows), PART_ROWS), len(rows)]
        return [rows[a:b] for a, b in pairwise(borders)]

    def work(self, pieces: Sequence[NDArray[np.int64]], bar: Progress) -> None:
        sizes = np.array([_characters(self.pool.examples[i]) for rows in pieces for i in rows], dtype=np.float64)
        share = sizes / sizes.sum() * len(sizes)  # progress in rows, weighted by their text: longest batches go first
        clock, start = Clock(), 0
        with Lanes(self.setup.torch_device.type) as lanes:
            for part in self.parts(pieces):
                here = slice(start, start + len(part.rows))
                start += len(part.rows)
                try:
                    self._run(part, lanes, clock, bar, float(share[here].sum()))
                finally:
                    self.emit(part)

    def parts(self, pieces: Sequence[NDArray[np.int64]]) -> Iterator[Part]:
        """The pieces in turn; while one is in use, the next is tokenised (fast tokenizers let other threads run)."""
        with ThreadPoolExecutor(1, "tokenise") as background:
            coming = background.submit(self.prepare, pieces[0])
            for following in [*pieces[1:], None]:
                part = coming.result()
                if following is not None:
                    coming = background.submit(self.prepare, following)
                yield part

    def prepare(self, rows: NDArray[np.int64]) -> Part:
        """Tokenises the distinct examples `rows`."""
        from im_lightning.data.tokenization import check_vocabulary, encode_examples, encode_unconditional

        examples, limit = self.examples(rows), self.setup.encoding.max_length
        encoded = encode_examples(examples, self.tokenizer, self.template, limit)
        check_vocabulary(encoded, examples, self.tokenizer, str(self.setup.encoding.model), self.embeddings)
        part = Part(rows, examples, encoded)
        wanted = {name: np.zeros(len(rows), dtype=np.bool_) for name in SIDES}
        for work in self.works:
            for need in set(work.indicator.needs) & set(wanted):
                wanted[need] |= work.missing[rows]
        if self.vectors is not None:
            wanted["conditional"] |= self.vectors.missing[rows]
        part.sides["conditional"] = Side.of("conditional", wanted["conditional"], encoded)
        alone: list[Encoded] = []
        if wanted["unconditional"].any():
            alone = encode_unconditional(examples, self.tokenizer, limit, self.template)
        part.sides["unconditional"] = Side.of("unconditional", wanted["unconditional"], alone)
        part.sides["tuned"] = Side.of("tuned", wanted["tuned"], encoded)
        return part

    def batches(self, part: Part) -> list[tuple[Side, NDArray[np.int64]]]:
        """All batches of a part (of those shared out, this one's), as positions in it."""
        planned: list[tuple[Side, NDArray[np.int64]]] = []
        for side in part.sides.values():
            at = np.flatnonzero(side.wanted)
            lengths = [len(side.encoded[i].input_ids) for i in at]
            planned += [(side, at[batch]) for batch in self.budget.plan(lengths)]
        k, n = self.deal
        return planned[k::n]

    def _run(self, part: Part, lanes: Lanes, clock: Clock, bar: Progress, share: float) -> None:
        planned = self.batches(part)
        sizes = [sum(len(side.encoded[i].input_ids) for i in at) for side, at in planned]
        for (side, at), results in lanes.map(self.through, planned):
            for piece, output in results:
                if output is None:
                    self._give_up(part, side, piece)
                else:
                    self._keep(part, side, piece, output)
            lengths = np.array([len(side.encoded[i].input_ids) for i in at])
            self.tokens += int(lengths.sum())
            if self._work is not None:
                self.flops += self.sweeps * self._work.flops(lengths, int(side.likelihood.counts[at].sum()))
            bar.advance(share * int(lengths.sum()) / sum(sizes))
            if clock.due():
                self.emit(part)
                self.flush()
        if not planned:
            bar.advance(share)

    def through(self, batch: tuple[Side, NDArray[np.int64]]) -> list[tuple[NDArray[np.int64], Output | None]]:
        """Runs one batch, split where memory is short. Thread-safe: changes nothing of the pass."""
        side, at = batch
        lengths = np.array([len(side.encoded[i].input_ids) for i in at])
        return list(self.budget.run(at, lengths, partial(self.forward, side)))

    def _give_up(self, part: Part, side: Side, at: NDArray[np.int64]) -> None:
        """Rows too long for the memory: no value in this table, and none in the store, so that others may try."""
        for work in self.works:
            if side.name in work.indicator.needs:
                lacking = at[work.missing[part.rows[at]]]
                work.pass_over(part.rows[lacking], NO_MEMORY)
        if self.vectors is not None and side.name == "conditional":
            self.vectors.pass_over(part.rows[at[self.vectors.missing[part.rows[at]]]])

    def forward(self, side: Side, at: NDArray[np.int64]) -> Output:
        """One batch through the model."""
        import torch

        from im_lightning.models.likelihood import pooled_states, response_nll

        batch = collate([side.encoded[i] for i in at], padding_id(self.tokenizer, self.embeddings))
        pooled = None
        with torch.inference_mode():
            pooling = self.vectors is not None and side.name == "conditional"
            result = response_nll(self.model, batch, keep_hidden=pooling)
            if result.hidden is not None:
                seen = batch["attention_mask" if self.setup.models.embed == "both" else "target_mask"]
                pooled = unit_rows(pooled_states(result.hidden, seen).cpu().numpy())
        sums, counts = result.sums.double().cpu().numpy(), result.counts.cpu().numpy()
        return Output(sums, counts, pooled, batch["input_ids"].numel())

    def _keep(self, part: Part, side: Side, at: NDArray[np.int64], output: Output) -> None:
        side.likelihood.sums[at], side.likelihood.counts[at] = output.sums, output.counts
        side.done[at] = True
        self.padded_tokens += output.tokens
        if self.vectors is not None and output.pooled is not None:
            new = self.vectors.missing[part.rows[at]]
            self.vectors.put(part.rows[at[new]], output.pooled[new])

    def emit(self, part: Part) -> None:
        """Turns what is finished into values."""
        for work in self.works:
            at = part.ready(work)
            if len(at):
                work.put(part.rows[at], work.indicator.compute(part.features(at)))


def _characters(example: Example) -> int:
    return 1 + sum(len(turn.content) for turn in example.messages)
