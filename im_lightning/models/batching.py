"""How many tokens go through a model at once: batches planned by length (`plan_batches`), fewer tokens once memory was
short (`Budget`), and the micro-batches that a batch is gone through in (`micro_batches`, `micro_batched_loss`).

On a CPU micro-batches go through the model side by side where that is faster; their gradients are added up in the order
of the plan, so that the sum is always the same.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from im_lightning._utils.progress import log
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.models.device import Lanes, ModelWork, model_work
from im_lightning.models.likelihood import base_model

PADDING = 0.03  # largest share of padding in a batch
LAYER_FLOPS = {"cpu": 5e7, "cuda": 2e11}  # what the device could do in the time that calling a layer costs
MOST_CALL_TOKENS = 1024  # of padding, in place of another call of the model
CPU_CHANNELS = 1 << 20  # tokens x channels on a CPU: states that stay in its cache
CPU_TOKENS = 1024  # tokens at least, whose weights then are read seldom enough
TRAINING_TOKENS = {"cpu": 1024}  # of a micro-batch: enough that the weights are read seldom, few enough for the cache
MOST_TRAINING_TOKENS = 16384
MEMORY_SHARE = 0.6  # of what is there, for the activations of a micro-batch
WAITING = 1.1  # time of lanes whose work is uneven, beside that of one lane on all cores
LANES_TRAINED = 0.1  # largest share of the weights that is trained in several lanes
LANES_CALL = 64  # most tokens that calling the model costs there: below, Python's lock is what lanes wait for
NO_MEMORY = "out of memory with this row alone"
_SHORT = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
_T = TypeVar("_T")


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
        >>> pieces, lanes = Budget(16, "cpu", "training", lanes=2).side_by_side(np.array([8, 2, 2]))
        >>> [at.tolist() for at in pieces], lanes
        ([[0], [1, 2]], 1)
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


def training_tokens(network: nn.Module, device: torch.device, lanes: int = 1) -> int:
    """Tokens of a micro-batch that the device has memory for, `lanes` of them at once, by the shape of a LLaMA.

    Kept for the backward pass, per token: in each layer 18 states of the width and 6 of the inner width, or with
    gradient checkpointing the layer's input alone; and the logits, at most of every token, four times in fp32. Beside
    them the optimiser's two moments and the gradients in fp32.
    """
    most = TRAINING_TOKENS.get(device.type, MOST_TRAINING_TOKENS)
    config: Any = getattr(network, "config", None)
    width, inner, layers, vocabulary = (
        int(getattr(config, name, 0) or 0)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    free = _memory(device)
    if not (width and layers and free):
        return min(most, 4096)
    floats = 18 * width + 6 * (inner or 4 * width)
    if any(getattr(module, "gradient_checkpointing", False) for module in network.modules()):
        floats += layers * width
    else:
        floats *= layers
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    left = MEMORY_SHARE * (free - 12 * trained) / lanes
    size = min(p.element_size() for p in network.parameters() if p.is_floating_point())
    return int(min(most, max(1.0, left / (floats * size + 16 * vocabulary))))


def _memory(device: torch.device) -> int:
    """Bytes for what a fit still has to make; 0 where they are not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 0
