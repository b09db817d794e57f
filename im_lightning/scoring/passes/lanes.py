"""How many batches go through a model side by side (`Lanes`).

On a CPU several run at once, each on threads of its own: one batch on all cores waits at the end of every small
operation for the slowest of them; two batches on half the cores each do not. On an accelerator, or with one thread,
there is one lane and no extra thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
