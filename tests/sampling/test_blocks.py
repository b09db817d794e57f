"""If these failed, merged runs would be of overlapping blocks, or of blocks that differ by nothing but their source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from im_lightning.errors import DataError, RequestError
from im_lightning.sampling.designs.blocks import (
    MOST_MIXED,
    MOST_SHARE,
    Blocks,
    candidate_mixtures,
    designed_blocks,
    read_blocks,
)
from im_lightning.sampling.designs.subsets import DesignPool

N, P, B, SIZE = 2000, 4, 10, 60
ONE = Blocks("digest", {"b00": [4, 2], "b01": [0]}, 2, 4, [{"b00": 0.5, "b01": 0.5}], 1)


def pool() -> tuple[np.ndarray, list[str]]:
    """Correlated, heavy-tailed regressors of three sources that differ in them by a third of a sd."""
    rng = np.random.default_rng(3)
    mixing = np.eye(P) + 0.4 * rng.standard_normal((P, P))
    phi = rng.standard_t(5, (N, P)) @ mixing
    sources = rng.integers(0, 3, N)
    return phi + 0.3 * sources[:, None], [f"s{k}" for k in sources]


def test_blocks_are_disjoint_eligible_and_differ_within_their_sources() -> None:
    phi, sources = pool()
    eligible = np.arange(N) % 7 > 0
    rows, means = designed_blocks(phi, sources, eligible, B, SIZE, 1.5)
    every = np.concatenate(rows)
    assert [len(one) for one in rows] == [SIZE] * B and len(set(every.tolist())) == B * SIZE and eligible[every].all()
    mean, sd = phi[eligible].mean(axis=0), phi[eligible].std(axis=0)
    np.testing.assert_allclose(means, [(phi[one].mean(axis=0) - mean) / sd for one in rows], atol=1e-9)
    names = np.asarray(sources)
    shares = np.array([[np.mean(names[one] == name) for name in np.unique(names)] for one in rows])
    explained = shares @ np.linalg.lstsq(shares, means, rcond=None)[0]
    assert (means - explained).std() > 0.5, "what shares of the sources do not say, in sd of the pool"
    at_random = [DesignPool(phi, sources, eligible).draw(SIZE, seed, version=2).rows for seed in range(B)]
    drawn = np.array([(phi[one].mean(axis=0) - mean) / sd for one in at_random])
    assert np.linalg.det(np.cov(means.T)) > 3 * np.linalg.det(np.cov(drawn.T)), "further apart than seeds as they come"
    with pytest.raises(RequestError, match=r"--blocks: 40 blocks of 60 rows take 2,400, and 1,714 can be drawn"):
        designed_blocks(phi, sources, eligible, 40, SIZE, 1.5)


def test_mixtures_are_whole_rows_of_several_blocks() -> None:
    shares = candidate_mixtures([40] * B, SIZE, 300)
    counts = shares * SIZE
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
    assert shares.max() <= MOST_SHARE + 1e-9 and counts.max() <= 40
    used = (shares > 0).sum(axis=1)
    assert used.min() >= 2 and used.max() <= MOST_MIXED and len(set(used.tolist())) > 2
    coarse = candidate_mixtures([40] * B, 6, 2000)
    assert len(np.unique(coarse, axis=0)) == len(coarse) < 2000, "the same mixture twice would say nothing new"
    few = candidate_mixtures([6] * B, SIZE, 20)  # blocks so small that a run takes all of them
    np.testing.assert_allclose(few, 0.1)


def test_the_file_is_read_back_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.blocks.json"
    ONE.save(path)
    assert read_blocks(path) == ONE and ONE.names_of("digest", 6) == ["b01", "", "b00", "", "b00", ""]
    assert replace(ONE, mixtures=[], twins=0).digest == ONE.digest != replace(ONE, rows={"b00": [1]}).digest
    with pytest.raises(RequestError, match="blocks: they are blocks of another pool"):
        ONE.names_of("other", 6)
    with pytest.raises(RequestError, match=r"no\.json: there is no such file of blocks"):
        read_blocks(tmp_path / "no.json")
    good = json.loads(path.read_text())
    for change, cause in (
        ({"format": "else"}, "it is of another format"),
        ({"rows": {"b00": [4, 2], "b01": [2]}}, "its blocks are not disjoint"),
        ({"mixtures": [{"b07": 1.0}]}, "a mixture has no shares of the blocks that sum to 1"),
        ({"mixtures": [{"b00": 0.7}]}, "a mixture has no shares of the blocks that sum to 1"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(DataError, match=rf"it does not hold blocks \({cause}\)"):
            read_blocks(path)
    path.write_text("{")
    with pytest.raises(DataError, match="it does not hold blocks"):
        read_blocks(path)
