"""`response_nll`: the one likelihood function of scoring, training and evaluation.

Hidden states of the whole batch, logits for the predicted positions only, negative log-likelihood in fp32, sums and
counts per example. Logits of prompt and padding are never made: on instruction data that is most of the head's work.

The shortcut is right only for models whose logits are the output head applied to the last hidden states, and that
look at nothing to the right. A small probe, once per model object, decides: see `_Route`.

Batches are padded on the right (`collate`); `models.batching` plans them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from im_lightning._utils.progress import log
from im_lightning.errors import RequestError, message

if TYPE_CHECKING:
    from im_lightning.data.tokenization import Encoded


CHUNK_ELEMENTS = 1 << 24  # logits alive at once where no gradient is wanted (64 MiB in fp32)
CPU_CHUNK_ELEMENTS = 1 << 20  # fewer on a CPU, so that they stay in its cache, but
CPU_CHUNK_ROWS = 512  # so many at least, below which the head's matmul slows down
_SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")


@dataclass(frozen=True)
class ResponseNLL:
    """Negative log-likelihood of B rows.

    Args:
        sums: Nats, summed over the target tokens of each row, float32 [B]; carries the gradient where one is wanted.
        counts: Target tokens of each row, int64 [B]. A row without any has sum 0.
        edge_sums: Nats of the first and last token of every answer alone (`answer_edges`), without gradient.
        edge_counts: The number of these tokens.
        hidden: The last hidden states [B, T, H] if they were asked for.
    """

    sums: Tensor
    counts: Tensor
    edge_sums: Tensor
    edge_counts: Tensor
    hidden: Tensor | None = None


@dataclass(frozen=True)
class _Route:
    """How a model's logits are reached: head applied to hidden states, or its own full path; with a mask or without.

    Right padding cannot reach real tokens of a causal model, so the attention mask is left out where the probe
    confirms it: attention kernels are faster without one.
    """

    direct: bool
    mask: bool


_routes: weakref.WeakKeyDictionary[nn.Module, _Route] = weakref.WeakKeyDictionary()
_probing = threading.Lock()  # batches may come from several threads


def response_nll(model: nn.Module, batch: Mapping[str, Tensor], keep_hidden: bool = False) -> ResponseNLL:
    """Summed negative log-likelihood of each row's target tokens, given everything before them.

    Args:
        model: A causal language model of transformers, or one wrapped by peft.
        batch: `input_ids`, `attention_mask`, `target_mask`, each [B, T], padded on the right (`collate`).
            `target_mask[b, t]` counts token t, predicted from the tokens before it; token 0 is never counted.
        keep_hidden: Whether the hidden states are returned as well.

    Returns:
        Sums (nats), counts (tokens) and, if asked for, hidden states, on the model's device. Differentiable.

    Raises:
        RequestError: the model is not causal (tokens see what follows them), so it has no likelihood of a text.
    """
    base = base_model(model)
    device = next(base.parameters()).device
    ids, attention, target = (batch[key].to(device) for key in ("input_ids", "attention_mask", "target_mask"))
    route = _route(model)
    rows, columns = target[:, 1:].nonzero(as_tuple=True)
    following = ids[rows, columns + 1]
    if route.direct:
        hidden = _hidden(base, ids, attention if route.mask else None)
        nll = _nll_of_head(base.get_output_embeddings(), hidden[rows, columns], following)  # type: ignore[operator]
    else:
        nll, kept = _nll_of_model(model, ids, attention, rows, columns, following, keep_hidden)
        hidden = kept if kept is not None else torch.empty(0)
    none = torch.zeros(len(ids), dtype=torch.float32, device=nll.device)
    edges = answer_edges(target)
    at_edge = edges[rows, columns + 1]
    return ResponseNLL(
        none.index_add(0, rows, nll),
        target_counts(target),
        none.index_add(0, rows[at_edge], nll.detach()[at_edge]),
        edges.sum(dim=1),
        hidden if keep_hidden else None,
    )


def summed_nll(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The sums of `response_nll` alone, nats, float32 [B]."""
    return response_nll(model, batch).sums


