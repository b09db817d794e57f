"""knn_<i> against scikit-learn, with duplicates, ties and blocks. A wrong neighbour is a wrong diversity score."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from im_lightning.errors import RequestError
from im_lightning.indicators import _knn_exact as neighbours
from im_lightning.indicators import knn
from im_lightning.indicators.base import Reference, get_indicator
from im_lightning.indicators.knn import KNNIndicator, neighbour_distances, unit_rows


def pool(n: int, seed: int = 0) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).normal(size=(n, 24)).astype(np.float32))


def reference(vectors: np.ndarray, ranks: list[int]) -> np.ndarray:
    search = NearestNeighbors(algorithm="brute").fit(vectors.astype(np.float64))
    return search.kneighbors(n_neighbors=max(ranks))[0][:, [r - 1 for r in ranks]]


@pytest.mark.parametrize("block", [64, 100, 2048])
def test_equals_scikit_learn_over_several_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    vectors = pool(1003)
    np.testing.assert_allclose(neighbour_distances(vectors, [1, 6, 20]), reference(vectors, [1, 6, 20]), rtol=1e-6)


def test_equals_scikit_learn_on_a_device_with_its_own_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search of GPUs, run here on the CPU; TF32, which Lightning users switch on, must not reach it."""
    import torch

    def on_device(vectors: np.ndarray, keep: int, device: str, alive: np.ndarray | None) -> neighbours.Candidates:
        return neighbours._nearest_on_device(vectors, vectors, np.arange(len(vectors)), keep, "cpu", alive)

    monkeypatch.setattr(knn, "nearest_within", on_device)
    monkeypatch.setattr(neighbours, "_DEVICE_COLUMNS", 300)
    vectors = pool(1003)
    vectors[[5, 700]] = np.nan
    torch.set_float32_matmul_precision("high")
    try:
        found = neighbour_distances(vectors, [2, 6])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    there = np.isfinite(vectors[:, 0])
    np.testing.assert_allclose(found[there], reference(vectors[there], [2, 6]), rtol=1e-6)
    assert np.isnan(found[~there]).all()


def test_near_duplicates_keep_their_digits() -> None:
    """2 - 2 cos would give 0 or 3e-4 for these: half of the digits are lost."""
    base = pool(50)
    near = unit_rows(base + 1e-5 * pool(50, seed=1))
    vectors = np.concatenate([base, near])
    np.testing.assert_allclose(neighbour_distances(vectors, [1]), reference(vectors, [1]), rtol=1e-4)


def test_duplicates_are_at_distance_zero_and_an_example_is_not_its_own_neighbour() -> None:
    vectors = np.concatenate([pool(30), np.repeat(pool(1, seed=5), 5, axis=0)])
    distances = neighbour_distances(vectors, [1, 4, 5])
    assert (distances[30:, :2] == 0.0).all()  # four other copies
    assert (distances[30:, 2] > 0.1).all()
    assert (distances[:30, 0] > 0.0).all()


def test_small_pools_and_missing_vectors_have_reasons() -> None:
    vectors = pool(4)
    vectors[2] = np.nan
    one, two, three = KNNIndicator.compute_pool([KNNIndicator(1), KNNIndicator(2), KNNIndicator(3)], vectors)
    assert one.reasons == two.reasons == [None, None, "no embedding of this example", None]
    assert np.isnan(three.values).all()
    assert three.reasons[0] == "the pool has fewer than 3 other examples"
    np.testing.assert_allclose(two.values[[0, 1, 3]], reference(vectors[[0, 1, 3]], [2])[:, 0], rtol=1e-6)
    (single,) = KNNIndicator.compute_pool([KNNIndicator(1)], pool(1))
    assert single.reasons == ["the pool has fewer than 1 other examples"]


def test_unit_rows_flag_what_has_no_direction() -> None:
    rows = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0], [np.inf, 1.0]], dtype=np.float32))
    np.testing.assert_allclose(rows[0], [0.6, 0.8])
    assert np.isnan(rows[1]).all() and np.isnan(rows[2]).any()


def test_neighbour_zero_is_refused() -> None:
    with pytest.raises(RequestError, match=r"neighbours \[0\]: start at 1.*knn_1"):
        neighbour_distances(pool(3), [0])
    assert get_indicator("knn_12").name == "knn_12"


def test_clusters_of_near_duplicates_are_told_apart_beyond_the_rounding_of_similarities() -> None:
    """Template rows lie within 1e-3 of each other: fp32 similarities cannot say which is the third nearest."""
    near = unit_rows(np.repeat(pool(3), 100, axis=0) + 3e-4 * pool(300, seed=1))
    vectors = np.concatenate([near, pool(500, seed=2)])
    np.testing.assert_allclose(neighbour_distances(vectors, [1, 3]), reference(vectors, [1, 3]), rtol=1e-3)
    plain = neighbours.nearest_within(vectors, 3)
    missed = np.sqrt(np.square(vectors[plain.index] - vectors[:, None]).sum(axis=2)).max(axis=1)
    assert (missed[:300] > reference(vectors, [3])[:300, 0] * 1.01).any()  # what the second look is for


