#!/usr/bin/env bash
# Guess: Whether rows packed by DataCollatorWithFlattening read one another depends on the attention used (the manual
# asks for FlashAttention). The key-value cache and gradient checkpointing change time and memory, and no number.
#
# What happens: SDPA and eager attention do keep packed rows apart, by their position ids, but only where no cache is
# made, and a forward call makes one unless told not to (`use_cache` is true in the configuration, in training mode as
# well). So a plain forward lets every row read all rows before it and says nothing, and with `use_cache=False` each row
# has the loss that it has alone. Gradient checkpointing turns the cache off, and so changes the loss. An attention mask
# of ones, which masks nothing, joins the rows again.
#
# Versions: transformers 5.24.0, torch 2.13.0, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     each row alone                        loss 5.8295
#     packed                                loss 6.1890
#     packed, use_cache=False               loss 5.8295
#     packed, use_cache=False, mask of ones loss 6.1890
#     packed, gradient checkpointing        loss 5.8295
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6
cd "$work"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    initializer_range=0.5,
)
model = LlamaForCausalLM(shape).train()
rows = [torch.randint(3, 50, (length,)).tolist() for length in (9, 12, 6)]
packed = DataCollatorWithFlattening()([{"input_ids": row} for row in rows])
assert "attention_mask" not in packed and packed["position_ids"][0].tolist() == [*range(9), *range(12), *range(6)]

total = sum(model(input_ids=row, labels=row).loss * (row.numel() - 1) for row in map(torch.tensor, ([r] for r in rows)))
losses = {"each row alone": total.item() / sum(len(row) - 1 for row in rows)}
ones = torch.ones_like(packed["input_ids"])
found = {}
for attention in ("sdpa", "eager"):
    model.set_attn_implementation(attention)
    losses["packed"] = model(**packed).loss.item()
    losses["packed, use_cache=False"] = model(**packed, use_cache=False).loss.item()
    losses["packed, use_cache=False, mask of ones"] = model(**packed, use_cache=False, attention_mask=ones).loss.item()
    model.gradient_checkpointing_enable()
    losses["packed, gradient checkpointing"] = model(**packed).loss.item()
    model.gradient_checkpointing_disable()
    found[attention] = [round(loss, 4) for loss in losses.values()]
for name, loss in losses.items():
    print(f"{name:37} loss {loss:.4f}")

for alone, default, no_cache, mask_of_ones, checkpointed in found.values():
    assert max(abs(no_cache - alone), abs(checkpointed - alone)) < 0.001
    assert min(abs(default - alone), abs(mask_of_ones - alone)) > 0.1
EOF
