"""Gradients of single rows, many in one backward pass, each shortened to a vector whose scalar products are kept.

What is differentiated are the matrices B of LoRA updates W + B·A where they start, at B = 0. There the gradient of A is
zero, and that of B is G·Aᵀ with G the gradient of the layer's weight: with A drawn from normal numbers of variance
1 / rank, itself a random projection of what full finetuning follows, whose scalar products it keeps on average. So no
warm-up is needed, and a row's vector depends on the base model alone: not on the rows that a warm-up would take (LESS,
Xia et al. 2024, arXiv 2402.04333, differentiates after one, and weighs by Adam's moments, which are left out here).

Of a row with T tokens, a layer with inputs x [T, in] and gradients g [T, out] of its outputs adds gᵀ·(x·Aᵀ), a matrix
[out, rank]. A hook forms it for all rows of a batch at once while the backward pass goes by, and adds its entries, each
with a random sign, to random places of the row's vector (CountSketch; Charikar et al. 2002): scalar products are right
on average, with a variance of at most 2 / dimensions for unit vectors; one layer's gradients are in memory at a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from im_lightning._utils.hashing import digest_bytes
from im_lightning._utils.rng import GRADIENT_SKETCH, generator
from im_lightning.models.likelihood import base_model, response_nll
from im_lightning.models.low_rank import gaussian, linear_layers, shape_of

RANK = 8
DIMENSIONS = 4096


@dataclass(frozen=True)
class Layer:
    """What is drawn for a layer: `a` float32 [rank, in]; for each entry of its gradient [out, rank], read row by row,
    the place in the vector (`place` int64 [out · rank]) and the sign (`sign` float32 [out · rank]).
    """

    a: Tensor
    place: Tensor
    sign: Tensor


class RowGradients:
    """Hooks on a model that give each row's gradient; until `close` its weights ask for none.

    Args:
        model: A causal language model. Layers that do not see rows × tokens (experts) are left out.
        rank: Of A and B.
        dimensions: Most numbers of a row's vector; gradients with no more entries are kept as they are.
        seed: Decides A, places and signs.

    Attributes:
        width: Numbers of a row's vector.
        layers: What was drawn, by the layer's name.
    """

    def __init__(self, model: nn.Module, rank: int = RANK, dimensions: int = DIMENSIONS, seed: int = 0) -> None:
        self.model = model.requires_grad_(False)
        self._batch = threading.local()  # batches may come from several threads
        layers = linear_layers(model)
        shapes = {name: shape_of(layer) for name, layer in layers.items()}
        entries = rank * sum(outputs for outputs, _ in shapes.values())
        self.width, self.layers = min(entries, dimensions), {}
        device, start = next(model.parameters()).device, 0
        for name, (outputs, inputs) in shapes.items():
            here = rank * outputs
            if entries <= dimensions:
                place, sign = np.arange(start, start + here), np.ones(here)
            else:
                drawn = generator(seed, int(digest_bytes(name.encode())[:16], 16), GRADIENT_SKETCH)
                place, sign = drawn.integers(dimensions, size=here), drawn.choice([-1.0, 1.0], size=here)
            start += here
            a = gaussian(name, (rank, inputs), 1 / math.sqrt(rank), seed, device)
            drawn_here = torch.from_numpy(place.astype(np.int64)), torch.from_numpy(sign.astype(np.float32))
            self.layers[name] = Layer(a, *(one.to(device) for one in drawn_here))
        hooks = [layers[name].register_forward_hook(partial(self._seen, one)) for name, one in self.layers.items()]
        tokens = base_model(model).get_input_embeddings()  # type: ignore[operator]
        self._hooks = [*hooks, tokens.register_forward_hook(self._embedded)]

    def close(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the rows' summed negative log-likelihoods.

        Args:
            batch: `input_ids`, `attention_mask`, `target_mask` of B rows, [B, T] (`likelihood.collate`).

        Returns:
            The vectors float32 [B, width]; the sums (nats) float32 [B] and target tokens int64 [B], detached.
        """
        total = torch.zeros(len(batch["input_ids"]), self.width, device=next(self.model.parameters()).device)
        try:
            with torch.enable_grad():
                self._batch.total = total
                result = response_nll(self.model, batch)
                if result.sums.requires_grad:  # else no token is asked for
                    result.sums.sum().backward()
        finally:
            self._batch.total = None
        return total, result.sums.detach(), result.counts

    def _embedded(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Gradients go as far as the embeddings, since no weight asks for one."""
        return None if getattr(self._batch, "total", None) is None else output.detach().requires_grad_()

    def _seen(self, layer: Layer, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        total: Tensor | None = getattr(self._batch, "total", None)
        states = inputs[0]
        if total is None or states.dim() != 3 or len(states) != len(total) or not output.requires_grad:
            return
        with torch.no_grad():
            reduced = F.linear(states, layer.a.to(states.dtype))  # [B, T, rank]

        def arrived(gradient: Tensor) -> None:
            entries = torch.bmm(gradient.transpose(1, 2), reduced).flatten(1).float()
            total.scatter_add_(1, layer.place.expand(len(total), -1), entries * layer.sign)

        output.register_hook(arrived)
