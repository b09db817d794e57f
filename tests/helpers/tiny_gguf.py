"""A tiny checkpoint as a GGUF file, written tensor by tensor as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(
    checkpoint: str,
    path: Path,
    quantised: bool = False,
    pre: str | None = "gpt-2",
    bos: bool = True,
    merges: int | None = None,
    scaling: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the LLaMA checkpoint to `path`, its matrices in Q8_0 if `quantised`.

    `pre` names how text is cut; without `bos` the file does not say whether a text begins with it; `merges` is how many
    it has, by default all; `scaling` of the positions: {"type": …, "factor": …}, or {"divisors": [head's size / 2]}.
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    scaling = scaling or {}
    if "type" in scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if "divisors" in scaling:
        writer.add_tensor("rope_freqs.weight", np.asarray(scaling["divisors"], dtype=np.float32))
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((Path(checkpoint) / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"][:merges]])
    writer.add_bos_token_id(special["<s>"])
    writer.add_eos_token_id(special["</s>"])
    writer.add_pad_token_id(special["<pad>"])
    if bos:
        writer.add_add_bos_token(True)
    for name, tensor in model.state_dict().items():
        if name == "model.embed_tokens.weight":
            place = "token_embd.weight"
        elif name == "lm_head.weight":
            if config.tie_word_embeddings:
                continue
            place = "output.weight"
        elif name == "model.norm.weight":
            place = "output_norm.weight"
        else:
            _, _, layer, *inner, kind = name.split(".")
            place = f"blk.{layer}.{NAMES['.'.join(inner)]}.{kind}"
        value = tensor.numpy()
        if place.endswith(("attn_q.weight", "attn_k.weight")):  # llama.cpp rotates neighbours, transformers halves
            heads = config.num_attention_heads
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, value.shape[1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        if quantised and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(place, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, value.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
