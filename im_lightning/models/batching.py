"""Length-sorted batches under a token budget, and their right-padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from im_lightning.errors import RequestError, message

if TYPE_CHECKING:
    import torch

    from im_lightning.data.tokenization import Encoded


def plan_batches(
    lengths: Sequence[int] | np.ndarray, batch_tokens: int, padding: float = 1.0, call_tokens: float = 0.0
) -> list[np.ndarray]:
    """Splits rows into batches of like length, the longest first, so that memory peaks at once and padding stays small.

    Args:
        lengths: Tokens of each row, [N].
        batch_tokens: Most tokens of a batch, padding included; a longer row gets a batch of its own.
        padding: Largest share of padding in a batch: a batch ends where the next row would raise it further.
        call_tokens: Padding up to which a batch goes on all the same: what another call of the model would cost.

    Returns:
        Row positions (int64) per batch; every row is in exactly one. Equal lengths keep their order.

    >>> [b.tolist() for b in plan_batches([3, 9, 4, 4], 8)]
    [[1], [2, 3], [0]]
    >>> [b.tolist() for b in plan_batches([10, 10, 8, 8, 5], 100, padding=0.1)]
    [[0, 1, 2, 3], [4]]
    """
    if batch_tokens < 1:
        raise RequestError(message(f"batch_tokens {batch_tokens}", "is less than one token", "give 1 or more"))
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    sizes = np.maximum(1, sizes[order])
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        most = max(1, batch_tokens // int(sizes[start]))
        inside = sizes[start : start + most]
        padded = sizes[start] * np.arange(1, len(inside) + 1)
        too_much = padded - np.cumsum(inside) > np.maximum(padding * padded, call_tokens)
        rows = int(too_much.argmax()) if too_much.any() else len(inside)
        batches.append(order[start : start + rows])
        start += rows
    return batches


def collate(encoded: Sequence[Encoded], pad_id: int, mask: str = "response_mask") -> dict[str, torch.Tensor]:
    """Right-padded tensors of a batch.

    Args:
        encoded: The rows, B of them, the longest with T tokens.
        pad_id: Token that fills the rest; attention and target masks are 0 there, so any valid token does.
        mask: "response_mask" (the response's own tokens: scoring) or "loss_mask" (with its end token: training).

    Returns:
        `input_ids` int64 [B, T], `attention_mask` int64 [B, T], `target_mask` bool [B, T].
    """
    import torch

    if mask not in ("response_mask", "loss_mask"):
        raise RequestError(message(f"mask {mask!r}", "is not known", "give 'response_mask' or 'loss_mask'"))
    width = max((len(e.input_ids) for e in encoded), default=0)
    ids = np.full((len(encoded), width), pad_id, dtype=np.int64)
    attention = np.zeros((len(encoded), width), dtype=np.int64)
    target = np.zeros((len(encoded), width), dtype=np.bool_)
    for row, e in enumerate(encoded):
        length = len(e.input_ids)
        ids[row, :length] = e.input_ids
        attention[row, :length] = 1
        target[row, :length] = getattr(e, mask)
    arrays = {"input_ids": ids, "attention_mask": attention, "target_mask": target}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def padding_id(tokenizer: object) -> int:
    """A token to fill rows with: the tokenizer's own padding, else its EOS, else token 0 (it is masked anyway)."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0
