#!/usr/bin/env bash
# Guess: A LLaMA written to GGUF without quantisation and loaded with `from_pretrained(…, gguf_file=…)` is the same
# model: dequantising loses a little, a file in float32 nothing.
#
# What happens: No LLaMA keeps its RoPE scaling. The metadata `llama.rope.scaling.*` (linear scaling) and the tensor
# `rope_freqs.weight`, in which such files carry the factors of LLaMA 3.1 to 3.3, are passed over without a warning; the
# configuration says `rope_type: default`, and the logits are those of another model, also on short texts. A finetune
# of it, saved as a folder, keeps the wrong frequencies. Without scaling the same steps give the same logits exactly.
#
# Versions: transformers 5.24.0, gguf 0.19.0, torch 2.13.0, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     default rope_type loaded: default  next token the same at 64 of 64 positions; warnings 0
#     linear  rope_type loaded: default  next token the same at 22 of 64 positions; warnings 0
#     llama3  rope_type loaded: default  next token the same at 28 of 64 positions; warnings 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile \
    transformers==5.24.0 gguf==0.19.0 torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$work"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import logging

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
HEADS, LAYERS, WIDTH, WORDS = 2, 2, 32, 64
ROPE = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
    },
}
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
warned = []


class Keep(logging.Handler):
    def emit(self, record):
        warned.append(record.getMessage())


logging.getLogger("transformers").addHandler(Keep(logging.WARNING))


def write(model, kind, path):
    """The float32 GGUF of the model, laid out as llama.cpp wants it."""
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("tiny")
    out.add_vocab_size(WORDS)
    out.add_context_length(256)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(WIDTH)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_rope_freq_base(10000.0)
    if kind == "linear":
        out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(ROPE[kind]["factor"])
    if kind == "llama3":
        size = WIDTH // HEADS
        plain = 1 / 10000 ** (torch.arange(0, size, 2) / size)
        name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"
        out.add_tensor(name, (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32))
    for name, value in model.state_dict().items():
        value = value.numpy()
        if "q_proj" in name or "k_proj" in name:  # the two halves of a head interleave in GGUF
            value = value.reshape(HEADS, 2, -1, WIDTH).swapaxes(1, 2).reshape(value.shape)
        out.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(value))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


same, kinds = {}, {}
for kind, scaling in ROPE.items():
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, initializer_range=0.3, max_position_embeddings=256,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **scaling},
    )
    model = LlamaForCausalLM(shape).eval()
    write(model, kind, f"{kind}.gguf")
    loaded = LlamaForCausalLM.from_pretrained(".", gguf_file=f"{kind}.gguf", dtype=torch.float32).eval()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    ids = torch.randint(0, WORDS, (1, 64))
    with torch.no_grad():
        before, after = model(ids).logits, loaded(ids).logits
    same[kind] = int((before.argmax(-1) == after.argmax(-1)).sum())
    kinds[kind] = loaded.config.rope_parameters["rope_type"]
    print(
        f"{kind:7} rope_type loaded: {kinds[kind]}  next token the same at {same[kind]} of 64 positions; "
        f"warnings {len(warned)}"
    )

assert set(kinds.values()) == {"default"} and not warned
assert same["default"] == 64 and same["linear"] < 60 and same["llama3"] < 60
EOF
