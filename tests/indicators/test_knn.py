"""knn_<i> against scikit-learn, with duplicates, ties and blocks. A wrong neighbour is a wrong diversity score."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from im_lightning.errors import RequestError
from im_lightning.indicators import knn
from im_lightning.indicators.base import get_indicator
from im_lightning.indicators.knn import KNNIndicator, neighbour_distances, unit_rows


def pool(n: int, d: int = 24, seed: int = 0) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32))


def reference(vectors: np.ndarray, ranks: list[int]) -> np.ndarray:
    search = NearestNeighbors(algorithm="brute").fit(vectors.astype(np.float64))
    return search.kneighbors(n_neighbors=max(ranks))[0][:, [r - 1 for r in ranks]]


def test_equals_scikit_learn_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_BLOCK_ROWS", 100)
    monkeypatch.setattr(knn, "_BLOCK_COLUMNS", 37)
    vectors = pool(1003)
    np.testing.assert_allclose(neighbour_distances(vectors, [1, 6, 20]), reference(vectors, [1, 6, 20]), rtol=1e-6)


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
