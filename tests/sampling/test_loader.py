"""If these failed, a fit stopped in the middle of an epoch would see rows twice or never after it resumes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset, SequentialSampler

from im_lightning.errors import RequestError
from im_lightning.sampling.draws.sampler import QualityWeightedSampler, ResumableDataLoader

WEIGHTS = np.random.default_rng(0).gamma(0.7, size=60)


class Rows(Dataset[int]):
    def __getitem__(self, row: int) -> int:
        return row

    def __len__(self) -> int:
        return 60


def collate(rows: list[int]) -> list[int]:
    return rows


def make(ranks: int = 1, rank: int = 0, workers: int = 0, **options: Any) -> ResumableDataLoader:
    sampler = QualityWeightedSampler(WEIGHTS, 22, num_replicas=ranks, rank=rank, seed=1)
    return ResumableDataLoader(
        Rows(), sampler=sampler, batch_size=4, num_workers=workers, collate_fn=collate, **options
    )


def epochs(loader: ResumableDataLoader, first: int = 0, last: int = 2) -> list[list[int]]:
    batches = []
    for epoch in range(first, last):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches += list(loader)
    return batches


def stop_after(loader: ResumableDataLoader, batches: int) -> tuple[list[list[int]], dict[str, Any]]:
    seen: list[list[int]] = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in loader:
            seen.append(batch)
            if len(seen) == batches:
                return seen, loader.state_dict()
    raise AssertionError("the stream is shorter than that")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("drop_last", [False, True])
def test_stopped_after_any_batch_the_stream_goes_on_as_if_undisturbed(rank: int, drop_last: bool) -> None:
    for ranks in (1, 2) if rank == 0 else (2,):
        whole = epochs(make(ranks, rank, drop_last=drop_last))
        for batches in range(1, len(whole) + 1):
            seen, state = stop_after(make(ranks, rank, drop_last=drop_last), batches)
            fresh = make(ranks, rank, drop_last=drop_last)
            fresh.load_state_dict(state)
            assert seen + epochs(fresh, first=state["epoch"]) == whole


@pytest.mark.parametrize("persistent", [False, True])
def test_with_workers_prefetched_batches_do_not_count(persistent: bool) -> None:
    whole = epochs(make())
    options = {"workers": 2, "prefetch_factor": 4, "persistent_workers": persistent}
    for batches in (1, 6, 8):  # the first, the last of epoch 0, in the middle of epoch 1; of 6 per epoch
        seen, state = stop_after(make(**options), batches)
        assert state["position"] == (22 if batches == 6 else 4 * (batches % 6))
        fresh = make(**options)
        fresh.load_state_dict(state)
        assert seen + epochs(fresh, first=state["epoch"]) == whole


def test_persistent_workers_go_on_after_an_abandoned_epoch() -> None:
    loader = make(workers=2, persistent_workers=True)
    loader.sampler.set_epoch(0)  # type: ignore[attr-defined]
    next(iter(loader))
    assert epochs(loader, first=1) == epochs(make(), first=1)


def test_two_ranks_resumed_on_one_see_exactly_the_rest() -> None:
    parts = [stop_after(make(ranks=2, rank=rank), 2) for rank in range(2)]
    assert parts[0][1] == parts[1][1]
    taken = [row for seen, _ in parts for batch in seen for row in batch]
    one = make()
    one.load_state_dict(parts[1][1])
    rest = [row for batch in epochs(one, last=1) for row in batch]
    whole = [row for batch in epochs(make(), last=1) for row in batch]
    assert len(taken) == 16 and sorted(taken + rest) == sorted(whole) and rest == whole[16:]


def test_nothing_starts_before_the_first_batch_is_asked_for() -> None:
    loader = make()
    iterator = iter(loader)  # Lightning does this before it says which epoch it is
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert list(iterator) == epochs(make(), first=1)


def test_one_sampler_serves_several_loaders() -> None:
    first = make()
    seen, state = stop_after(first, 2)
    again = ResumableDataLoader(Rows(), sampler=first.sampler, batch_size=4, collate_fn=collate)
    first.sampler.load_state_dict(state)  # type: ignore[attr-defined]
    assert seen + epochs(again) == epochs(make())


def test_the_length_stays_that_of_a_full_epoch() -> None:
    loader = make()
    _, state = stop_after(loader, 3)
    fresh = make()
    fresh.load_state_dict(state)
    assert len(fresh) == len(loader) == 6


def test_single_rows_without_batches_are_counted() -> None:
    loader = ResumableDataLoader(Rows(), sampler=make().sampler, batch_size=None)
    assert len([row for row, _ in zip(loader, range(3), strict=False)]) == 3
    assert loader.state_dict()["position"] in (3, 4)  # zip asks for one row more before it notices


def test_a_sequential_sampler_makes_it_an_ordinary_loader() -> None:
    loader = ResumableDataLoader(Rows(), sampler=SequentialSampler(Rows()), batch_size=30, collate_fn=collate)
    assert list(loader) == [list(range(30)), list(range(30, 60))]
    assert loader.state_dict() == {}
    loader.load_state_dict({})
    with pytest.raises(RequestError, match="SequentialSampler, which keeps no position"):
        loader.load_state_dict({"epoch": 0})


@pytest.mark.parametrize(
    "options", [{"sampler": None}, {"shuffle": True}, {"in_order": False}, {"batch_sampler": [[1]]}]
)
def test_an_order_it_could_not_resume_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"must come from sampler= and batch_size= alone.*QualityWeightedSampler"):
        ResumableDataLoader(Rows(), **({"sampler": make().sampler} | options))
