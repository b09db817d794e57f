"""`IndicatorLossStatistics` against regressions written out, whatever the split into updates, ranks and resumes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from im_lightning.training.loss_statistics.metric import IndicatorLossStatistics

N, P, WINDOWS = 400, 3, 7


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Regressors, losses that fall as training goes on, exposures, windows."""
    rng = np.random.default_rng(1)
    window = np.sort(rng.integers(0, WINDOWS, N))
    phi = rng.normal(size=(N, P)) + 0.3 * window[:, None] + 50.0
    loss = 6.0 - 0.5 * window + phi @ [0.2, -0.1, 0.0] + rng.normal(size=N)
    return phi, loss, rng.random(N) < 0.3, window


def stream(
    metric: IndicatorLossStatistics,
    phi: np.ndarray,
    loss: np.ndarray,
    repeated: np.ndarray,
    window: np.ndarray,
    size: int,
) -> IndicatorLossStatistics:
    """Feeds the rows in batches of at most `size` that never cross a window."""
    for w in range(int(window.max()) + 1):
        rows = np.flatnonzero(window == w)
        for i in range(0, max(1, len(rows)), size):
            r = rows[i : i + size]
            metric.update(torch.tensor(phi[r]), torch.tensor(loss[r]), torch.tensor(repeated[r]), w)
    return metric


