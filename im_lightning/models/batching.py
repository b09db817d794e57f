"""How many tokens go through a model at once: batches planned by length (`plan_batches`), fewer tokens once memory was
short (`Budget`), and the micro-batches that a batch is gone through in (`micro_batches`, `micro_batched_loss`).

The loss of an optimiser step (`StepMean`) is a sum over rows of summed NLL times weights that are known before any
model has run, so that its gradient is the sum of the micro-batches' gradients, whatever they hold. On a CPU these go
through the model side by side where that is faster, and are added in the order of the plan: always the same sum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from im_lightning._utils.progress import log
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.models.device import Lanes, ModelWork, model_work, training_tokens
from im_lightning.models.likelihood import base_model

REDUCTIONS = ("token", "example")
PADDING = 0.03  # largest share of padding in a batch
LAYER_FLOPS = {"cpu": 5e7, "cuda": 2e11}  # what the device could do in the time that calling a layer costs
MOST_CALL_TOKENS = 1024  # of padding, in place of another call of the model
CPU_CHANNELS = 1 << 20  # tokens x channels on a CPU: states that stay in its cache
CPU_TOKENS = 1024  # tokens at least, whose weights then are read seldom enough
WAITING = 1.1  # time of lanes whose work is uneven, beside that of one lane on all cores
LANES_TRAINED = 0.1  # largest share of the weights that is trained in several lanes
LANES_CALL = 64  # most tokens that calling the model costs there: below, Python's lock is what lanes wait for
NO_MEMORY = "out of memory with this row alone"
_SHORT = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
_T = TypeVar("_T")
Reduce = Callable[[Tensor, str], Tensor]
"""(tensor, "sum", "mean" or "min") -> the tensor reduced over all ranks. None where there is one rank."""


def plan_batches(
    lengths: Sequence[int] | np.ndarray, batch_tokens: int, padding: float = 1.0, call_tokens: float = 0.0
) -> list[np.ndarray]:
    """Splits rows into batches of like length, the longest first, so that memory peaks at once and padding stays small.

    Args:
        lengths: Tokens of each row, [N].
        batch_tokens: Most tokens of a batch, padding included; a longer row gets a batch of its own.
        padding: Largest share of padding in a batch: a batch ends where the next row would raise it further.
        call_tokens: Padding up to which a batch goes on all the same: what another call of the model would cost.

    Returns:
        Row positions (int64) per batch; every row is in exactly one. Equal lengths keep their order.

    >>> [b.tolist() for b in plan_batches([3, 9, 4, 4], 8)]
    [[1], [2, 3], [0]]
    >>> [b.tolist() for b in plan_batches([10, 10, 8, 8, 5], 100, padding=0.1)]
    [[0, 1, 2, 3], [4]]
    """
    if batch_tokens < 1:
        raise RequestError(message(f"batch_tokens {batch_tokens}", "is less than one token", "give 1 or more"))
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    sizes = np.maximum(1, sizes[order])
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        most = max(1, batch_tokens // int(sizes[start]))
        inside = sizes[start : start + most]
        padded = sizes[start] * np.arange(1, len(inside) + 1)
        too_much = padded - np.cumsum(inside) > np.maximum(padding * padded, call_tokens)
        rows = int(too_much.argmax()) if too_much.any() else len(inside)
        batches.append(order[start : start + rows])
        start += rows
    return batches


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: CUDA's own error, and the plain RuntimeErrors of CPU and other allocators."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _SHORT)


class Budget:
    """Tokens per batch, padding included: halved when memory is short, and never raised again.

    `device` is a kind of device ("cpu", "cuda"); `what` is being batched and `option` sets the tokens, for the log;
    `lanes` is the most batches that may be gone through side by side, all of them within the budget.
    """

    def __init__(self, tokens: int, device: str, what: str, option: str = "--batch-tokens", lanes: int = 1) -> None:
        self.tokens, self.what, self.lanes, self._device, self._option = tokens, what, lanes, device, option
        self.call_tokens = 0.0

    def suit(self, work: ModelWork | None, width: int, chosen: bool) -> None:
        """Adapts to a model of `width` channels: fewer tokens where its states would leave a CPU's cache (unless the
        user has `chosen` them), fewer calls where they cost.
        """
        if not chosen and self._device == "cpu" and width:
            self.tokens = min(self.tokens, max(CPU_TOKENS, CPU_CHANNELS // width))
        if work is not None and work.body:
            call = LAYER_FLOPS.get(self._device, LAYER_FLOPS["cpu"]) * work.layers
            self.call_tokens = min(MOST_CALL_TOKENS, call / (2 * work.body))

    def plan(self, lengths: NDArray[np.int64] | list[int], tokens: int = 0) -> list[NDArray[np.int64]]:
        """Positions per batch, the longest first; of at most `tokens` tokens, if fewer than the budget's."""
        return plan_batches(lengths, min(tokens or self.tokens, self.tokens), PADDING, self.call_tokens)

    def side_by_side(self, lengths: NDArray[np.int64]) -> tuple[list[NDArray[np.int64]], int]:
        """Positions per batch, and how many batches to go through at once.

        As many as leave hardly a lane waiting for another (`WAITING`) when each takes the next batch as soon as it is
        free, and stay within the budget together.

        >>> pieces, lanes = Budget(16, "cpu", "training", lanes=2).side_by_side(np.array([8, 5, 3]))
        >>> [at.tolist() for at in pieces], lanes
        ([[0], [1], [2]], 2)
        """
        alone = self.plan(lengths)
        lanes = min(self.lanes, len(lengths))
        while lanes > 1:
            pieces = self.plan(lengths, max(1, self.tokens // lanes))
            padded, loads = _padded(pieces, lengths), [0] * lanes
            for tokens in padded:
                loads[loads.index(min(loads))] += tokens
            most = WAITING * sum(_padded(alone, lengths)) / lanes
            if max(loads) <= most and sum(sorted(padded)[-lanes:]) <= self.tokens:
                return pieces, lanes
            lanes //= 2
        return alone, 1

    def run(
        self, at: NDArray[np.int64], lengths: NDArray[np.int64], work: Callable[[NDArray[np.int64]], _T]
    ) -> Iterator[tuple[NDArray[np.int64], _T | None]]:
        """Does the work of a batch `at` of B items of `lengths` tokens, in pieces where memory is short.

        Yields:
            Pieces of `at` with the work's result; None for an item that does not fit even alone.
        """
        queue = deque([np.arange(len(at))])
        while queue:
            piece = queue.popleft()
            if len(piece) > 1 and len(piece) * int(lengths[piece].max()) > self.tokens:
                queue.extendleft(piece[part] for part in reversed(self.plan(lengths[piece])))
                continue
            short = False
            try:
                result: _T | None = work(at[piece])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                short, result = True, None
            if not short:
                yield at[piece], result
                continue
            release_memory()  # after the error is gone, with the frames that hold the tensors
            width = int(lengths[piece].max())
            if len(piece) == 1:
                log(f"{self.what}: {NO_MEMORY} ({width:,} tokens)")
                yield at[piece], None
                continue
            # Lanes fail together: what another has halved meanwhile is not halved again for the same size.
            self.tokens = max(1, min(self.tokens, len(piece) * width // 2))
            log(
                f"{self.what}: out of memory with {len(piece):,} rows of up to {width:,} tokens; "
                f"going on with {self.tokens:,} tokens per batch ({self._option} {self.tokens} starts there)"
            )
            queue.appendleft(piece)


def _padded(pieces: list[NDArray[np.int64]], lengths: NDArray[np.int64]) -> list[int]:
    """Tokens of each batch, padding included."""
    return [len(at) * int(lengths[at].max()) for at in pieces]


def release_memory() -> None:
    """Gives back what a freed model held."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def micro_batches(
    batch: Mapping[str, Tensor], budget: Budget, work: Callable[[Tensor, dict[str, Tensor]], _T]
) -> Iterator[tuple[Tensor, _T]]:
    """Goes through a padded batch of B rows in pieces of like length, the longest first, within a budget of tokens.

    Args:
        batch: `attention_mask` and other tensors of B rows ([B, T] or [B]), padded on the right.
        budget: Halved where memory is short; the work of the piece is then done again in smaller ones. Where it has
            lanes, pieces are gone through side by side.
        work: Called with positions int64 [n] in the batch and the piece, padded to its own longest row.

    Yields:
        Positions and the work's result, in the order of the plan.

    Raises:
        InstructMiningError: memory is short for one row alone.
    """
    mask = batch["attention_mask"]
    lengths = mask.sum(dim=1).cpu().numpy()
    tensors = {name: v for name, v in batch.items() if isinstance(v, Tensor) and v.shape[:1] == mask.shape[:1]}

    def piece(at: NDArray[np.int64]) -> tuple[Tensor, _T]:
        rows, width = torch.from_numpy(at).to(mask.device), int(lengths[at].max())
        part = {name: v[rows, :width] if v.shape == mask.shape else v[rows] for name, v in tensors.items()}
        return rows, work(rows, part)

    def within_budget(planned: NDArray[np.int64]) -> Iterator[tuple[Tensor, _T]]:
        for at, done in budget.run(planned, lengths[planned], piece):
            if done is None:
                cause = f"out of memory with one row of {int(lengths[at[0]]):,} tokens alone"
                remedy = "lower max_length, turn gradient_checkpointing on, or take a smaller model"
                raise InstructMiningError(message(budget.what, cause, remedy))
            yield done

    plan, count = budget.side_by_side(lengths)
    if count == 1:
        for planned in plan:
            yield from within_budget(planned)
        return
    with Lanes("cpu", most=count) as lanes:
        for _, done in lanes.map(lambda planned: list(within_budget(planned)), plan, ahead=len(plan)):
            yield from done


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
            wide = torch.float32 if counts.device.type == "mps" else torch.float64  # MPS has no float64
            self._total = torch.zeros(2, dtype=wide, device=counts.device)
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


class _Differentiated(torch.autograd.Function):
    """A loss whose gradients are there already: its backward hands them to the parameters, scaled."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: float, grads: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.scale, ctx.grads = scale, grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None  # no second reference: a parameter without a gradient takes them over
        torch._foreach_mul_([grad for grad in grads if grad is not None], factor / ctx.scale)
        return (None, None, None, *grads)


def micro_batched_loss(
    summed_nll: Callable[[dict[str, Tensor]], Tensor],
    batch: Mapping[str, Tensor],
    weights: Tensor,
    parameters: Iterable[Tensor],
    budget: Budget | int,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Σ weights · summed NLL of a batch of B rows, computed and differentiated in micro-batches without padding.

    What is returned behaves like the loss of the whole batch: one `backward` gives `parameters` the whole gradient, so
    that accumulation, clipping, mixed precision and DDP mean what they mean without micro-batches. In between no hook
    is called and no gradient is synchronised.

    Args:
        summed_nll: Of a batch: each row's summed NLL in nats, [n], with gradient.
        batch: `attention_mask`, `input_ids`, … of B rows, padded on the right.
        weights: Of each row's summed NLL, [B], or one for all; for the mean over tokens 1 / tokens of the batch.
        parameters: What is trained; the loss is differentiated with respect to those that require a gradient.
        budget: Tokens of a micro-batch, padding included; a `Budget` keeps what is halved when memory is short, and may
            have lanes: `summed_nll` is then called in several threads at once, unless it draws random numbers.
        scale: By which the loss is multiplied while it is differentiated, so that half precision does not underflow.

    Returns:
        The loss, a scalar for one backward, and each row's summed NLL in nats, detached, float32 [B].

    Raises:
        InstructMiningError: memory is short for one row alone.

    >>> weight = torch.tensor(2.0, requires_grad=True)
    >>> batch = {"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    >>> nll = lambda part: weight * part["attention_mask"].sum(dim=1)
    >>> loss, sums = micro_batched_loss(nll, batch, torch.tensor(0.25), [weight], budget=3)
    >>> loss.backward()
    >>> loss.item(), sums.tolist(), weight.grad.item()
    (2.0, [6.0, 2.0], 1.0)
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    mask = batch["attention_mask"]
    if isinstance(budget, int):
        budget = Budget(budget, mask.device.type, "training", "tokens=")
    weights = weights.expand(len(mask))

    def differentiate(rows: Tensor, part: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        sums = summed_nll(part)
        loss = (sums * weights[rows]).sum() * scale
        return sums.detach().float(), torch.autograd.grad(loss, trained, allow_unused=True)

    def whole() -> tuple[Tensor, list[Tensor | None]]:
        sums, grads = torch.zeros(len(mask), device=mask.device), list[Tensor | None]([None] * len(trained))
        for rows, (part, new) in micro_batches(batch, budget, differentiate):
            both = [(a, b) for a, b in zip(grads, new, strict=True) if a is not None and b is not None]
            if both:  # allocates nothing, so memory is never short in the middle of it
                torch._foreach_add_([a for a, _ in both], [b for _, b in both])
            grads = [b if a is None else a for a, b in zip(grads, new, strict=True)]
            sums[rows] = part.to(sums.device)
        return sums, grads

    random = torch.get_rng_state() if budget.lanes > 1 else None
    sums, grads = whole()
    if random is not None and not torch.equal(random, torch.get_rng_state()):
        # dropout: which lane drew first is chance, so this batch and all others go through one piece at a time
        budget.lanes = 1
        del grads
        torch.set_rng_state(random)
        sums, grads = whole()
    return _Differentiated.apply((sums * weights).sum(), scale, grads, *trained), sums


def training_budget(network: nn.Module, device: torch.device, tokens: int | str, what: str, option: str) -> Budget:
    """Tokens of the micro-batches of a finetune, "auto" by memory, and how many may go through side by side.

    On a CPU several, where that is faster: adapters of a model whose layers cost more than calling them. Gradients of
    all weights are large products, which all cores share well, and would be held once for each micro-batch.

    `what` is being trained and `option` sets the tokens, for the log.
    """
    found = training_tokens(network, device) if tokens == "auto" else int(tokens)
    budget = Budget(found, device.type, what, option)
    budget.suit(model_work(base_model(network)), 0, True)
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    adapters = sum(size for size, trained in sizes if trained) <= LANES_TRAINED * sum(size for size, _ in sizes)
    if adapters and budget.call_tokens <= LANES_CALL:
        budget.lanes = Lanes(device.type).count
    return budget
