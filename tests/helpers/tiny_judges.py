"""Tiny reward models and a UniEval-type T5 with random weights: real architectures, saved as ordinary folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import TEXTS

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_of(special: list[str], single: str, pair: str, **names: Any) -> Any:
    """A byte-level BPE tokenizer with the given special tokens and templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "Yes No Yes No question: response: dialogue history:"] * 2, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_deberta_reward(path: Path | str, seed: int = 0) -> str:
    """Like OpenAssistant/reward-model-deberta-v3-large-v2: pairs, relative attention, one label."""
    import torch
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    tokenizer = tokenizer_of(
        ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1",
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512, relative_attention=True, position_buckets=32, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=2,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DebertaV2ForSequenceClassification(config)
        _spread(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_oasst_reward(path: Path | str, special: bool = True) -> str:
    """The layout of OpenAssistant's GPT-NeoX checkpoints: a .bin with old buffers, a config of its own model type."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXModel

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    marks = ["<|prompter|>", "<|assistant|>", "<|system|>"] if special else []
    tokenizer = tokenizer_of(
        ["<|endoftext|>", "<|padding|>", *marks], "$A", "$A $B:1",
        bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|padding|>",
        additional_special_tokens=marks,
    )  # fmt: skip
    config = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "hidden_act": "gelu", "use_parallel_residual": True, "tie_word_embeddings": False, "bos_token_id": 0,
        "eos_token_id": 0, "layer_norm_eps": 1e-05, "initializer_range": 0.02,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body, head = GPTNeoXModel(GPTNeoXConfig(**config)), torch.nn.Linear(32, 1)
        _spread(body)
    weights = {f"gpt_neox.{name}": tensor for name, tensor in body.state_dict().items()}
    weights |= {f"out_proj.{name}": tensor for name, tensor in head.state_dict().items()}
    for layer in range(2):  # buffers of the transformers of its time
        inner = f"gpt_neox.layers.{layer}.attention"
        weights[f"{inner}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        weights[f"{inner}.masked_bias"] = torch.tensor(-1e9)
        weights[f"{inner}.rotary_emb.inv_freq"] = torch.ones(2)
    torch.save(weights, path / "pytorch_model.bin")
    own = {"architectures": ["GPTNeoXRewardModel"], "model_type": "gpt_neox_reward_model", "pooling": "last"}
    (path / "config.json").write_text(json.dumps({**config, **own}))
    tokenizer.save_pretrained(path)
    return str(path)


def make_chat_reward(path: Path | str, pad: int | None = None, labels: int = 1) -> str:
    """A LLaMA sequence classifier whose tokenizer has a chat template; without a padding token unless told."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tokenizer_of(
        ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], "<s> $A", "<s> $A <s> $B:1", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, pad_token_id=pad,
        num_labels=labels,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config)
        _spread(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_unieval(path: Path | str, seed: int = 0, start: int | None = 0) -> str:
    """A T5 whose tokenizer ends texts with </s>, as MingZhong/unieval-dialog's does."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = tokenizer_of(
        ["<pad>", "</s>", "<unk>"], "$A </s>", "$A </s> $B </s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=start, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
        _spread(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def _spread(model: Any) -> None:
    """Larger weights than a fresh model's, so that different texts get clearly different answers."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4.0)
