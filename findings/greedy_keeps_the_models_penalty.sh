#!/usr/bin/env bash
# Guess: model.generate(generation_config=GenerationConfig(do_sample=False)) is greedy decoding: a whole configuration is
# passed, so the one that the checkpoint brought is out, and each token is the argmax of the logits.
#
# What happens: What the passed configuration leaves at its default is filled in from the model's own. The repetition
# penalty of a checkpoint (Qwen2.5-Instruct ships one of 1.05 to 1.1), its suppressed tokens and least lengths still
# apply, to a fresh GenerationConfig as to do_sample=False alone. Answers that are scored as greedy, an exact match for
# one, are other texts. Writing the neutral value (repetition_penalty=1.0) helps, a setting at a time.
#
# Versions: transformers 5.24.0, torch 2.13.0, on Python 3.11.
#
# Output seen (a random LLaMA of one layer, whose own penalty is 50 so that the difference shows at once):
#     argmax:                            0 20 29 8 4 9 22 9 22 9 22 9
#     do_sample=False:                   0 20 29 8 4 9 22 23 19 13 21 6
#     a fresh GenerationConfig:          0 20 29 8 4 9 22 23 19 13 21 6
#     a fresh one, penalty 1.0 written:  0 20 29 8 4 9 22 9 22 9 22 9
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 torch==2.13.0
cd "$work"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    bos_token_id=None, eos_token_id=None,
)
model = LlamaForCausalLM(shape).eval()
model.generation_config = GenerationConfig(repetition_penalty=50.0)
prompt, count = torch.tensor([[1, 2, 3]]), 12

plain = prompt
with torch.no_grad():
    for _ in range(count):
        plain = torch.cat([plain, model(plain).logits[:, -1].argmax(-1, keepdim=True)], dim=1)


def answer(**settings):
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


fresh = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
found = {
    "argmax": plain,
    "do_sample=False": answer(**fresh),
    "a fresh GenerationConfig": answer(generation_config=GenerationConfig(**fresh)),
    "a fresh one, penalty 1.0 written": answer(generation_config=GenerationConfig(**fresh, repetition_penalty=1.0)),
}
for name, tokens in found.items():
    print(f"{name + ':':34} {' '.join(map(str, tokens[0, 3:].tolist()))}")
greedy, alone, whole, written = (tokens.tolist() for tokens in found.values())
assert alone == whole != greedy == written
EOF
