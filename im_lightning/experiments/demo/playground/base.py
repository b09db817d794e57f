"""The playground's base model: a word-level tokenizer and a LLaMA of a few hundred thousand weights, made on the spot.

It is pretrained on plain text and on base tasks, never on the pool's tasks, sources or flaws, and saved as an ordinary
checkpoint folder, so that the code that loads real models loads it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from im_lightning.experiments.demo.playground.tasks import BASE_TASKS
from im_lightning.experiments.demo.playground.text import story, vocabulary
from im_lightning.experiments.demo.playground.training import made, save_checkpoint, train, word_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} <assistant> {{ message['content'] }} {{ eos_token }}"
    "{% else %} <user> {{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <assistant> {% endif %}"
)
"""Two marker words in place of the forty of the Alpaca template, which would triple the length of a row."""


@dataclass(frozen=True)
class BaseSettings:
    """Size and pretraining of the base model; `documents` texts are cut into blocks of `block` tokens."""

    hidden: int = 96
    layers: int = 2
    heads: int = 4
    steps: int = 700
    batch: int = 64
    block: int = 64
    documents: int = 30_000
    learning_rate: float = 3e-3
    warmup: int = 50


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the playground, split at white space; with BOS, EOS, padding and a chat template."""
    named = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    words, more = (*SPECIAL, *vocabulary()), [USER, ASSISTANT]
    tokenizer = word_tokenizer(words, f"{BOS} $A", BOS, **named, additional_special_tokens=more)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def documents(count: int, seed: int) -> list[str]:
    """The pretraining corpus: six in ten documents are base-task conversations, the others little stories."""
    rng = np.random.default_rng([seed, 0])
    texts = []
    for _ in range(count):
        if rng.random() < 0.4:
            texts.append(f"{BOS} {story(rng)} {EOS}")
            continue
        problem = BASE_TASKS[int(rng.integers(len(BASE_TASKS)))].problem(rng)
        texts.append(f"{BOS} {USER} {problem.instruction} {problem.input} {ASSISTANT} {problem.answer} {EOS}")
    return texts


def make_base(path: str | os.PathLike[str], settings: BaseSettings, seed: int = 0) -> dict[str, Any]:
    """Pretrains the base model on the CPU and saves it with its tokenizer; the folder appears whole or not at all.

    Args:
        path: Folder to write; an older one is replaced.
        settings: Size and pretraining.
        seed: Of the corpus, the weights' start and the order.

    Returns:
        parameters (weights), tokens (seen), loss (nats per token, mean of the last tenth of the steps).
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    index = tokenizer.get_vocab()
    stream = np.array([index[word] for text in documents(settings.documents, seed) for word in text.split()])
    blocks = stream[: len(stream) // settings.block * settings.block].reshape(-1, settings.block)
    config = LlamaConfig(
        vocab_size=len(index),
        hidden_size=settings.hidden,
        intermediate_size=2 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=index[BOS],
        eos_token_id=index[EOS],
        pad_token_id=index[PAD],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    losses = _pretrain(model, blocks, settings, np.random.default_rng([seed, 1]))
    save_checkpoint(path, model, tokenizer)
    return {**made(model, losses), "tokens": settings.steps * settings.batch * settings.block}


def _pretrain(model: Any, blocks: NDArray[np.int64], settings: BaseSettings, rng: np.random.Generator) -> list[float]:
    """Next-token prediction over all tokens; returns the loss of each step."""
    import torch

    order = np.empty(0, dtype=np.int64)

    def loss_of(step: int) -> Any:
        nonlocal order
        if len(order) < settings.batch:
            order = np.concatenate([order, rng.permutation(len(blocks))])
        chosen, order = order[: settings.batch], order[settings.batch :]
        tokens = torch.from_numpy(blocks[chosen])
        logits = model(input_ids=tokens).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))

    return train(model, loss_of, settings.steps, settings.learning_rate, settings.warmup, "pretraining the base model")
