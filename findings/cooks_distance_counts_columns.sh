#!/usr/bin/env bash
# Guess: Cook's distance of a run depends on how far the fitted values move without it. A copied column in the design
# changes no fitted value, no residual and no leverage, and statsmodels knows it (df_model, R2 and AIC take the rank),
# so the distances stay as they were.
#
# What happens: The distances shrink by 2/3: they are divided by the number of columns (3), not by the rank (2). A
# cut-off such as 4/n then misses runs, and each further redundant column hides more.
#
# Versions: statsmodels 0.15.0, numpy 2.4.6, scipy 1.17.1, pandas 3.1.1, on Python 3.11.
#
# Output seen:
#     same fitted values: True
#     same leverage:      True
#     df_model, AIC:      (1.0, np.float64(81.694402)) (1.0, np.float64(81.694402))
#     Cook's distance, copied / plain: [0.666667]
#     runs over 4/n: 1 and 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile statsmodels==0.15.0 numpy==2.4.6 scipy==1.17.1 pandas==3.1.1
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
import statsmodels.api as sm

rng = np.random.default_rng(0)
x = rng.normal(size=30)
loss = x + rng.normal(size=30)
plain = sm.OLS(loss, np.column_stack([np.ones(30), x])).fit()
copied = sm.OLS(loss, np.column_stack([np.ones(30), x, x])).fit()
a, b = (fit.get_influence().cooks_distance[0] for fit in (plain, copied))
print("same fitted values:", np.allclose(plain.fittedvalues, copied.fittedvalues))
print("same leverage:     ", np.allclose(plain.get_influence().hat_matrix_diag, copied.get_influence().hat_matrix_diag))
print("df_model, AIC:     ", (plain.df_model, round(plain.aic, 6)), (copied.df_model, round(copied.aic, 6)))
print("Cook's distance, copied / plain:", np.unique(np.round(b / a, 6)).tolist())
print("runs over 4/n:", int((a > 4 / 30).sum()), "and", int((b > 4 / 30).sum()))

assert np.allclose(plain.fittedvalues, copied.fittedvalues) and plain.df_model == copied.df_model == 1
assert np.allclose(b / a, 2 / 3)
EOF
