"""The training loss as one mean over everything an optimiser step saw: all micro-batches, all ranks.

Lightning divides each micro-batch's loss by `accumulate_grad_batches` (A) and DDP averages gradients over the ranks
(W). Averaging batch means so would weigh a token in a short batch more than one in a long batch. Here each
micro-batch's loss is (sum of its terms) / c with a c that is the same for all micro-batches and ranks of the step, so
the gradient that arrives is  Σ grad(sum) / (A·W·c);  times  A·W·c / N,  N the number of terms of the whole step, it is
the gradient of the global mean, whatever the batches' sizes. c is the first micro-batch's number of terms (its mean
over ranks), so that the loss keeps the size of a mean and half precision does not overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from im_lightning.errors import RequestError, message

REDUCTIONS = ("token", "example")

Reduce = Callable[[Tensor, str], Tensor]
"""(tensor, "sum" or "mean") -> the tensor reduced over all ranks."""


class StepMean:
    """Counts the terms of one optimiser step and rescales its gradients; empty again after each step.

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

    def loss(self, sums: Tensor, counts: Tensor, reduce: Reduce) -> Tensor:
        """The micro-batch's loss for backward.

        Args:
            sums: float [B], each example's summed response NLL in nats, with gradient.
            counts: int64 [B], its number of response tokens.
            reduce: How to reduce over ranks; a collective, once in each optimiser step.

        Returns:
            A scalar: (sum of terms) / c.
        """
        if self.reduction == "token":
            total, terms = sums.sum(), counts.sum()
        else:
            total, terms = (sums / counts.clamp(min=1)).sum(), (counts > 0).sum()
        if self._total is None or self._reference is None:
            self._reference = reduce(terms.to(torch.float32), "mean").clamp(min=1.0)
            self._total = torch.zeros(2, dtype=_wide(sums.device), device=sums.device)
        self._total += torch.stack([terms.to(self._total.dtype), total.detach().to(self._total.dtype)])
        return total / self._reference.to(total.dtype)

    def rescale(self, parameters: Iterable[Tensor], pieces: int, reduce: Reduce) -> Tensor | None:
        """Turns the accumulated gradients into those of the global mean; call it after the last backward of a step.

        Args:
            parameters: Whose `.grad` to rescale in place.
            pieces: What the arriving gradient has been divided by besides c: A·W.
            reduce: How to reduce over ranks; a collective, once in each optimiser step.

        Returns:
            The step's mean loss in nats (per token, or per example), a detached scalar; None if no loss was asked for.
        """
        if self._total is None or self._reference is None:
            return None
        terms, total = reduce(self._total, "sum").unbind()
        mean = total / terms.clamp(min=1)
        factor = (pieces * self._reference / terms.clamp(min=1)).to(torch.float32)
        grads = [p.grad for p in parameters if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)
        self.reset()
        return mean


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
