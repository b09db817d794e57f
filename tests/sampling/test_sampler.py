"""If these failed, ranks would train on the same rows, or a resumed fit on other rows than the one that was stopped."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from im_lightning.errors import DataError, RequestError
from im_lightning.sampling.draws.sampler import QualityWeightedSampler

WEIGHTS = np.random.default_rng(0).gamma(0.7, size=200)


def sampler(n: int = 50, ranks: int = 1, rank: int = 0, seed: int = 3, replacement: bool = False, weights=WEIGHTS):  # type: ignore[no-untyped-def]
    return QualityWeightedSampler(weights, n, replacement=replacement, num_replicas=ranks, rank=rank, seed=seed)


def test_lightning_will_leave_it_alone() -> None:
    assert isinstance(sampler(), DistributedSampler)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_deal_out_the_one_global_draw(ranks: int, replacement: bool) -> None:
    alone = list(sampler(n=50, replacement=replacement))
    parts = [list(sampler(n=50, ranks=ranks, rank=r, replacement=replacement)) for r in range(ranks)]
    assert {len(part) for part in parts} == {50 // ranks}  # 50 on 4 ranks: two rows at the end are left out
    assert [len(sampler(n=50, ranks=ranks, rank=r)) for r in range(ranks)] == [50 // ranks] * ranks
    dealt = [row for group in zip(*parts, strict=True) for row in group]
    assert dealt == alone[: len(dealt)]
    if not replacement:
        assert len(set(dealt)) == len(dealt)


def test_the_draw_is_a_function_of_seed_and_epoch_alone() -> None:
    one, other = sampler(), sampler()
    np.random.seed(1)  # noqa: NPY002  the global state must not matter
    torch.manual_seed(1)
    for epoch in (0, 2, 1):
        one.set_epoch(epoch)
    other.set_epoch(1)
    torch.manual_seed(2)
    assert list(one) == list(other)
    draws = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 2)):  # seed + epoch collides four times here
        s = sampler(seed=seed)
        s.set_epoch(epoch)
        draws.add(tuple(s))
    assert len(draws) == 6


@pytest.mark.parametrize("stop", [0, 1, 7, 24, 25])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (4, 1), (1, 2), (2, 4)])
def test_a_position_resumes_on_any_number_of_ranks(stop: int, before: int, after: int) -> None:
    whole = list(sampler())
    taken: list[int] = []
    state = {}
    for rank in range(before):
        s = sampler(ranks=before, rank=rank)
        rows = list(s)[: stop // before]
        s.advance(len(rows))
        taken += rows
        state = s.state_dict()  # any rank's will do
    assert state["position"] == len(taken)
    rest: list[int] = []
    for rank in range(after):
        s = sampler(ranks=after, rank=rank, seed=99)
        s.load_state_dict(state)
        left = s.remaining()
        rows = list(s)
        assert len(rows) == left and len(s) == 50 // after
        rest += rows
    missing = set(whole) - set(taken) - set(rest)
    assert len(taken) + len(rest) + len(missing) == 50 and not set(taken) & set(rest)
    assert len(missing) < after and missing <= set(whole[50 - after + 1 :])


def test_the_restored_position_is_used_once_and_kept_by_the_same_epoch() -> None:
    s = sampler()
    full = list(s)
    s.set_epoch(0)
    s.advance(20)
    state = s.state_dict()
    fresh = sampler()
    fresh.load_state_dict(state)
    fresh.load_state_dict(state)  # Lightning may restore through the loader and the data module
    fresh.set_epoch(0)  # and calls set_epoch for the restored epoch
    assert fresh.state_dict() == state
    assert list(fresh) == full[20:]
    assert list(fresh) == full
    fresh.load_state_dict(state)
    fresh.set_epoch(1)
    assert fresh.position == 0 and len(list(fresh)) == 50


def test_the_state_is_plain_and_says_all() -> None:
    s = sampler()
    s.set_epoch(4)
    s.advance(3)
    state = s.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert {type(value) for value in state.values()} <= {int, str, bool}
    assert (state["seed"], state["epoch"], state["position"]) == (3, 4, 3)
    copy = pickle.loads(pickle.dumps(s))
    assert copy.state_dict() == state and list(copy) == list(s)


def test_weights_change_between_epochs_only() -> None:
    new = WEIGHTS[::-1].copy()
    s, plain = sampler(), sampler(weights=new)
    before = list(s)
    s.update_weights(new)
    assert list(s) == before
    s.set_epoch(1)
    plain.set_epoch(1)
    assert list(s) == list(plain)
    plain.load_state_dict(s.state_dict())


def test_a_resume_with_other_weights_is_an_error_that_names_both() -> None:
    s, other = sampler(), sampler(weights=WEIGHTS + 1)
    mine, theirs = s.state_dict()["weights"], other.state_dict()["weights"]
    with pytest.raises(RequestError, match=f"checkpoint has weights {mine}, this sampler {theirs}.*same pool, rule"):
        other.load_state_dict(s.state_dict())


def test_a_pending_update_must_be_made_again_before_resuming() -> None:
    s, fresh = sampler(), sampler()
    s.update_weights(WEIGHTS + 1)
    with pytest.raises(RequestError, match=r"for the next epoch, this sampler none.*update_weights"):
        fresh.load_state_dict(s.state_dict())
    fresh.update_weights(WEIGHTS + 1)
    fresh.load_state_dict(s.state_dict())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_samples": 60}, "num_samples 60, this sampler 50.*budget"),
        ({"replacement": True}, "replacement True, this sampler False"),
        ({"draws": "0"}, "resume under numpy 9.9"),
    ],
)
def test_a_resume_that_would_draw_otherwise_is_refused(change: dict[str, object], text: str) -> None:
    s = sampler()
    with pytest.raises(RequestError, match=text):
        s.load_state_dict(s.state_dict() | {"numpy": "9.9"} | change)


@pytest.mark.parametrize("state", [{}, {"epoch": 0, "position": 3}, {"position": 51}, {"position": -1}, {"seed": "3"}])
def test_a_foreign_state_is_named(state: dict[str, object]) -> None:
    s = sampler()
    full = s.state_dict() | state if len(state) == 1 else state
    with pytest.raises(DataError, match=r"sampler state: .* is missing or of the wrong kind"):
        s.load_state_dict(full)


def test_requests_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(RequestError, match="rank=2, num_replicas=2"):
        sampler(ranks=2, rank=2)
    with pytest.raises(RequestError, match="4 ranks would not get a row each"):
        sampler(n=3, ranks=4)
    with pytest.raises(RequestError, match="only 1 of 2 rows have a positive weight"):
        QualityWeightedSampler([1.0, 0.0], 2)
    with pytest.raises(RequestError, match="no row has a positive weight"):
        QualityWeightedSampler([0.0, 0.0], 2, replacement=True)
    with pytest.raises(RequestError, match="199 weights were given for 200 rows"):
        sampler().update_weights(WEIGHTS[1:])
    with pytest.raises(RequestError, match="only 1 of 200 rows"):
        sampler().update_weights(np.eye(200)[0])
    with pytest.raises(RequestError, match="epoch=-1"):
        sampler().set_epoch(-1)


def test_a_million_rows_stay_within_forty_bytes_each() -> None:
    # 10^8 rows must fit: measured at 10^6, where fixed costs still weigh more than there.
    import tracemalloc

    rows = 1_000_000
    tracemalloc.start()
    try:
        weights = np.random.default_rng(0).gamma(0.5, size=rows)
        s = QualityWeightedSampler(weights, rows // 2)
        for epoch in range(2):
            s.set_epoch(epoch)
            next(iter(s))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / rows <= 40
