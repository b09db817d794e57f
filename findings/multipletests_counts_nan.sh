#!/usr/bin/env bash
# Guess: An indicator that could not be tested has p = NaN. Correcting the remaining p-values leaves that one aside,
# or refuses the input; in any case a rejected hypothesis has a corrected p below alpha.
#
# What happens: statsmodels counts the NaN as one more test, so Holm and Bonferroni multiply by 5 where there are 4
# p-values. Under fdr_bh every corrected p-value becomes NaN, the valid ones too, while two hypotheses are still
# reported as rejected: nobody who reads the p-values finds them. pingouin's multicomp with the same method names
# drops the NaN.
#
# Versions: statsmodels 0.15.0, pingouin 0.7.0, numpy 2.4.6, pandas 3.1.1, scipy 1.17.1, on Python 3.11.
#
# Output seen:
#     bonferroni statsmodels rejects 1, corrected [0.005, 0.1, nan, 1.0, 1.0]
#     bonferroni pingouin    rejects 1, corrected [0.004, 0.08, nan, 1.0, 1.0]
#     holm       statsmodels rejects 1, corrected [0.005, 0.08, nan, 1.0, 1.0]
#     holm       pingouin    rejects 1, corrected [0.004, 0.06, nan, 1.0, 1.0]
#     fdr_bh     statsmodels rejects 2, corrected [nan, nan, nan, nan, nan]
#     fdr_bh     pingouin    rejects 2, corrected [0.004, 0.04, nan, 0.6667, 0.9]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile statsmodels==0.15.0 pingouin==0.7.0 numpy==2.4.6 pandas==3.1.1 scipy==1.17.1
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from pingouin import multicomp
from statsmodels.stats.multitest import multipletests

p = [0.001, 0.02, np.nan, 0.5, 0.9]
seen = {}
for method in ("bonferroni", "holm", "fdr_bh"):
    for name, correct in (("statsmodels", multipletests), ("pingouin", multicomp)):
        reject, corrected = correct(p, alpha=0.05, method=method)[:2]
        seen[name, method] = list(reject), np.asarray(corrected)
        print(f"{method:10} {name:11} rejects {int(sum(reject))}, corrected", np.round(corrected, 4).tolist())

assert seen["statsmodels", "holm"][1][0] == 0.005  # five tests
assert seen["pingouin", "holm"][1][0] == 0.004  # four
reject, corrected = seen["statsmodels", "fdr_bh"]
assert np.isnan(corrected).all() and sum(reject) == 2
assert np.isfinite(seen["pingouin", "fdr_bh"][1]).sum() == 4
EOF
