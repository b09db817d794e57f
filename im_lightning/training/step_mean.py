"""One mean over the rows of an optimiser step (`StepMean`), whatever its batches and ranks hold of them.

The loss of a step is a sum over rows of summed NLL times weights that are known before any model has run, so that its
gradient is the sum of its micro-batches' gradients (`models.batching.micro_batched_loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from im_lightning.errors import RequestError, message

REDUCTIONS = ("token", "example")
Reduce = Callable[[Tensor, str], Tensor]
"""(tensor, "sum", "mean" or "min") -> the tensor reduced over all ranks. None where there is one rank."""


class StepMean:
    """Makes the loss of an optimiser step one mean over everything it saw: all batches, all ranks.

    Lightning divides each batch's loss by `accumulate_grad_batches` (A) and DDP averages gradients over the ranks (W).
    Averaging batch means so would weigh a token in a short batch more than one in a long batch. Here each batch's loss
    is (sum of its terms) / c with a c that is the same for all batches and ranks of the step, so the gradient that
    arrives is Σ grad(sum) / (A·W·c); times A·W·c / N, N the number of terms of the whole step, it is the gradient of
    the global mean, whatever the batches' sizes. c is the first batch's number of terms (its mean over ranks), so that
    the loss keeps the size of a mean and half precision does not overflow.

    Counts the terms of one step and rescales its gradients; empty again after each step.

    Args:
        reduction: "token": every response token weighs the same; "example": every example with at least one token does.
    """

    def __init__(self, reduction: str = "token") -> None:
        if reduction not in REDUCTIONS:
            cause = f"there is no reduction {reduction!r}"
            raise RequestError(message("reduction", cause, f"use one of {', '.join(REDUCTIONS)}"))
        self.reduction = reduction
        self.reset()

    def reset(self) -> None:
        """Forgets a step that was begun and not finished."""
        self._total: Tensor | None = None  # [terms, sum of terms]
        self._reference: Tensor | None = None

    def weights(self, counts: Tensor, reduce: Reduce | None = None) -> Tensor:
        """What a nat of each row adds to its batch's loss, float32 [B]: 1 / c, or 1 / (c · tokens of the row).

        A collective, once in each optimiser step. `counts` int64 [B] are the rows' response tokens.
        """
        token = self.reduction == "token"
        terms = counts.sum() if token else (counts > 0).sum()
        if self._total is None or self._reference is None:
            self._reference = _over_ranks(terms.to(torch.float32), "mean", reduce).clamp(min=1.0)
            self._total = torch.zeros(2, dtype=_wide(counts.device), device=counts.device)
        self._total[0] += terms
        return torch.ones_like(counts) / self._reference / (1 if token else counts.clamp(min=1))

    def add(self, loss: Tensor) -> None:
        """Takes note of a batch's loss under these weights."""
        if self._total is not None and self._reference is not None:
            self._total[1] += loss.detach().to(self._total.dtype) * self._reference

    def rescale(self, parameters: Iterable[Tensor], pieces: int, reduce: Reduce | None = None) -> Tensor | None:
        """Turns the accumulated gradients into those of the global mean; call it after the last backward of a step.

        `pieces` is what the arriving gradient has been divided by besides c: A·W. Returns the step's mean loss in nats
        (per token, or per example), a detached scalar; None if no loss was asked for. A collective.
        """
        if self._total is None or self._reference is None:
            return None
        terms, total = _over_ranks(self._total, "sum", reduce).unbind()
        mean = total / terms.clamp(min=1)
        factor = (pieces * self._reference / terms.clamp(min=1)).to(torch.float32)
        grads = [p.grad for p in parameters if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)
        self.reset()
        return mean


def _over_ranks(tensor: Tensor, how: str, reduce: Reduce | None) -> Tensor:
    return tensor if reduce is None else reduce(tensor, how)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