def target_counts(target_mask: Tensor) -> Tensor:
    """Target tokens of each row, [B, T] -> int64 [B]: what `response_nll` counts, before any model has run."""
    return target_mask[:, 1:].sum(dim=1)


def nll_parts(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Of each row, float32 [4, B]: summed nats and number of its target tokens, then of those at its answers' edges."""
    got = response_nll(model, batch)
    return torch.stack([part.float() for part in (got.sums, got.counts, got.edge_sums, got.edge_counts)])


def answer_edges(target_mask: Tensor) -> Tensor:
    """The first and the last target token of every answer, [B, T] -> bool [B, T]: how it opens, and its end marker.

    A finetune learns these in its first steps, whatever it is taught. Target tokens in a row are one answer; one alone
    is both. Token 0, which is never predicted, is none.

    >>> answer_edges(torch.tensor([[0, 0, 1, 1, 1, 0, 1]], dtype=torch.bool)).int().tolist()
    [[0, 0, 1, 0, 1, 0, 1]]
    """
    target = target_mask.bool().clone()
    target[:, :1] = False
    before, after = F.pad(target[:, :-1], (1, 0)), F.pad(target[:, 1:], (0, 1))
    return target & ~(before & after)


def pooled_states(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean hidden state of the real tokens of each row, in fp32: [B, T, H], [B, T] -> [B, H]."""
    weights = attention_mask.to(hidden.device, torch.float32)
    total = torch.einsum("bth,bt->bh", hidden.float(), weights)
    return total / weights.sum(dim=1, keepdim=True).clamp_min(1.0)


def by_row(values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Sums or counts of a batch's sequences, [..., S], added up by the rows that own them (`owner`), [..., B]; as they
    are where each row has one."""
    if "owner" not in batch:
        return values
    return values.new_zeros(*values.shape[:-1], len(batch["row"])).index_add_(-1, batch["owner"], values)


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a peft wrapper (adapters stay active in it), or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def known_tokens(base: nn.Module) -> int:
    """Number of tokens the model knows."""
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "vocab_size", 0) or 256)


def _hidden(base: nn.Module, ids: Tensor, attention: Tensor | None) -> Tensor:
    """By the part that makes hidden states; an AttributeError where the family does not say which it is."""
    getter = getattr(base, "get_decoder", None)
    found = getter() if callable(getter) else None
    if found is None or found is base:
        found = getattr(base, "base_model", None)
    if found is None or found is base:
        raise AttributeError("no decoder")
    return found(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state


def _token_nll(logits: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), following, reduction="none")


