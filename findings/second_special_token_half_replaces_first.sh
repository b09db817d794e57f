#!/usr/bin/env bash
# Guess: add_special_tokens adds: after a second call with another additional token both are special, everywhere.
#
# What happens: The second call replaces the list, so the first token is no longer in all_special_tokens,
# get_special_tokens_mask calls it text, and convert_ids_to_tokens(skip_special_tokens=True) keeps it;
# decode(skip_special_tokens=True) of the same ids still drops it. A loss mask built on the one and a text built on
# the other disagree. replace_extra_special_tokens=False adds.
#
# Versions: transformers 5.24.0, tokenizers 0.23.3, jinja2 3.1.6, on Python 3.11.
#
# Output seen:
#     all_special_tokens:      ['<s>', '</s>', '<|end|>']
#     get_special_tokens_mask: {'<|user|>': 0, 'hello': 0, '<|end|>': 1}
#     convert_ids_to_tokens:   ['<|user|>', 'hello']
#     decode:                  hello
#     without replacing:       ['<s>', '</s>', '<|user|>', '<|end|>']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 tokenizers==0.23.3 jinja2==3.1.6
cd "$work"
export HF_HOME="$work/hf"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" -W ignore - <<'EOF'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def tokenizer():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(["hello world", "say hello to othello", "othello"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


tok = tokenizer()
tok.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
tok.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
ids = tok("<|user|>hello<|end|>")["input_ids"]
mask = tok.get_special_tokens_mask(ids, already_has_special_tokens=True)
tokens = tok.convert_ids_to_tokens(ids, skip_special_tokens=True)
text = tok.decode(ids, skip_special_tokens=True)
print("all_special_tokens:     ", tok.all_special_tokens)
print("get_special_tokens_mask:", dict(zip(tok.convert_ids_to_tokens(ids), mask)))
print("convert_ids_to_tokens:  ", tokens)
print("decode:                 ", text)
both = tokenizer()
both.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
both.add_special_tokens({"additional_special_tokens": ["<|end|>"]}, replace_extra_special_tokens=False)
print("without replacing:      ", both.all_special_tokens)

assert "<|user|>" not in tok.all_special_tokens and tokens[0] == "<|user|>"
assert mask[0] == 0 and mask[-1] == 1 and text == "hello"
assert {"<|user|>", "<|end|>"} <= set(both.all_special_tokens)
EOF
