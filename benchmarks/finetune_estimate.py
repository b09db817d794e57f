"""Memory and time of a finetune before it is run, by formula; the tables of the recipes come from here.

    python -m benchmarks.finetune_estimate

Memory = weights + gradients + AdamW's two moments + activations + logits. Activations with gradient checkpointing: the
inputs of every block (2 bytes) and one block's inside at 34 bytes per token and channel (Korthikanti et al. 2022,
arXiv 2205.05198, eq. 1 without the attention matrix, which is never made). Logits: at most every position, in fp32,
twice (with their gradient). Time = FLOPs / (peak · utilisation): per parameter and token 2 forward, 2 backward to the
inputs, 2 backward to the weights (not under LoRA), 2 for recomputing under gradient checkpointing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

GB = 1e9
PEAKS = {"A100": 312e12, "H100": 989e12}  # bf16, dense, by the maker's data sheets
UTILISATION = 0.35  # assumed; a profile of yours is better
NF4_BYTES = 4.127 / 8  # per weight, with doubly quantised scales (Dettmers et al. 2023)


@dataclass(frozen=True)
class Shape:
    """A LLaMA's shape: layers, channels, inner channels, key/value channels, vocabulary, whether the head is tied."""

    name: str
    layers: int
    width: int
    inner: int
    kv: int
    vocabulary: int
    tied: bool = False

    @property
    def blocks(self) -> int:
        """Parameters of the layers."""
        d = self.width
        return self.layers * (2 * d * d + 2 * d * self.kv + 3 * d * self.inner + 2 * d)

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding and the head."""
        return (1 if self.tied else 2) * self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.blocks + self.embeddings + self.width

    def lora(self, rank: int) -> int:
        """Parameters of LoRA on all linear layers but the head."""
        d = self.width
        return rank * self.layers * (2 * (d + d) + 2 * (d + self.kv) + 3 * (d + self.inner))


SHAPES = (
    Shape("Llama-3.2-1B", 16, 2048, 8192, 512, 128256, tied=True),
    Shape("LLaMA-2-7B", 32, 4096, 11008, 4096, 32000),
    Shape("Llama-3.1-8B", 32, 4096, 14336, 1024, 128256),
)
METHODS = ("lora", "lora nf4", "full", "full, 8 × FSDP")


def memory(shape: Shape, method: str, rows: int = 4, length: int = 1024, rank: int = 16) -> float:
    """Bytes on each GPU, gradient checkpointing on.

    Args:
        shape: Of the base.
        method: One of `METHODS`.
        rows: Of a micro-batch.
        length: Tokens of a row.
        rank: Of LoRA.
    """
    n, tokens = shape.parameters, rows * length
    if method == "lora":
        state = 2.0 * n + 16 * shape.lora(rank)
    elif method == "lora nf4":
        state = NF4_BYTES * shape.blocks + 2 * shape.embeddings + 16 * shape.lora(rank)
    else:  # fp32 weights, gradients and moments; sharded, with the weights of one block gathered
        state = 16 * n if method == "full" else 16 * n / 8 + 4 * n / shape.layers
    inside = 2 * shape.layers * tokens * shape.width + 34 * tokens * shape.width
    return state + inside + 8 * tokens * shape.vocabulary


def seconds(shape: Shape, method: str, tokens: float, peak: float) -> float:
    """Time of training on so many tokens (prompts included) on one GPU, or on eight for FSDP."""
    per_token = (6 if method.startswith("lora") else 8) * shape.parameters
    return per_token * tokens / (peak * UTILISATION * (8 if "FSDP" in method else 1))


def table(rows: int = 1000, epochs: int = 3, tokens_per_row: int = 250) -> str:
    """A Markdown table: memory for micro-batches of 4 × 1,024 tokens, minutes of a run of `rows`, and of 60 runs."""
    tokens = rows * epochs * tokens_per_row
    lines = [
        "| base | method | GB per GPU | a run, A100 | a run, H100 | 60 runs, A100 |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for shape in SHAPES:
        for method in METHODS:
            a100, h100 = (seconds(shape, method, tokens, PEAKS[gpu]) / 60 for gpu in ("A100", "H100"))
            need = memory(shape, method) / GB
            lines.append(
                f"| {shape.name} | {method} | {need:.0f} | {a100:.1f} min | {h100:.1f} min | {a100:.1f} h |"
            )  # sixty runs take as many hours as one takes minutes
    return "\n".join(lines)


def pool_table(pool: int = 50_000, epochs: int = 3, tokens_per_row: int = 250) -> str:
    """A Markdown table: hours on one A100 under LoRA for one pass of scoring, for sixty runs, and for all rows."""
    rate = PEAKS["A100"] * UTILISATION
    lines = [
        "| base | scoring, one pass | 60 runs of 256 rows | 60 runs of 1,000 rows | a finetune on all rows |",
        "|---|---:|---:|---:|---:|",
    ]
    for shape in SHAPES:
        hours = [2 * shape.parameters * pool * tokens_per_row / rate / 3600]
        for rows in (60 * 256, 60 * 1000, pool):
            hours.append(seconds(shape, "lora", rows * epochs * tokens_per_row, PEAKS["A100"]) / 3600)
        lines.append(f"| {shape.name} | " + " | ".join(f"{one:.1f} h" for one in hours) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    sys.exit(0)
