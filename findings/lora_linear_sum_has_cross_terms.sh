#!/usr/bin/env bash
# Guess: add_weighted_adapter(['a', 'b'], [0.5, 0.5], combination_type='linear') makes the adapter whose weight change
# is the mean of the two changes.
#
# What happens: It sums the A matrices and the B matrices apart, so the product has cross terms (B of one adapter
# times A of the other): the change is another matrix than the mean, and with weights 1 and -1, which are taken as
# square roots with a sign, the difference of two adapters comes out wrong too. 'cat' gives the sum that the word
# linear promises, at the price of the added ranks.
#
# Versions: peft 0.21.2, torch 2.13.0, transformers 5.24.0, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     weights [0.5, 0.5] linear: relative error to the weighted sum 1.002
#     weights [0.5, 0.5] cat   : relative error to the weighted sum 0.000
#     weights [1.0, -1.0] linear: relative error to the weighted sum 0.960
#     weights [1.0, -1.0] cat   : relative error to the weighted sum 0.000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
config = LoraConfig(target_modules=["0"], r=2, lora_alpha=2, init_lora_weights=False)
peft = get_peft_model(model, config, adapter_name="a")
peft.add_adapter("b", config)
layer = peft.base_model.model[0]
a, b = (layer.get_delta_weight(name).detach() for name in "ab")
error = {}
for weights in ([0.5, 0.5], [1.0, -1.0]):
    wanted = weights[0] * a + weights[1] * b
    for kind in ("linear", "cat"):
        name = f"{kind}{weights}".replace(".", "_")
        peft.add_weighted_adapter(["a", "b"], weights, name, combination_type=kind)
        got = layer.get_delta_weight(name).detach()
        error[kind, weights[1]] = ((got - wanted).norm() / wanted.norm()).item()
        print(f"weights {weights} {kind:6}: relative error to the weighted sum {error[kind, weights[1]]:.3f}")

assert error["cat", 0.5] < 1e-5 and error["cat", -1.0] < 1e-5
assert error["linear", 0.5] > 0.3 and error["linear", -1.0] > 0.3
EOF
