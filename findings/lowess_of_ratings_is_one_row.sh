#!/usr/bin/env bash
# Guess: LOWESS of a loss over ratings from 1 to 5 gives, at each rating, about the mean loss of the rows that have it.
# A small `frac` makes the curve rougher, never less than the mean of many rows.
#
# What happens: Where the rows of one rating are more than the share `frac`, the curve at that rating is the loss of one
# single row, the first of them in sorted order, given to all 200 or so. Sort the ties otherwise and the curve is
# another. More iterations do not help, and the only sign is a NumPy warning about a division; `xvals=` gives NaN at the
# same places. With `frac` above the share the curve is the mean. The span of nearest rows has no width there, so no row
# of it gets a weight, and the row itself stands in. Weights clipped at 0 are such ties too.
#
# Versions: statsmodels 0.15.0, numpy 2.4.6, scipy 1.17.1, pandas 3.1.1, on Python 3.11.
#
# Output seen:
#     mean loss by rating        2.72  2.42  2.45  2.35  1.97
#     frac=0.25                  2.73  2.42  2.45  2.35  1.98
#     frac=0.15                  2.12  2.74  1.61  2.20  3.36
#     frac=0.15, rows reversed   3.33  3.28  3.21  1.90  0.25
#     frac=0.15, xvals            nan   nan   nan   nan   nan
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile statsmodels==0.15.0 numpy==2.4.6 scipy==1.17.1 pandas==3.1.1
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from statsmodels.nonparametric.smoothers_lowess import lowess

draw = np.random.default_rng(0)
rating = draw.integers(1, 6, 1000).astype(float)
loss = 3 - 0.2 * rating + draw.normal(size=1000)
order = rating.argsort(kind="stable")
rating, loss = rating[order], loss[order]
back = np.concatenate([np.flatnonzero(rating == k)[::-1] for k in range(1, 6)])  # the ties in the other order
first = np.array([np.flatnonzero(rating == k)[0] for k in range(1, 6)])
last = np.array([np.flatnonzero(rating == k)[-1] for k in range(1, 6)])
assert np.bincount(rating.astype(int))[1:].min() > 150 and np.bincount(rating.astype(int)).max() < 250


def curve(losses, frac):
    smooth = lowess(losses, rating, frac=frac, is_sorted=True, return_sorted=False)
    assert all(np.ptp(smooth[rating == k]) < 1e-9 for k in range(1, 6))
    return smooth[first]


shown = {
    "mean loss by rating": np.array([loss[rating == k].mean() for k in range(1, 6)]),
    "frac=0.25": curve(loss, 0.25),
    "frac=0.15": curve(loss, 0.15),
    "frac=0.15, rows reversed": curve(loss[back], 0.15),
    "frac=0.15, xvals": lowess(loss, rating, frac=0.15, is_sorted=True, it=0, xvals=np.arange(1.0, 6.0)),
}
for name, values in shown.items():
    print(f"{name:25}" + "".join(f"{value:6.2f}" for value in values))

mean, wide, narrow, reversed_, at = shown.values()
assert np.abs(wide - mean).max() < 0.05
assert np.array_equal(narrow, loss[first]) and np.array_equal(reversed_, loss[last])
assert np.abs(narrow - mean).max() > 0.5 and np.isnan(at).all()
EOF