def test_vectors_equal_to_rounding_are_at_distance_zero() -> None:
    """Equal texts under different ids, embedded in different batches: their vectors differ in the last digit."""
    base = pool(40)
    again = unit_rows(base * (1 + 2e-7 * np.random.default_rng(3).normal(size=base.shape).astype(np.float32)))
    assert (again != base).any()
    distances = neighbour_distances(np.concatenate([base, again]), [1, 2])
    assert (distances[:, 0] == 0).all() and (distances[:, 1] > 0.1).all()


def test_repeated_examples_count_as_often_as_they_occur() -> None:
    """Pools hand over distinct examples: the result must be that of all rows."""
    vectors = pool(60)
    counts = np.random.default_rng(0).integers(1, 5, size=60)
    ranks = [1, 2, 3, 4, 6, 30, 1000]
    distances = neighbour_distances(vectors, ranks, counts=counts)
    rows = np.repeat(np.arange(60), counts)
    everything = neighbour_distances(vectors[rows], ranks)
    np.testing.assert_array_equal(distances[rows], everything)
    assert np.isnan(distances[:, -1]).all()


def test_one_distinct_example_is_its_own_duplicate() -> None:
    distances = neighbour_distances(pool(1), [1, 2, 3], counts=np.array([3]))
    assert distances[0, :2].tolist() == [0.0, 0.0] and np.isnan(distances[0, 2])


def test_a_reference_replaces_the_pool() -> None:
    """Scores against a fixed reference do not move when the pool does; a row is not its own neighbour there either."""
    base, others = pool(300), pool(50, seed=9)
    counts = np.random.default_rng(0).integers(1, 4, size=300)
    whole = Reference(base, counts, np.arange(300))
    np.testing.assert_array_equal(
        neighbour_distances(base, [1, 6], reference=whole), neighbour_distances(base, [1, 6], counts=counts)
    )
    foreign = Reference(base, np.ones(300, dtype=np.int64), np.full(50, -1))
    (scores,) = KNNIndicator.compute_pool([KNNIndicator(6)], others, reference=foreign)
    search = NearestNeighbors(algorithm="brute").fit(base.astype(np.float64))
    np.testing.assert_allclose(scores.values, search.kneighbors(others, 6)[0][:, -1], rtol=1e-6)
    small = Reference(base[:2], np.ones(2, dtype=np.int64), np.full(50, -1))
    (scores,) = KNNIndicator.compute_pool([KNNIndicator(6)], others, reference=small)
    assert scores.reasons[0] == "the reference has fewer than 6 other examples"


def test_half_precision_memory_maps_need_no_copy(tmp_path) -> None:
    """A million vectors of 384 are 0.8 GB on disk: they must not become 3 GB in memory."""
    stored = np.memmap(tmp_path / "vectors", dtype=np.float16, mode="w+", shape=(500, 24))
    stored[:] = pool(500)
    wide = np.asarray(stored, dtype=np.float32)
    search = NearestNeighbors(algorithm="brute").fit(wide.astype(np.float64))
    expected = search.kneighbors(n_neighbors=6)[0][:, -1]
    np.testing.assert_allclose(neighbour_distances(stored, [6])[:, 0], expected, rtol=1e-5)


def test_large_pools_are_searched_approximately_and_say_how_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An approximate distance may be too long, never too short; below the recall it states it would be a random one."""
    monkeypatch.setitem(knn.EXACT_ROWS, "cpu", 1000)
    rng = np.random.default_rng(0)
    vectors = unit_rows(np.repeat(pool(40), 100, axis=0) + rng.normal(scale=0.05, size=(4000, 24)).astype(np.float32))
    vectors[7] = np.nan
    found = neighbour_distances(vectors, [6])[:, 0]
    said = capsys.readouterr().err
    assert "neighbours among 3,999 vectors: approximate" in said and "recall" in said
    recall = float(said.split("recall ")[1].split()[0])
    there = np.arange(4000) != 7
    expected = reference(vectors[there], [6])[:, 0]
    assert np.isnan(found[7])
    assert (found[there] >= expected * (1 - 1e-6)).all()
    assert (found[there] <= expected * (1 + 1e-6)).mean() > 0.8 and recall >= 0.95
    assert KNNIndicator.pool_numerics(1000) == {"neighbours": "exact"}
    assert KNNIndicator.pool_numerics(1001) == {"neighbours": "approximate"}
