#!/usr/bin/env bash
# Guess: A message whose content is null, as a turn of tool calls has, reaches the chat template as None: a template
# that asks `message.content is none` takes that branch, as plain jinja2 does.
#
# What happens: apply_chat_template takes null entries out of a message before it renders: the content is undefined,
# `is none` is false, and a template without an `is defined` branch fails or prints nothing. A null deeper inside, in
# a tool call's arguments, stays. A template tested with jinja2 alone behaves otherwise.
#
# Versions: transformers 5.24.0, tokenizers 0.23.3, jinja2 3.1.6, on Python 3.11.
#
# Output seen:
#     apply_chat_template: [undefined] [{"function": {"name": "look_up", "arguments": {"page": null}}}]
#     jinja2 alone:        [null] [{"function": {"arguments": {"page": null}, "name": "look_up"}}]
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


import jinja2

TEMPLATE = (
    "{% for m in messages %}{% if m.content is none %}[null]{% elif m.content is defined %}{{ m.content }}"
    "{% else %}[undefined]{% endif %} {{ m.tool_calls | tojson }}{% endfor %}"
)
calls = [{"function": {"name": "look_up", "arguments": {"page": None}}}]
messages = [{"role": "assistant", "content": None, "tool_calls": calls}]
tok = tokenizer()
tok.chat_template = TEMPLATE
rendered = tok.apply_chat_template(messages, tokenize=False)
plain = jinja2.Environment().from_string(TEMPLATE).render(messages=messages)
print("apply_chat_template:", rendered)
print("jinja2 alone:       ", plain)

assert rendered.startswith("[undefined]") and '"page": null' in rendered
assert plain.startswith("[null]")
EOF
