#!/usr/bin/env bash
# Guess: `early_terminate: hyperband` of a W&B sweep stops a run whose loss has become NaN or infinite before any other:
# none is worse. (A sweep over learning rates has such runs, and they cost as many GPU hours as the good ones.)
#
# What happens: Values that are not finite are taken out of a run's history before runs are compared. A run that is NaN
# from step 5 on counts as a run of four good steps, whatever its length: it reaches no further band and is never
# stopped. A healthy run is stopped in its place. With a loss of 100 instead of NaN it is stopped at the next band.
# (`sweeps` is the public package that holds the search and stopping of W&B sweeps; it runs without a server.)
#
# Versions: sweeps 0.3.0, numpy 1.26.4, scipy 1.17.1, scikit-learn 1.9.1, pydantic 2.14.4, on Python 3.11.
#
# Output seen:
#     from step 5 on loss=100: step 8 stops ['diverged'], step 16 stops ['diverged'], step 64 stops ['diverged']
#     from step 5 on loss=nan: step 8 stops ['slow'], step 16 stops ['slow'], step 64 stops ['slow']
#     from step 5 on loss=inf: step 8 stops ['slow'], step 16 stops ['slow'], step 64 stops ['slow']
#     what it sees of 64 steps with nan: Step: 4  (Band: 4 Metric: 1.8 Threshold: 1.92)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile sweeps==0.3.0 numpy==1.26.4 scipy==1.17.1 scikit-learn==1.9.1 \
    pydantic==2.14.4
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
from math import inf, nan

from sweeps import RunState, SweepRun, stop_runs

SWEEP = {
    "method": "random",
    "metric": {"name": "loss", "goal": "minimize"},
    "parameters": {"lr": {"distribution": "log_uniform_values", "min": 1e-6, "max": 1e-2}},
    "early_terminate": {"type": "hyperband", "min_iter": 4, "eta": 2},  # bands at 4, 8, 16 and so on
}
PACE = {"good": 0.03, "fair": 0.02, "slow": 0.01, "diverged": 0.05}  # what a step takes off a loss of 2


def runs(steps, then):
    for name, pace in PACE.items():
        losses = [2 - pace * step for step in range(1, steps + 1)]
        if name == "diverged":
            losses[4:] = [then] * (steps - 4)
        history = [{"loss": loss} for loss in losses]
        yield SweepRun(name=name, state=RunState.running, config={"lr": {"value": 1e-4}}, history=history)


stopped = {}
for then in (100, nan, inf):
    for steps in (8, 16, 64):
        sweep = list(runs(steps, then))
        stopped[str(then), steps] = [run.name for run in stop_runs(SWEEP, sweep)]
        if then is nan:
            (seen,) = [line for line in sweep[-1].early_terminate_info["lines"] if "diverged" in line]
    shown = ", ".join(f"step {steps} stops {names}" for (of, steps), names in stopped.items() if of == str(then))
    print(f"from step 5 on loss={then}: {shown}")
print("what it sees of 64 steps with nan:", seen.removeprefix("Run: diverged ").strip())

assert all(names == (["diverged"] if then == "100" else ["slow"]) for (then, _), names in stopped.items())
assert "Step: 4 " in seen
EOF
