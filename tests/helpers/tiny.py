"""Tiny checkpoints made on the spot: real architectures, random weights, saved as ordinary folders."""

from __future__ import annotations

from pathlib import Path

TEXTS = (
    "Give three tips for staying healthy. Eat a balanced diet and exercise regularly.",
    "What are the three primary colors? The three primary colors are red, blue, and yellow.",
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "Write a response that appropriately completes the request. ### Instruction: ### Input: ### Response:",
    "Describe the structure of an atom. An atom is made up of a nucleus, which contains protons and neutrons.",
    "How can we reduce air pollution? There are many ways; 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10 of them are listed.",
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(vocab_size: int = 512, bos: bool = True, eos: bool = True):
    """A byte-level BPE tokenizer (loses no text) that prepends BOS like LLaMA's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>"] + (["<s>"] if bos else []) + (["</s>"] if eos else [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    names = {"pad_token": "<pad>"}
    if bos:
        names["bos_token"] = "<s>"
    if eos:
        names["eos_token"] = "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def chat_tokenizer(template: str | None = CHATML, **kwargs):
    """One with the tokens of ChatML and this chat template."""
    tokenizer = make_tokenizer(**kwargs)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def make_tiny_llama(
    path: str | Path,
    *,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    chat_template: str | None = None,
    max_positions: int = 4096,
) -> str:
    """Writes a random LLaMA checkpoint with its tokenizer to `path`; returns `path` as a string."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=max_positions,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
