#!/usr/bin/env bash
# Guess: Bradley-Terry scores rank finetuned models by their won comparisons. A base model that never wins has no finite
# score: evalica warns or puts it last, and the others keep their order. (Such a base is common beside its finetunes.)
#
# What happens: One model without a win, or one without a loss, and every model gets the same score, which is the
# tolerance: a model that won 17 of 20 is level with the base that lost 20 of 20. There is no warning, and `iterations`
# may be 2, far below the limit. A single win of the base, in 20 comparisons, brings the order back.
#
# Versions: evalica 0.4.2, numpy 2.4.6, pandas 3.1.1, scipy 1.17.1, on Python 3.11.
#
# Output seen:
#     base wins 1 of 20: scores A 3.58, B 2.04, base 0.137; expected share of A against base 0.96; iterations 8
#     base wins 0 of 20: scores A 1e-06, B 1e-06, base 1e-06; expected share of A against base 0.50; iterations 100
#     A wins 20 of 20: scores A 1e-06, B 1e-06, base 1e-06; expected share of A against base 0.50; iterations 2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile evalica==0.4.2 numpy==2.4.6 pandas==3.1.1 scipy==1.17.1
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import warnings

from evalica import Winner, bradley_terry, pairwise_frame

# first and second model, comparisons won by each; every pair is compared ten times
TABLES = {
    "base wins 1 of 20": [("A", "B", 7, 3), ("A", "base", 9, 1), ("B", "base", 10, 0)],
    "base wins 0 of 20": [("A", "B", 7, 3), ("A", "base", 10, 0), ("B", "base", 10, 0)],
    "A wins 20 of 20": [("A", "B", 10, 0), ("A", "base", 10, 0), ("B", "base", 7, 3)],
}
found = {}
for name, table in TABLES.items():
    rows = [
        (first, second, winner)
        for first, second, *wins in table
        for winner, count in zip((Winner.X, Winner.Y), wins)
        for _ in range(count)
    ]
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        result = bradley_terry(*zip(*rows))
    assert not given
    scores = found[name] = result.scores.to_dict()
    share = pairwise_frame(result.scores).loc["A", "base"]
    shown = ", ".join(f"{model} {scores[model]:.3g}" for model in ("A", "B", "base"))
    print(f"{name}: scores {shown}; expected share of A against base {share:.2f}; iterations {result.iterations}")

one, none, all_won = found.values()
assert one["A"] > one["B"] > one["base"]
assert set(none.values()) == set(all_won.values()) == {result.tolerance}
EOF
