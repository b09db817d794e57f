"""`ResumableDataLoader`: a DataLoader that knows which rows it has handed out, so that a fit resumes at the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from im_lightning.errors import RequestError, message
from im_lightning.sampling.draws.sampler import QualityWeightedSampler


class ResumableDataLoader(DataLoader[Any]):
    """A `DataLoader` over a `QualityWeightedSampler` whose position counts batches *yielded*, not prefetched.

    `__iter__` is a generator: nothing, no worker either, starts before the first batch is asked for, so a `set_epoch`
    in between is respected; and the position advances just before each batch is handed out, so a checkpoint written
    while a batch is trained on counts that batch. `state_dict` and `load_state_dict` are the sampler's: one sampler may
    serve several loaders, one after the other, and restoring through either does the same.

    With another sampler (Lightning's `overfit_batches` puts in a sequential one) it is an ordinary DataLoader: it keeps
    no position and its state is empty.

    Args: as for `torch.utils.data.DataLoader`; batches come from `sampler` and `batch_size` only.

    Raises:
        RequestError: no sampler, a `batch_sampler`, or `in_order=False`, under which rows could not be counted.

    >>> sampler = QualityWeightedSampler([1.0] * 6, num_samples=6)
    >>> loader = ResumableDataLoader(range(6), batch_size=2, sampler=sampler)
    >>> _ = next(iter(loader))
    >>> loader.state_dict()["position"]
    2
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[int] | None = None,
        batch_sampler: None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: Any = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
    ) -> None:
        if sampler is None or shuffle or batch_sampler is not None or not in_order:
            raise RequestError(
                message(
                    "ResumableDataLoader",
                    "its order must come from sampler= and batch_size= alone, or it could not be resumed",
                    "pass sampler=QualityWeightedSampler(…); leave out shuffle, batch_sampler and in_order",
                )
            )
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            drop_last=drop_last,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            generator=generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        if not isinstance(sampler, QualityWeightedSampler):
            yield from super().__iter__()
            return
        left = sampler.remaining()  # before the workers start: they consume the restored position
        size = self.batch_size or 1
        for batch in super().__iter__():
            rows = min(size, left)
            left -= rows
            sampler.advance(rows)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state: rows handed out so far, over all ranks."""
        return self.sampler.state_dict() if isinstance(self.sampler, QualityWeightedSampler) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the sampler's state; the next iteration goes on from there.

        Raises:
            RequestError: the sampler keeps no position, yet the state holds one.
        """
        if isinstance(self.sampler, QualityWeightedSampler):
            self.sampler.load_state_dict(state)
        elif state:
            raise RequestError(
                message(
                    "resume",
                    f"the loader's sampler is a {type(self.sampler).__name__}, which keeps no position",
                    "pass sampler=QualityWeightedSampler(…)",
                )
            )
