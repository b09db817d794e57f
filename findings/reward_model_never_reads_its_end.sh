#!/usr/bin/env bash
# Guess: RewardTrainer appends the end token to every text, and a causal classifier reads the score at a text's last
# token. So the score is read at the end token, and an answer that breaks off without one scores otherwise.
#
# What happens: Where the tokenizer has no padding token (GPT-2's, LLaMA's), the trainer makes the end token the padding
# token, and the classifier reads at the last token that is *not* padding: the one before the end. The end token is
# appended, costs a position, and no score ever depends on it: with and without it a text has the same score to the last
# bit. With a padding token of its own (`RewardConfig(pad_token=…)`) the score is read at the end token.
#
# Versions: trl 1.16.0, transformers 5.24.0, datasets 5.2.0, torch 2.13.0, on Python 3.11.
#
# Output seen:
#     padding token [EOS]: tokens ['q', 'yes', '[EOS]']; the end token changes the score: False
#     padding token [PAD]: tokens ['q', 'yes', '[EOS]']; the end token changes the score: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile \
    trl==1.16.0 transformers==5.24.0 datasets==5.2.0 torch==2.13.0 numpy==2.4.6
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

words = "[UNK] [EOS] [PAD] q yes no".split()
shape = LlamaConfig(
    vocab_size=6, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
    eos_token_id=1,
)
seen = []
for padding in (None, "[PAD]"):
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", pad_token=padding
    )
    torch.manual_seed(0)
    trainer = RewardTrainer(
        LlamaForSequenceClassification(shape),
        args=RewardConfig("out", report_to="none", use_cpu=True),
        train_dataset=Dataset.from_list([{"chosen": "q yes", "rejected": "q no"}] * 2),
        processing_class=tokenizer,
    )
    ids = trainer.train_dataset[0]["chosen_ids"]
    with torch.no_grad():
        whole, open_ended = (trainer.model(torch.tensor([part])).logits.item() for part in (ids, ids[:-1]))
    name, tokens = words[trainer.model.config.pad_token_id], [words[i] for i in ids]
    print(f"padding token {name}: tokens {tokens}; the end token changes the score: {whole != open_ended}")
    seen.append((name, tokens[-1], whole != open_ended))

assert seen == [("[EOS]", "[EOS]", False), ("[PAD]", "[EOS]", True)]
EOF
