#!/usr/bin/env bash
# Guess: QuantileTransformer(output_distribution='normal') makes normal scores of an indicator. Tied rows share their
# average rank: sixty zeros below forty distinct values lie around -0.5, and a constant column becomes 0.
#
# What happens: Ties in the middle of a column get their average rank, ties at its ends do not: all sixty zeros become
# -5.2, the score of the smallest among ten million rows, and the column's mean falls to -2.7. A constant column
# becomes -5.2 in every row. In a linear rule over such scores the share of zeros outweighs everything else.
#
# Versions: scikit-learn 1.9.1, numpy 2.4.6, scipy 1.17.1, on Python 3.11.
#
# Output seen:
#     60 zeros, then 1..40    zeros -> -5.199, by average rank -0.524; mean of the column -2.700
#     60 zeros in the middle  zeros ->  0.000, by average rank  0.000; mean of the column  0.000
#     -40..-1, then 60 zeros  zeros ->  5.199, by average rank  0.524; mean of the column  2.700
#     100 zeros               zeros -> -5.199, by average rank  0.000; mean of the column -5.199
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from scipy.stats import norm, rankdata
from sklearn.preprocessing import QuantileTransformer


def scores(x):
    made = QuantileTransformer(n_quantiles=100, output_distribution="normal")
    return made.fit_transform(np.asarray(x, float)[:, None]).ravel()


seen = {}
columns = {
    "60 zeros, then 1..40": np.r_[np.zeros(60), np.arange(1, 41)],
    "60 zeros in the middle": np.r_[np.arange(-20, 0), np.zeros(60), np.arange(1, 21)],
    "-40..-1, then 60 zeros": np.r_[np.arange(-40, 0), np.zeros(60)],
    "100 zeros": np.zeros(100),
}
for name, x in columns.items():
    z = scores(x)
    by_rank = norm.ppf((rankdata(x) - 0.5) / len(x))[x == 0][0]
    seen[name] = z[x == 0][0]
    print(f"{name:23} zeros -> {seen[name]:6.3f}, by average rank {by_rank:6.3f}; mean of the column {z.mean():6.3f}")

assert seen["60 zeros, then 1..40"] < -5 and seen["-40..-1, then 60 zeros"] > 5 and seen["100 zeros"] < -5
assert abs(seen["60 zeros in the middle"]) < 0.01
EOF
