#!/usr/bin/env bash
# Guess: Under bf16 autocast a LoRA layer computes in bf16: autocast casts the adapter's fp32 weights, and the layer's
# input, which the layer before it left in bf16, goes in as it is.
#
# What happens: peft casts the input to the adapter's fp32 first, and autocast casts it straight back to bf16: two copies of
# the input in the forward pass of every adapted layer, and two of its gradient in the backward pass. No bit of any
# result depends on them: with `peft.helpers.disable_input_dtype_casting` outputs and gradients are the same.
#
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0, on Python 3.11.
#
# Output seen:
#     adapter in torch.float32, 14 adapted layers
#     casts in a step: 183; without peft's: 133; the same bits: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile peft==0.21.2 torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = 2
torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).to(torch.bfloat16)
model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter)
adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
ids = torch.arange(16)[None]


def step():
    with torch.autocast("cpu", torch.bfloat16), profile(activities=[ProfilerActivity.CPU]) as seen:
        logits = model(input_ids=ids).logits
        grads = torch.autograd.grad(logits.float().pow(2).sum(), adapter)
    copies = sum(event.count for event in seen.key_averages() if event.key == "aten::_to_copy")
    return copies, torch.cat([logits.flatten().float(), *(grad.flatten() for grad in grads)])


as_it_is, values = step()
with disable_input_dtype_casting(model):
    without, same = step()
print(f"adapter in {adapter[0].dtype}, {7 * LAYERS} adapted layers")
print(f"casts in a step: {as_it_is}; without peft's: {without}; the same bits: {torch.equal(values, same)}")

inputs_without_gradient = 3  # q, k and v of the first layer read the frozen embeddings
assert as_it_is - without == 2 * 7 * LAYERS + 2 * (7 * LAYERS - inputs_without_gradient)
assert torch.equal(values, same) and adapter[0].dtype == torch.float32
EOF
