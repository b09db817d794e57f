#!/usr/bin/env bash
# Guess: LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True) is the way to put an adapter on the head of a
# model whose head and input embedding are one matrix: merged, the matrix is the old one plus the update.
#
# What happens: The head and the embedding share one A and one B, and merge_and_unload() merges at both places into the
# same matrix: the update is added twice. Without the option it is added once (and changes the inputs too). Neither
# merged model computes what the model with its adapter computed; a warning is given for neither merge.
#
# Versions: peft 0.21.2, torch 2.13.0, transformers 5.24.0, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     ensure_weight_tying=False: merged change = 1.000 x update, logits move by 0.521
#     ensure_weight_tying=True : merged change = 2.000 x update, logits move by 0.631
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
from transformers import LlamaConfig, LlamaForCausalLM

shape = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    tie_word_embeddings=True,
)
ids = torch.arange(8)[None]
times = {}
for tying in (False, True):
    torch.manual_seed(0)
    base = LlamaForCausalLM(shape).eval()
    old = base.lm_head.weight.detach().clone()
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["lm_head"], ensure_weight_tying=tying)
    model = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.1)
        update = model.base_model.model.lm_head.get_delta_weight("default").clone()
        before = model(ids).logits
        merged = model.merge_and_unload()
        change = merged.lm_head.weight - old
        moved = (merged(ids).logits - before).abs().max().item()
    times[tying] = ((change * update).sum() / (update * update).sum()).item()
    print(f"ensure_weight_tying={tying!s:5}: merged change = {times[tying]:.3f} x update, logits move by {moved:.3f}")
    assert moved > 0.1

assert abs(times[False] - 1) < 1e-4 and abs(times[True] - 2) < 1e-4
EOF
