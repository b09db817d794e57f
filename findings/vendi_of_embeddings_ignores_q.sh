#!/usr/bin/env bash
# Guess: `vendi.score_X(embeddings, q=2)` is the Vendi score of order 2 (a higher order counts frequent rows more), and
# the same as `score_K` of the cosines and `score_dual` of the embeddings, which are two faster or slower ways to it.
#
# What happens: `score_X` takes `q` and leaves it unused: it gives the score of order 1 whatever the order, infinite
# included. `score_K` and `score_dual` do use theirs. So the more varied of two subsets by order 2 is another one by
# `score_X` than by `score_dual`.
#
# Versions: vendi-score 0.0.3, numpy 2.4.6, scipy 1.17.1, scikit-learn 1.9.1, on Python 3.11.
#
# Output seen:
#     half one row, half distinct  q=1: score_X 14.14, score_K 14.14, score_dual 14.14
#     eight groups                 q=1: score_X  8.00, score_K  8.00, score_dual  8.00
#     half one row, half distinct  q=2: score_X 14.14, score_K  3.92, score_dual  3.92
#     eight groups                 q=2: score_X  8.00, score_K  8.00, score_dual  8.00
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile \
    vendi-score==0.0.3 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from vendi_score import vendi

axes = np.eye(51)
subsets = {
    "half one row, half distinct": np.concatenate([np.repeat(axes[:1], 50, axis=0), axes[1:]]),
    "eight groups": np.repeat(axes[:8], 12, axis=0),
}
found = {}
for q in (1, 2):
    for name, rows in subsets.items():
        scores = (vendi.score_X(rows, q=q), vendi.score_K(rows @ rows.T, q=q), vendi.score_dual(rows, q=q))
        found[q, name] = scores
        print("{:28} q={}: score_X {:5.2f}, score_K {:5.2f}, score_dual {:5.2f}".format(name, q, *scores))

half, groups = subsets
for q in (1, 2):
    assert np.isclose(found[q, half][0], found[1, half][1]) and np.isclose(found[q, groups][0], 8)
assert np.allclose(found[1, half], found[1, half][0]) and np.allclose(found[2, half][1:], 1 / (0.25 + 50 * 0.01**2))
EOF
