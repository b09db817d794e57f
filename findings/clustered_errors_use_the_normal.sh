#!/usr/bin/env bash
# Guess: OLS(...).fit(cov_type="cluster", ...) tests a coefficient as the plain fit does, by a t distribution, now with
# the degrees of freedom of the groups.
#
# What happens: Any robust covariance turns `use_t` off: p-values and intervals come from the normal distribution, however
# few groups there are. With eight groups of four repeats and no effect at all, "p < 0.05" appears four times as often
# as it should; with use_t=True (seven degrees of freedom) still nearly three times. The test on the means of the groups
# holds its level.
#
# Versions: statsmodels 0.15.0, numpy 2.4.6, scipy 1.17.1, pandas 3.1.1, on Python 3.11.
#
# Output seen:
#     use_t of the plain fit: True, of the clustered fit: False
#     p < 0.05 without an effect: clustered 0.191, clustered with use_t 0.131, means of groups 0.050
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
groups = np.repeat(np.arange(8), 4)
hits, worlds = np.zeros(3), 2000
for _ in range(worlds):
    x, level = rng.normal(size=(2, 8))
    y = level[groups] + 0.1 * rng.normal(size=32)
    model = sm.OLS(y, sm.add_constant(x[groups]))
    plain = model.fit()
    cluster = model.fit(cov_type="cluster", cov_kwds={"groups": groups})
    with_t = model.fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    means = sm.OLS(y.reshape(8, 4).mean(1), sm.add_constant(x)).fit()
    hits += [fit.pvalues[1] < 0.05 for fit in (cluster, with_t, means)]
normal, t, mean = hits / worlds
print(f"use_t of the plain fit: {plain.use_t}, of the clustered fit: {cluster.use_t}")
print(f"p < 0.05 without an effect: clustered {normal:.3f}, clustered with use_t {t:.3f}, means of groups {mean:.3f}")

assert plain.use_t and not cluster.use_t
assert normal > 0.15 and 0.09 < t < normal and 0.03 < mean < 0.07
EOF
