#!/usr/bin/env bash
# Guess: Points with known results, handed to flaml.tune.run as points_to_evaluate and evaluated_rewards, count:
# best_config is the best point that the search knows of, the known ones among them.
#
# What happens: The known points steer the search and are left out of the answer: with the optimum among them,
# best_config is a worse point that this call tried. A resumed sweep has to take the minimum of both itself.
#
# Versions: flaml 2.7.0, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     known: n=50 with loss 0, n=3 with loss 47
#     50 tried again: False
#     best_config is the known optimum: False
#     its loss is 0: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile flaml==2.7.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import contextlib
import io

from flaml import tune

tried = []


def loss(config):
    tried.append(config["n"])
    return {"loss": abs(config["n"] - 50)}


with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    result = tune.run(
        loss,
        config={"n": tune.randint(1, 100)},
        metric="loss",
        mode="min",
        num_samples=5,
        points_to_evaluate=[{"n": 50}, {"n": 3}],
        evaluated_rewards=[0, 47],
        verbose=0,
    )
best = result.best_config["n"]
print("known: n=50 with loss 0, n=3 with loss 47")
print("50 tried again:", 50 in tried)
print("best_config is the known optimum:", best == 50)
print("its loss is 0:", result.best_result["loss"] == 0)

assert 50 not in tried and best != 50 and result.best_result["loss"] > 0
EOF