def _nll_of_head(head: nn.Module, states: Tensor, following: Tensor) -> Tensor:
    """Per-token nats [n] from hidden states [n, H]; in chunks where nothing has to be kept for a backward pass."""
    if torch.is_grad_enabled():
        return _token_nll(head(states), following)
    weight = getattr(head, "weight", None)
    width = weight.shape[0] if isinstance(weight, Tensor) else CHUNK_ELEMENTS
    step = max(1, CHUNK_ELEMENTS // width)
    if states.device.type == "cpu":
        step = min(step, max(CPU_CHUNK_ROWS, CPU_CHUNK_ELEMENTS // width))
    parts = [slice(start, start + step) for start in range(0, max(1, len(states)), step)]
    return torch.cat([_token_nll(head(states[part]), following[part]) for part in parts])


def _nll_of_model(
    model: nn.Module, ids: Tensor, attention: Tensor, rows: Tensor, columns: Tensor, following: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The same through the model's own logits; a few rows at a time where no gradient is wanted."""
    width = known_tokens(base_model(model))
    step = len(ids) if torch.is_grad_enabled() else max(1, CHUNK_ELEMENTS // (ids.shape[1] * width))
    nll: list[Tensor] = []
    states: list[Tensor] = []
    for start in range(0, len(ids), max(1, step)):
        part = slice(start, start + step)
        options = {"use_cache": False, "output_hidden_states": keep}
        output = model(input_ids=ids[part], attention_mask=attention[part], **options)
        here = (rows >= start) & (rows < start + step)
        nll.append(_token_nll(output.logits[rows[here] - start, columns[here]], following[here]))
        if keep:
            states.append(output.hidden_states[-1])
    return torch.cat(nll), torch.cat(states) if keep else None


def _route(model: nn.Module) -> _Route:
    with _probing:
        route = _routes.get(model)
        if route is None:
            with evaluating(model), torch.no_grad():
                route = _probe(model)
            _routes[model] = route
            if not route.direct:
                name = type(base_model(model)).__name__
                log(f"{name}: logits are more than the head's output; the full path is used")
        return route


def same_route(model: nn.Module, other: nn.Module) -> None:
    """Saves `model` the probe where that of `other` is known: the same network with or without an adapter on it."""
    if (route := _routes.get(other)) is not None:
        _routes[model] = route


def _probe(model: nn.Module) -> _Route:
    """Compares both ways on five tokens, and on the same five followed by others, by padding and by nothing."""
    base = base_model(model)
    text = (torch.arange(8, device=next(base.parameters()).device) * 7919 + 11) % known_tokens(base)
    other = torch.cat([text[:5], text[5:].flip(0) // 2])
    both, short = torch.stack([text, other]), text[None, :5]
    padding = torch.ones_like(both)
    padding[1, 5:] = 0

    logits = model(input_ids=short, attention_mask=torch.ones_like(short), use_cache=False).logits
    direct = logits.shape[1] == 5 and _shortcut_agrees(base, short, logits)

    def states(ids: Tensor, mask: Tensor | None) -> Tensor:
        if direct:
            return _hidden(base, ids, mask)
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    if logits.shape[1] != 5:  # prompt tuning puts virtual tokens first
        cause = f"answers 5 tokens with {logits.shape[1]} positions of logits"
        remedy = "use a causal language model without virtual tokens (full weights or LoRA)"
        raise RequestError(message(type(model).__name__, cause, remedy))
    expected, masked = states(short, None), states(both, padding)[:, :5]
    if not (_close(masked[0], expected[0], 0.01) and _close(masked[1], expected[0], 0.01)):
        cause = "is not causal: what follows a token changes its prediction, so no likelihood is defined"
        remedy = "name a causal language model such as LLaMA, Qwen, GPT-2"
        raise RequestError(message(type(base).__name__, cause, remedy))
    return _Route(direct=direct, mask=not _close(states(both, None)[1, :5], expected[0], 0.01))


def _shortcut_agrees(base: nn.Module, ids: Tensor, logits: Tensor) -> bool:
    config: Any = getattr(base, "config", None)
    if any(getattr(config, name, None) for name in _SOFTCAPS):
        return False  # a cap hardly shows on small logits and bites on large ones
    try:
        head = base.get_output_embeddings()  # type: ignore[operator]
        shortcut = head(_hidden(base, ids, torch.ones_like(ids)))
    except (AttributeError, TypeError, ValueError):
        return False
    return shortcut.shape == logits.shape and _close(shortcut, logits, 1e-4)


def _close(a: Tensor, b: Tensor, fp32_tolerance: float) -> bool:
    """Whether the largest difference is small beside the largest value, in the precision at hand."""
    tolerance = fp32_tolerance if a.dtype == torch.float32 else max(fp32_tolerance, 0.05)
    a, b = a.float(), b.float()
    if not (a.isfinite().all() and b.isfinite().all()):
        return True  # a model that is broken so says so by its losses
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-20))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule back to its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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


def padding_id(tokenizer: object, rows: int | None = None) -> int:
    """A token to fill rows with: the tokenizer's own padding, else its EOS, else token 0 (it is masked anyway); one
    that has an embedding, where the model's number of them (`rows`) is known."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int) and (rows is None or value < rows):
            return value
    return 0
