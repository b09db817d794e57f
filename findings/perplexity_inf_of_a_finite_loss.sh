#!/usr/bin/env bash
# Guess: torchmetrics' Perplexity is exp of the mean cross-entropy over the counted tokens, so it equals
# exp(cross_entropy) of the same logits.
#
# What happens: It takes the logarithm of softmax probabilities in float32: one token among a hundred with a loss of
# 120 has probability 0 there, and the perplexity of the whole set is inf, while the cross-entropy is an unremarkable
# 2.6 and the perplexity 13. Up to a loss of about 100 the two agree; float64 logits only move the border.
#
# Versions: torchmetrics 1.9.0, torch 2.13.0, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     logit gap   0 torch.float32: Perplexity 4.000, exp(cross_entropy) 4.000
#     logit gap  90 torch.float32: Perplexity 9.703, exp(cross_entropy) 9.703
#     logit gap 120 torch.float32: Perplexity inf, exp(cross_entropy) 13.098
#     logit gap 120 torch.float64: Perplexity 13.098, exp(cross_entropy) 13.098
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torchmetrics==1.9.0 torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from torch.nn.functional import cross_entropy
from torchmetrics.text import Perplexity


def both(surprise, dtype=torch.float32):
    """A hundred tokens over four words: even odds for 99, and one word that the model was sure it would not see."""
    logits = torch.zeros(1, 100, 4, dtype=dtype)
    logits[0, -1, 0] = surprise
    target = torch.ones(1, 100, dtype=torch.long)
    metric = Perplexity()
    metric.update(logits, target)
    return metric.compute().item(), cross_entropy(logits[0], target[0]).exp().item()


seen = {}
for surprise, dtype in ((0, torch.float32), (90, torch.float32), (120, torch.float32), (120, torch.float64)):
    seen[surprise, dtype] = both(surprise, dtype)
    metric, loss = seen[surprise, dtype]
    print(f"logit gap {surprise:3} {dtype}: Perplexity {metric:.3f}, exp(cross_entropy) {loss:.3f}")

metric, loss = seen[90, torch.float32]
assert abs(metric - loss) < 0.01
metric, loss = seen[120, torch.float32]
assert metric == float("inf") and 13 < loss < 14
EOF
