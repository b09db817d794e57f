"""How many tokens go through a model at once: even batches, and fewer tokens once memory was short."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from im_lightning._progress import log
from im_lightning.models.batching import plan_batches
from im_lightning.scoring.passes import release_memory

PADDING = 0.03  # largest share of padding in a batch
LEAST_TOKENS = {"cpu": 512, "cuda": 8192}  # what costs about as much time as a call of the model itself
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

    Args:
        tokens: To begin with.
        device: Kind of device ("cpu", "cuda").
        what: Who is being batched, for the log.
    """

    def __init__(self, tokens: int, device: str, what: str) -> None:
        self.tokens, self.what = tokens, what
        self._least = LEAST_TOKENS.get(device, LEAST_TOKENS["cpu"])

    def plan(self, lengths: NDArray[np.int64] | list[int]) -> list[NDArray[np.int64]]:
        """Positions per batch, the longest first."""
        return plan_batches(lengths, self.tokens, PADDING, self._least)

    def run(
        self, at: NDArray[np.int64], lengths: NDArray[np.int64], work: Callable[[NDArray[np.int64]], _T]
    ) -> Iterator[tuple[NDArray[np.int64], _T | None]]:
        """Does the work of a batch, in pieces where memory is short.

        Args:
            at: What is in the batch, B items.
            lengths: Their tokens, int64 [B].
            work: Called with a piece of `at`.

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
            self.tokens = max(1, min(self.tokens, len(piece) * width) // 2)
            log(
                f"{self.what}: out of memory with {len(piece):,} rows of up to {width:,} tokens; "
                f"going on with {self.tokens:,} tokens per batch (--batch-tokens {self.tokens} starts there)"
            )
            queue.appendleft(piece)
