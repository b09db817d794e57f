"""The statistics of `IndicatorLossStatistics` from all examples at hand, without a stream of them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from im_lightning.training.loss_statistics.metric import CrossSums, window_terms, within_windows


def indicator_loss_statistics(phi: ArrayLike, loss: ArrayLike, window: ArrayLike | None = None) -> dict[str, Tensor]:
    """Statistics of examples at hand; `IndicatorLossStatistics` gives the same from a stream of them.

    Args:
        phi: [n, p] regressors.
        loss: [n], mean nats per response token.
        window: int [n], the window of steps of each example; by default all in one.

    Returns:
        As `within_windows`. Examples with a NaN are left out.

    >>> out = indicator_loss_statistics([[0.0], [1.0], [2.0]], [1.0, 1.5, 2.0])
    >>> round(out["slope"].item(), 6), round(out["pearson"].item(), 6)
    (0.5, 1.0)
    """
    x = torch.as_tensor(np.asarray(phi, dtype=np.float64))
    y = torch.as_tensor(np.asarray(loss, dtype=np.float64))
    where = np.zeros(len(y), dtype=np.int64) if window is None else np.asarray(window)
    known = ~(x.isnan().any(1) | y.isnan())
    x, y = x[known], y[known]
    place = torch.as_tensor(np.unique(where[known.numpy()], return_inverse=True)[1].reshape(-1))
    size = int(place.max()) + 1 if len(y) else 0
    count = torch.zeros(size, dtype=torch.float64).index_add_(0, place, torch.ones_like(y))
    per_loss = torch.zeros(size, dtype=torch.float64).index_add_(0, place, y)
    per_phi = torch.zeros((size, x.shape[1]), dtype=torch.float64).index_add_(0, place, x)
    return within_windows(CrossSums(y @ y, y @ x, x.T @ x), window_terms(count, per_loss, per_phi))
