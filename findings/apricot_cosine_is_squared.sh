#!/usr/bin/env bash
# Guess: Facility location with metric='cosine' picks rows so that every row has one at a high cosine. Of two large
# groups that point in opposite directions and a small one at a right angle to both, two picks take one row of each
# large group.
#
# What happens: The similarity is the squared cosine, so an opposite vector counts as a perfect stand-in: the second
# pick goes to the small group, and no row of the second large group is taken. With the cosines, negative ones as 0,
# given as a precomputed matrix the picks are as expected.
#
# Versions: apricot-select 0.6.1, numpy 2.4.6, scikit-learn 1.9.1, scipy 1.17.1, on Python 3.11.
#
# Output seen:
#     metric='cosine':      ['east', 'north']
#     precomputed cosines:  ['east', 'west']
#     gain of the first pick: 19.876
#     sum of its cosines, of its squared cosines: -0.031 19.876
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile apricot-select==0.6.1 numpy==2.4.6 scikit-learn==1.9.1 scipy==1.17.1
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
from apricot import FacilityLocationSelection
from sklearn.metrics.pairwise import cosine_similarity


def fan(degrees, n):
    radians = np.radians(degrees + np.linspace(-8, 8, n))
    return np.column_stack([np.cos(radians), np.sin(radians)])


rows = np.vstack([fan(0, 10), fan(180, 10), fan(90, 2)])
group = np.repeat(["east", "west", "north"], [10, 10, 2])
squared = FacilityLocationSelection(2, metric="cosine").fit(rows)
cosine = cosine_similarity(rows)
wanted = FacilityLocationSelection(2, metric="precomputed").fit(np.maximum(cosine, 0))
first = squared.ranking[0]
print("metric='cosine':     ", group[squared.ranking].tolist())
print("precomputed cosines: ", group[wanted.ranking].tolist())
print("gain of the first pick:", round(float(squared.gains[0]), 3))
print("sum of its cosines, of its squared cosines:", round(cosine[first].sum(), 3), round((cosine[first] ** 2).sum(), 3))

assert sorted(group[squared.ranking]) != ["east", "west"] and "north" in group[squared.ranking]
assert sorted(group[wanted.ranking]) == ["east", "west"]
assert np.isclose(squared.gains[0], (cosine[first] ** 2).sum())
EOF
