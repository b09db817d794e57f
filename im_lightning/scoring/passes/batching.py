"""How many tokens go through a model at once (`Budget`), and how many batches side by side (`Lanes`).

Batches are even, and have fewer tokens once memory was short. On a CPU several run at once, each on threads of its own:
one batch on all cores waits at the end of every small operation for the slowest of them; two batches on half the cores
each do not. On an accelerator, or with one thread, there is one lane and no extra thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.progress import log
from im_lightning.models.device import ModelWork
from im_lightning.models.likelihood import plan_batches
from im_lightning.scoring.passes.base import release_memory

PADDING = 0.03  # largest share of padding in a batch
LAYER_FLOPS = {"cpu": 5e7, "cuda": 2e11}  # what the device could do in the time that calling a layer costs
MOST_CALL_TOKENS = 1024  # of padding, in place of another call of the model
CPU_CHANNELS = 1 << 20  # tokens x channels on a CPU: states that stay in its cache
CPU_TOKENS = 1024  # tokens at least, whose weights then are read seldom enough
NO_MEMORY = "out of memory with this row alone"
_SHORT = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
_T = TypeVar("_T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: CUDA's own error, and the plain RuntimeErrors of CPU and other allocators."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _SHORT)


class Budget:
    """Tokens per batch, padding included: halved when memory is short, and never raised again.

    `device` is a kind of device ("cpu", "cuda"); `what` is being batched, for the log.
    """

    def __init__(self, tokens: int, device: str, what: str) -> None:
        self.tokens, self.what, self._device = tokens, what, device
        self._call_tokens = 0.0

    def suit(self, work: ModelWork | None, width: int, chosen: bool) -> None:
        """Adapts to a model of `width` channels: fewer tokens where its states would leave a CPU's cache (unless the
        user has `chosen` them), fewer calls where they cost.
        """
        if not chosen and self._device == "cpu" and width:
            self.tokens = min(self.tokens, max(CPU_TOKENS, CPU_CHANNELS // width))
        if work is not None and work.body:
            call = LAYER_FLOPS.get(self._device, LAYER_FLOPS["cpu"]) * work.layers
            self._call_tokens = min(MOST_CALL_TOKENS, call / (2 * work.body))

    def plan(self, lengths: NDArray[np.int64] | list[int]) -> list[NDArray[np.int64]]:
        """Positions per batch, the longest first."""
        return plan_batches(lengths, self.tokens, PADDING, self._call_tokens)

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
                log(f"{self.what}: {NO_MEMORY} ({width:,} tokens); it stays without a value")
                yield at[piece], None
                continue
            # Lanes fail together: what another has halved meanwhile is not halved again for the same size.
            self.tokens = max(1, min(self.tokens, len(piece) * width // 2))
            log(
                f"{self.what}: out of memory with {len(piece):,} rows of up to {width:,} tokens; "
                f"going on with {self.tokens:,} tokens per batch (--batch-tokens {self.tokens} starts there)"
            )
            queue.appendleft(piece)


MOST_LANES = 8  # every lane reads the weights and keeps a batch's states
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Lanes:
    """A context in which `map` works on as many items at once (`count`) as suits the device ("cpu", "cuda").

    All lanes share `cores` threads, by default torch's number of threads.
    """

    def __init__(self, device: str, cores: int | None = None) -> None:
        import torch

        self._cores = torch.get_num_threads() if cores is None else cores
        self.count = min(self._cores, MOST_LANES) if device == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Lanes:
        if self.count > 1:
            import torch

            self._before = torch.get_num_threads()
            torch.set_num_threads(self._cores // self.count)  # threads started from here on take it over
            self._pool = ThreadPoolExecutor(self.count, "lane")
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            import torch

            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            torch.set_num_threads(self._before)

    def map(self, work: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[tuple[_In, _Out]]:
        """Items with their results, in order; a few items ahead of the caller, so that results do not pile up.

        `work` is called in several threads at once; an error of it is raised here.
        """
        if self._pool is None:
            for item in items:
                yield item, work(item)
            return
        waiting: deque[tuple[_In, Future[_Out]]] = deque()
        for item in items:
            waiting.append((item, self._pool.submit(work, item)))
            if len(waiting) > 2 * self.count:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()
