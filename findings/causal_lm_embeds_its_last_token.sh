#!/usr/bin/env bash
# Guess: SentenceTransformer(folder) on a folder of a plain transformers model averages over the tokens, whichever class
# it was saved from: that is what it did for years, with a notice.
#
# What happens: The class named in config.json decides. Saved as LlamaForCausalLM, the vector of a text is that of its
# last token; the same weights saved as LlamaModel give the mean. Two texts that end alike under a shallow model, and
# every neighbour distance made from such vectors, depend on which of the two files was at hand.
#
# Versions: sentence-transformers 6.2.0, torch 2.13.0, transformers 5.24.0, numpy 2.4.6, on Python 3.11.
#
# Output seen:
#     LlamaForCausalLM: last token
#     LlamaModel: mean
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile \
    sentence-transformers==6.2.0 torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = {word: place for place, word in enumerate("[PAD] [UNK] a b c d e f".split())}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
torch.manual_seed(0)
shape = LlamaConfig(
    vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=32,
)
causal = LlamaForCausalLM(shape).eval()
text = "a b c d e"
with torch.no_grad():
    states = causal.model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
found = {}
for model in (causal, causal.model):
    name = type(model).__name__
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
    vector = SentenceTransformer(name, device="cpu").encode(text)
    for kind, wanted in (("mean", states.mean(0)), ("last token", states[-1])):
        if np.allclose(vector, wanted.numpy(), atol=1e-5):
            found[name] = kind
    print(f"{name}: {found.get(name)}")

assert found == {"LlamaForCausalLM": "last token", "LlamaModel": "mean"}
EOF
