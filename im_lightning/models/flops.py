"""The machine's measured matmul rate, and the useful work of a causal model: together they say how fast a pass was.

Useful work = body weights x real tokens + head weights x predicted tokens + causal attention; padding and logits that
nobody asked for are no work.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import nn

_ROWS = 2048


@dataclass(frozen=True)
class ModelWork:
    """Weights of a causal model that tokens are multiplied with.

    Args:
        body: Per token.
        head: Per predicted token, beside.
        attention: Layers x width: twice that per token and token it looks back to, averaged over the triangle.
        layers: How many there are: each costs time of its own per call, however few the tokens.
    """

    body: int
    head: int
    attention: int
    layers: int = 0

    def flops(self, lengths: NDArray[np.int64], predicted: int) -> float:
        """Useful floating-point operations of rows of `lengths` tokens, `predicted` tokens of them all together."""
        tokens = np.asarray(lengths, dtype=np.float64)
        return float(2 * self.body * tokens.sum() + 2 * self.head * predicted + 2 * self.attention * (tokens**2).sum())


def model_work(model: nn.Module) -> ModelWork | None:
    """The work of a dense decoder; None for families whose tokens use only some of the weights (experts)."""
    from torch import nn

    config: Any = getattr(model, "config", None)
    if config is None or any((getattr(config, n, 0) or 0) > 1 for n in ("num_local_experts", "num_experts")):
        return None
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    body = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tables and p is not head)
    layers, width = (int(getattr(config, name, 0) or 0) for name in ("num_hidden_layers", "hidden_size"))
    return ModelWork(body, 0 if head is None else head.numel(), layers * width, layers) if body else None


def matmul_rate(dtype: torch.dtype, device: torch.device, width: int = 1024, seconds: float = 0.4) -> float:
    """Floating-point operations per second of [2048, width] x [width, 4 width], best of several; once per process."""
    return _matmul_rate(dtype, str(device), width, seconds)


@lru_cache(maxsize=16)
def _matmul_rate(dtype: torch.dtype, device: str, width: int, seconds: float) -> float:
    import torch

    left = torch.randn(_ROWS, width, device=device).to(dtype)
    right = torch.randn(4 * width, width, device=device).to(dtype)

    def once() -> float:
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        if left.is_cuda:
            torch.cuda.synchronize(left.device)
        return time.perf_counter() - start

    with torch.inference_mode():
        once()
        begun, best = time.perf_counter(), once()
        while time.perf_counter() - begun < seconds:
            best = min(best, once())
    return 2.0 * _ROWS * width * 4 * width / best
