#!/usr/bin/env bash
# Guess: SFTTrainer trains on the rows of its data set in their places: a sampler, or weights, made for those places
# fit, and a row whose answer is cut off simply adds no loss.
#
# What happens: A row whose answer lies wholly behind `max_length` (1,024 by default) is taken out of the data set when
# the trainer is made, so every later row moves up by one: position 2 of the trainer's data is row 3 of what was given.
# The length shrinks with no error. Let a column with the row's own number travel along, and look rows up by it.
#
# Versions: trl 1.16.0, transformers 5.24.0, datasets 5.2.0, torch 2.13.0, on Python 3.11.
#
# Output seen:
#     given 4 rows, the trainer has 3: rows [0, 1, 3]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile \
    trl==1.16.0 transformers==5.24.0 datasets==5.2.0 torch==2.13.0 numpy==2.4.6
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = {word: place for place, word in enumerate("[PAD] [UNK] [EOS] a b c d".split())}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
)
shape = LlamaConfig(
    vocab_size=7, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    pad_token_id=0, eos_token_id=2,
)
rows = [{"prompt": "a " * (20 if row == 2 else 2), "completion": "b c", "row": row} for row in range(4)]
trainer = SFTTrainer(
    LlamaForCausalLM(shape),
    args=SFTConfig("out", max_length=16, report_to="none", use_cpu=True, remove_unused_columns=False),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
left = trainer.train_dataset["row"]
print(f"given {len(rows)} rows, the trainer has {len(trainer.train_dataset)}: rows {list(left)}")

assert list(left) == [0, 1, 3]
EOF
