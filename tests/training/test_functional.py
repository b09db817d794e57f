"""The pure functions behind the live statistics, against scipy and numpy on centred windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from loss_statistics import indicator_loss_statistics
from scipy import stats

from im_lightning.training.loss_statistics.metric import decile_sums, deciles

RNG = np.random.default_rng(3)
N, P = 300, 4
WINDOW = np.sort(RNG.integers(0, 6, N))
PHI = RNG.normal(size=(N, P)) + 0.5 * WINDOW[:, None]
LOSS = 5.0 - 0.4 * WINDOW + PHI @ [0.3, 0.0, -0.2, 0.1] + RNG.normal(size=N)


def centred(values: np.ndarray) -> np.ndarray:
    return values - np.array([values[w == WINDOW].mean(axis=0) for w in WINDOW])


def test_pearson_slope_and_r2_within_windows() -> None:
    """Uncentred, the fall of the loss over training would pass for a merit of what came late."""
    got = indicator_loss_statistics(PHI, LOSS, WINDOW)
    x, y = centred(PHI), centred(LOSS)
    for j in range(P):
        assert float(got["pearson"][j]) == pytest.approx(stats.pearsonr(x[:, j], y).statistic, rel=1e-10)
        assert float(got["slope"][j]) == pytest.approx(stats.linregress(x[:, j], y).slope, rel=1e-10)
    residual = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    free = len(y) - len(np.unique(WINDOW))
    adjusted = 1 - residual @ residual / (free - P) / (y @ y / free)
    assert float(got["r2"]) == pytest.approx(adjusted, rel=1e-10)
    raw = indicator_loss_statistics(PHI, LOSS)
    assert float(raw["pearson"][1]) == pytest.approx(stats.pearsonr(PHI[:, 1], LOSS).statistic, rel=1e-8)
    assert abs(float(raw["pearson"][1]) - float(got["pearson"][1])) > 0.1, "the case tells the two apart"


def test_collinear_indicators_have_one_joint_r2() -> None:
    """log ifd = log ppl − log ppl_unconditional: three indicators in a plane must not blow the R² up."""
    phi = np.column_stack([PHI[:, :2], PHI[:, 0] - PHI[:, 1]])
    full, plane = indicator_loss_statistics(phi, LOSS, WINDOW), indicator_loss_statistics(PHI[:, :2], LOSS, WINDOW)
    assert float(full["r2"]) == pytest.approx(float(plane["r2"]), rel=1e-8)


def test_nothing_known_is_nan_and_not_zero() -> None:
    empty = indicator_loss_statistics(np.zeros((0, 2)), np.zeros(0))
    assert float(empty["n"]) == 0 and math.isnan(empty["r2"]) and torch.isnan(empty["pearson"]).all()
    few = indicator_loss_statistics(PHI[:3], LOSS[:3])
    assert math.isnan(few["r2"]), "three examples and five unknowns"


@pytest.mark.parametrize("values", [RNG.normal(size=1000), np.repeat([1.0, 2.0, 3.0], 50), np.zeros(9)])
def test_deciles_are_numpys_quantiles(values: np.ndarray) -> None:
    got = deciles(values)
    edges = np.quantile(values, np.arange(1, 10) / 10)
    assert got.tolist() == [int((edges <= v).sum()) for v in values]
    if len(np.unique(values)) == len(values):
        assert np.bincount(got).tolist() == [100] * 10


def test_losses_are_summed_in_the_decile_of_each_scale() -> None:
    scales = np.column_stack([deciles(PHI[:, 0]), deciles(np.where(WINDOW == 2, np.nan, PHI[:, 1]))])
    counts, sums = decile_sums(torch.from_numpy(scales).long(), torch.from_numpy(LOSS))
    for s in range(2):
        for d in range(10):
            mine = scales[:, s] == d
            assert counts[s, d] == mine.sum() and float(sums[s, d]) == pytest.approx(LOSS[mine].sum())
    assert int(counts[1].sum()) == (WINDOW != 2).sum(), "an unknown value is in no decile"
