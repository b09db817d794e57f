#!/usr/bin/env bash
# Guess: add_tokens with a word that is already one token of the vocabulary adds nothing (the length stays), so texts
# are tokenised as before.
#
# What happens: It answers 1, the length stays, and yet tokenisation changes: the word is now cut out of every text
# before the model's own rules apply, so 'hello' inside 'othello' is split off, and ' hello' is no longer one token
# but a space and 'hello'. A model that was trained with the old tokens sees others.
#
# Versions: transformers 5.24.0, tokenizers 0.23.3, jinja2 3.1.6, on Python 3.11.
#
# Output seen:
#     in the vocabulary before: True
#     add_tokens answers: 1 - length before and after: 275 275
#     before: ['othello', ',', 'Ġ', 'say', 'Ġhello']
#     after:  ['ot', 'hello', ',', 'Ġ', 'say', 'Ġ', 'hello']
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


text = "othello, say hello"
tok = tokenizer()
before, size = tok.tokenize(text), len(tok)
known = "hello" in tok.get_vocab()
added = tok.add_tokens(["hello"])
after = tok.tokenize(text)
print("in the vocabulary before:", known)
print("add_tokens answers:", added, "- length before and after:", size, len(tok))
print("before:", before)
print("after: ", after)

assert known and added == 1 and len(tok) == size
assert before[0] == "othello" and before[-1] == "Ġhello"
assert "othello" not in after and after[-2:] == ["Ġ", "hello"]
EOF
