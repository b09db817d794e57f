"""The evaluation loss: Σ response-token NLL / Σ tokens over a set, exact on any number of ranks.

Every rank runs the same number of batches (filler rows without target tokens make up for what is missing, so that
collectives inside the model would stay in step), the sums and counts of every example are gathered, and there is one
division, at the end. No example counts twice and none is padded in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from im_lightning.data.example import Example
from im_lightning.errors import RequestError, message
from im_lightning.models.batching import plan_batches
from im_lightning.training.pool import Collate, EncodedPool

FILLER = -1
ResponseNLL = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


class EvalSet:
    """One evaluation set, encoded.

    Args:
        name: As in the RunRecord.
        encoded: Its n examples with their token ids.
        collate: Makes batches.
        batch_tokens: Most tokens of a batch, padding included.
    """

    def __init__(self, name: str, encoded: EncodedPool, collate: Collate, batch_tokens: int) -> None:
        self.name, self.source, self._collate, self.batch_tokens = name, encoded, collate, batch_tokens
        encoded.need(range(len(encoded)))
        self.encoded = [encoded.encoded[row] for row in range(len(encoded))]

    @property
    def examples(self) -> list[Example]:
        return self.source.pool.examples

    @property
    def ids(self) -> list[str]:
        return self.source.pool.ids

    @property
    def digest(self) -> str:
        """Digest of the ids in order."""
        return self.source.pool.digest

    def __len__(self) -> int:
        return len(self.encoded)

    def batches(self, rank: int = 0, world: int = 1) -> list[dict[str, Tensor]]:
        """This rank's batches: as many on every rank; `row` is the position in the set, or `FILLER`."""
        lengths = np.array([len(e.input_ids) for e in self.encoded])
        dealt = np.argsort(-lengths, kind="stable")
        plans = [self._plan(lengths, dealt[r::world]) for r in range(world)]
        most = max(len(plan) for plan in plans)
        made = [self._collate([(int(row), self.encoded[row]) for row in rows]) for rows in plans[rank]]
        return made + [self._filler() for _ in range(most - len(made))]

    def _plan(self, lengths: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
        return [rows[batch] for batch in plan_batches(lengths[rows], self.batch_tokens)]

    def _filler(self) -> dict[str, Tensor]:
        shortest = int(np.argmin([len(e.input_ids) for e in self.encoded]))
        batch = self._collate([(FILLER, self.encoded[shortest])])
        return {**batch, "target_mask": torch.zeros_like(batch["target_mask"])}


@dataclass(frozen=True)
class EvalLosses:
    """Losses of one set.

    Args:
        sums: float64 [n], nats per example.
        counts: int64 [n], supervised tokens per example.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def loss(self) -> float:
        """Nats per token over the whole set; NaN without a token."""
        tokens = int(self.counts.sum())
        return float(self.sums.sum() / tokens) if tokens else math.nan

    def summary(self) -> dict[str, Any]:
        """`{loss, tokens, examples, log_loss}` as a RunRecord keeps it."""
        loss = self.loss
        return {
            "loss": loss,
            "tokens": int(self.counts.sum()),
            "examples": len(self.counts),
            "log_loss": math.log(loss) if loss > 0 else math.nan,
        }


def evaluate(
    sets: Sequence[EvalSet],
    response_nll: ResponseNLL,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    all_sum: Callable[[Tensor], Tensor] | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, EvalLosses]:
    """Losses of every set under a model in evaluation mode. A collective where there are several ranks.

    Args:
        sets: In the same order on every rank.
        response_nll: (sums, counts) of a batch.
        device: Where the batches go.
        rank: This rank.
        world: Number of ranks.
        all_sum: Sums a tensor over the ranks; needed where there are several.
        context: Makes the precision context of each forward pass.

    Returns:
        set name → losses; equal on all ranks.
    """
    out = {}
    for one in sets:
        sums = torch.zeros(len(one), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        counts = torch.zeros(len(one), dtype=torch.int64, device=device)
        for batch in one.batches(rank, world):
            batch = {name: value.to(device) for name, value in batch.items()}
            with torch.no_grad(), context():
                got = response_nll(batch)
            real = batch["row"] != FILLER
            rows = batch["row"][real]
            sums[rows] = got[0].detach().to(device, sums.dtype)[real]
            counts[rows] = got[1].detach().to(device, torch.int64)[real]
        if all_sum is not None and world > 1:
            sums, counts = all_sum(sums), all_sum(counts)
        out[one.name] = EvalLosses(sums.cpu().numpy().astype(np.float64), counts.cpu().numpy())
    return out


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule back to its own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def evaluate_with(trainer: Any, module: Any, sets: Mapping[str, EvalSet]) -> dict[str, EvalLosses]:
    """`evaluate` with a Trainer's ranks, device and precision; every rank calls it.

    Args:
        trainer: The Trainer, its process group alive.
        module: Its LightningModule, with `response_nll(batch) -> (sums, counts)`.
        sets: Evaluation sets by name.
    """

    call = through_wrapper(trainer, module)

    def response_nll(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        got = call(batch)
        rows = (len(batch["row"]),)
        if not isinstance(got, tuple) or len(got) != 2 or any(getattr(part, "shape", None) != rows for part in got):
            cause = "its response_nll did not return two tensors with one number per example of the batch"
            remedy = "return (summed NLL in nats [B], number of response tokens [B])"
            raise RequestError(message(type(module).__name__, cause, remedy))
        return got

    with evaluating(module):
        return evaluate(
            list(sets.values()),
            response_nll,
            trainer.strategy.root_device,
            trainer.global_rank,
            trainer.world_size,
            all_sum(trainer),
            trainer.precision_plugin.val_step_context,
        )


def through_wrapper(trainer: Any, module: Any) -> ResponseNLL:
    """The module's `response_nll`, called through the strategy's wrapper where there is one, as Lightning calls
    `validation_step`: under FSDP only the wrapper's forward gathers the weights."""
    strategy = trainer.strategy
    redirect = getattr(strategy, "_forward_redirection", None)
    if redirect is None or strategy.model is module or strategy.lightning_module is not module:
        return module.response_nll
    return lambda batch: redirect(strategy.model, module, "response_nll", batch)


def all_sum(trainer: Any) -> Callable[[Tensor], Tensor] | None:
    """Sums a tensor over the Trainer's ranks, on their device; None where there is one rank."""
    if trainer.world_size == 1:
        return None

    def reduce(tensor: Tensor) -> Tensor:
        return trainer.strategy.reduce(tensor.to(trainer.strategy.root_device, copy=True), reduce_op="sum")

    return reduce
