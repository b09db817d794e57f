#!/usr/bin/env bash
# Guess: An OpenAI-style endpoint that is asked at temperature 1 samples, so four requests give four answers.
#
# What happens: transformers serve puts the request's temperature and top_p into the generation config and leaves
# do_sample as the checkpoint has it. A checkpoint whose generation config does not sample, as most base models' and every
# config without that file, answers greedily at any temperature: the same text each time, whatever the seed, and nothing is
# said. Only a temperature of 0 is looked at: it switches a sampling checkpoint to greedy. Who asks a judge several times,
# or draws several references, gets one opinion in copies. With do_sample in the request's own generation_config (a field
# of this server alone) the answers differ.
#
# Versions: transformers 5.23.0 (extra serving), torch 2.13.0, openai 3.57.0, on Python 3.11.
#
# Output seen:
#     checkpoint as saved, temperature 1                     : 1 different answers of 4
#     checkpoint as saved, temperature 1.9, top_p 0.9, seeds : 1 different answers of 4
#     do_sample in the request's generation_config           : 4 different answers of 4
#     checkpoint that samples, temperature 1                 : 4 different answers of 4
set -euo pipefail
work=$(mktemp -d)
server=
finish() {
    [ -z "$server" ] || { kill "$server" 2>/dev/null; wait "$server" 2>/dev/null; } || true
    rm -rf "$work"
}
trap finish EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile 'transformers[serving]==5.23.0' torch==2.13.0 openai==3.57.0
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
"$work/venv/bin/python" -W ignore - <<'EOF'
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *alphabet])}
tokenizer = Tokenizer(models.BPE(vocabulary, []))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
fast.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant:"
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, eos_token_id=1, pad_token_id=0, bos_token_id=None,
)
model = LlamaForCausalLM(config)
for name, samples in (("greedy", False), ("sampling", True)):
    model.generation_config.do_sample = samples
    model.save_pretrained(name)
    fast.save_pretrained(name)
EOF
port=$("$work/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$work/venv/bin/transformers" serve --host 127.0.0.1 --port "$port" --device cpu >"$work/log" 2>&1 &
server=$!
"$work/venv/bin/python" -W ignore - "$port" <<'EOF' || { cat "$work/log"; exit 1; }
import json
import sys
import time
import urllib.request

from openai import OpenAI

base = f"http://127.0.0.1:{sys.argv[1]}"
for _ in range(600):
    try:
        urllib.request.urlopen(base + "/health", timeout=5)
        break
    except OSError:
        time.sleep(0.5)
client = OpenAI(base_url=base + "/v1", api_key="none", timeout=600)


def differ(model, seeds=False, **options):
    texts = set()
    for k in range(4):
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Say something."}], max_tokens=16,
            **options, **({"seed": k} if seeds else {}),
        )
        texts.add(answer.choices[0].message.content)
    return len(texts)


own = json.dumps({"do_sample": True, "max_new_tokens": 16, "temperature": 1.0, "eos_token_id": 1, "pad_token_id": 0})
asked = {
    "checkpoint as saved, temperature 1": differ("./greedy", temperature=1.0),
    "checkpoint as saved, temperature 1.9, top_p 0.9, seeds": differ("./greedy", temperature=1.9, top_p=0.9, seeds=True),
    "do_sample in the request's generation_config": differ("./greedy", extra_body={"generation_config": own}),
    "checkpoint that samples, temperature 1": differ("./sampling", temperature=1.0),
}
for what, count in asked.items():
    print(f"{what:54} : {count} different answers of 4")
assert list(asked.values()) == [1, 1, 4, 4], asked
EOF