def with_dummies(phi: np.ndarray, loss: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients of phi and adjusted within-window R² from one regression with a dummy per window."""
    dummies = (window[:, None] == np.unique(window)[None]).astype(float)
    full = np.column_stack([phi, dummies])
    coef, *_ = np.linalg.lstsq(full, loss, rcond=None)
    residual = loss - full @ coef
    centred = loss - dummies @ np.linalg.lstsq(dummies, loss, rcond=None)[0]
    free = len(loss) - dummies.shape[1]
    unexplained = float(residual @ residual) / float(centred @ centred)
    return coef[: phi.shape[1]], 1 - unexplained * free / (free - phi.shape[1])


@pytest.mark.parametrize("size", [1, 8, 1000])
def test_against_regressions_with_window_dummies(size: int) -> None:
    """A number that depended on the batch size, or on when an example came, would mislead."""
    phi, loss, repeated, window = data()
    got = stream(IndicatorLossStatistics(["a", "b", "c"]), phi, loss, repeated, window, size).compute()
    for kind, rows in enumerate((~repeated, repeated)):
        x, y, w = phi[rows], loss[rows], window[rows]
        assert got["n"][kind] == rows.sum()
        centre = lambda v, w=w: v - np.array([v[w == k].mean(0) for k in w])  # noqa: E731
        for j in range(P):
            expected = stats.pearsonr(centre(x[:, j]), centre(y)).statistic
            assert float(got["pearson"][kind, j]) == pytest.approx(expected, rel=1e-8)
            assert float(got["slope"][kind, j]) == pytest.approx(with_dummies(x[:, [j]], y, w)[0][0], rel=1e-8)
        assert float(got["r2"][kind]) == pytest.approx(with_dummies(x, y, w)[1], rel=1e-8)


def test_one_window_is_the_ordinary_correlation_and_regression() -> None:
    phi, loss, _, _ = data()
    once = np.zeros(N, dtype=bool)
    got = stream(IndicatorLossStatistics(["a", "b", "c"]), phi, loss, once, np.zeros(N, dtype=int), 50).compute()
    line = stats.linregress(phi[:, 0], loss)
    assert float(got["slope"][0, 0]) == pytest.approx(line.slope, rel=1e-8)
    assert float(got["pearson"][0, 0]) == pytest.approx(line.rvalue, rel=1e-8)
    assert math.isnan(got["r2"][1]) and float(got["n"][1]) == 0


def test_missing_values_are_left_out_and_counted() -> None:
    """One NaN in a sum would make every later number NaN."""
    phi, loss, repeated, window = data()
    phi[3, 1] = phi[9] = np.nan
    loss[20] = np.nan
    got = stream(IndicatorLossStatistics(["a", "b", "c"]), phi, loss, repeated, window, 16).compute()
    good = ~(np.isnan(phi).any(1) | np.isnan(loss))
    clean = stream(
        IndicatorLossStatistics(["a", "b", "c"]), phi[good], loss[good], repeated[good], window[good], 16
    ).compute()
    assert float(got["left_out"].sum()) == 3
    for name in ("n", "pearson", "slope", "r2"):
        torch.testing.assert_close(got[name], clean[name], equal_nan=True)


def test_a_constant_regressor_has_no_correlation_rather_than_noise() -> None:
    phi, loss, repeated, window = data()
    phi[:, 2] = 1234.5678
    got = stream(IndicatorLossStatistics(["a", "b", "c"]), phi, loss, repeated, window, 16).compute()
    assert torch.isnan(got["pearson"][:, 2]).all() and torch.isnan(got["slope"][:, 2]).all()
    x, y, w = phi[~repeated][:, :2], loss[~repeated], window[~repeated]
    assert float(got["r2"][0]) == pytest.approx(with_dummies(x, y, w)[1], rel=1e-8)


def test_resumed_sums_are_those_of_the_undisturbed_run() -> None:
    phi, loss, repeated, window = data()
    whole = stream(IndicatorLossStatistics(["a", "b", "c"]), phi, loss, repeated, window, 16).compute()
    half = N // 2  # in the middle of a window
    first = stream(
        IndicatorLossStatistics(["a", "b", "c"]), phi[:half], loss[:half], repeated[:half], window[:half], 16
    )
    second = IndicatorLossStatistics(["a", "b", "c"])
    second.adopt(first.sums(), add=True)
    rest = [a[half:] for a in (phi, loss, repeated, window)]
    for i in range(0, len(rest[1]), 1):
        row = slice(i, i + 1)
        second.update(*(torch.tensor(a[row]) for a in rest[:3]), window=int(rest[3][i]))
    for name, value in whole.items():
        torch.testing.assert_close(second.compute()[name], value, equal_nan=True)


def test_scalars_are_flat_finite_numbers() -> None:
    phi, loss, repeated, window = data()
    got = stream(IndicatorLossStatistics(["a", "b", "c"]), phi, loss, repeated, window, 16).scalars()
    assert {"pearson_first/a", "slope_repeat/c", "r2_first", "examples_repeat", "left_out"} <= got.keys()
    assert all(isinstance(v, float) and math.isfinite(v) for v in got.values())
    assert IndicatorLossStatistics(["a"]).sums()["count"].shape == (2, 0)


def _rank(rank: int, root: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    phi, loss, repeated, window = data()
    mine = slice(rank, None, 2)
    half = np.arange(N)[mine] < N // 2
    metric = IndicatorLossStatistics(["a", "b", "c"])
    phi, loss, repeated, window = (a[mine] for a in (phi, loss, repeated, window))
    for w in range(WINDOWS):  # every rank calls with every window, also where it has no row
        rows = half & (window == w)
        metric.update(torch.tensor(phi[rows]), torch.tensor(loss[rows]), torch.tensor(repeated[rows]), w)
    saved = metric.sums()  # reduced: rank 0's copy is what a checkpoint would hold
    metric = IndicatorLossStatistics(["a", "b", "c"])
    metric.adopt(saved, add=rank == 0)
    for w in range(WINDOWS):
        rows = ~half & (window == w)
        metric.update(torch.tensor(phi[rows]), torch.tensor(loss[rows]), torch.tensor(repeated[rows]), w)
    torch.save(metric.compute(), f"{root}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_a_resume_in_between_are_one_rank(tmp_path: Path) -> None:
    """Sums that every rank restored would be counted twice; sums of one rank would miss the other."""
    import torch.multiprocessing as mp

    mp.start_processes(_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    whole = stream(IndicatorLossStatistics(["a", "b", "c"]), *data(), 16).compute()
    for rank in (0, 1):
        got = torch.load(tmp_path / f"rank{rank}.pt")
        for name, value in whole.items():
            torch.testing.assert_close(got[name], value, equal_nan=True)
