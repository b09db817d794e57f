"""A short finetune for scoring: low-rank updates of a model's linear layers, trained on some rows, added as hooks.

It is LoRA (Hu et al. 2021) as scoring needs it: no Trainer, no peft, a recipe that is fixed and part of the values'
identity. The update is never merged into the weights, since bf16 would round most of it away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from im_lightning._utils.hashing import digest_bytes
from im_lightning._utils.rng import LOW_RANK_ORDER, LOW_RANK_START, generator
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.models.batching import micro_batched_loss, training_budget
from im_lightning.models.likelihood import collate, summed_nll

if TYPE_CHECKING:
    from im_lightning.data.tokenization import Encoded


@dataclass(frozen=True)
class Recipe:
    """How the finetune is made. All of it decides the result, up to rounding."""

    rank: int = 8
    scale: float = 2.0  # by which B·A is multiplied
    learning_rate: float = 5e-4  # peak of AdamW's; linear warm-up over a tenth of the steps, then a cosine to zero
    epochs: int = 4
    batch_rows: int = 8
    seed: int = 0


Pair = tuple[Tensor, Tensor]
"""A float32 [rank, in] and B float32 [out, rank] of a layer."""


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a causal model by name, without the output layer.

    Raises:
        RequestError: it has none.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()  # type: ignore[operator]
    found: dict[str, nn.Module] = {
        n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head
    }
    if not found:
        cause = "it has no linear layers, to which a low-rank update could be added"
        raise RequestError(message(type(model).__name__, cause, "name another base model"))
    return found


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    weight: Any = layer.weight
    first, second = weight.shape
    return (first, second) if isinstance(layer, nn.Linear) else (second, first)


def gaussian(name: str, shape: tuple[int, int], sd: float, seed: int, device: torch.device) -> Tensor:
    """A matrix of independent normal numbers, float32, that depends on the layer's name and the seed alone."""
    word = int(digest_bytes(name.encode())[:16], 16)
    return torch.from_numpy(generator(seed, word, LOW_RANK_START).normal(0, sd, shape).astype(np.float32)).to(device)


def start(model: nn.Module, recipe: Recipe) -> dict[str, Pair]:
    """An update that changes nothing yet: A drawn, B zero."""
    device, pairs = next(model.parameters()).device, {}
    for name, layer in linear_layers(model).items():
        outputs, inputs = shape_of(layer)
        drawn = gaussian(
            name, (recipe.rank, inputs), 1 / math.sqrt(3 * inputs), recipe.seed, device
        )  # variance as peft
        pairs[name] = drawn, torch.zeros(outputs, recipe.rank, device=device)
    return pairs


def attach(model: nn.Module, pairs: Mapping[str, Pair], scale: float) -> None:
    """Adds the updates to the outputs of the layers, for good."""
    layers = linear_layers(model)

    def add(pair: Pair, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        a, b = (one.to(inputs[0].dtype) for one in pair)
        return output + scale * F.linear(F.linear(inputs[0], a), b)

    for name, pair in pairs.items():
        layers[name].register_forward_hook(partial(add, pair))


def finetune(
    model: nn.Module,
    rows: Sequence[Encoded],
    pad_id: int,
    recipe: Recipe,
    tokens: int | None = None,
    told: Callable[[float], Any] = lambda share: None,
) -> dict[str, Pair]:
    """Attaches an update to `model` and trains it on the loss tokens of `rows`; the model's own weights stay.

    Args:
        model: A causal language model.
        rows: Those with a token to train on are used, each once per epoch, in an order that the seed decides.
        pad_id: Token that fills a batch.
        recipe: How.
        tokens: Of a micro-batch, padding included; by default what the device has memory for.
        told: Called with the share done after each step.

    Returns:
        The update, by layer.

    Raises:
        RequestError: no row has a token to train on.
        InstructMiningError: the loss is not finite.
    """
    usable = [one for one in rows if one.loss_mask[1:].any()]
    if not usable:
        cause = f"none of its {len(rows):,} rows has a response token to train on"
        raise RequestError(message("the target rows", cause, "name rows with answers in --targets"))
    model.requires_grad_(False)
    pairs = start(model, recipe)
    attach(model, pairs, recipe.scale)
    parameters = [one.requires_grad_() for pair in pairs.values() for one in pair]
    device = parameters[0].device
    budget = training_budget(model, device, tokens or "auto", "finetuning on the targets", "--batch-tokens")
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    per_epoch = math.ceil(len(usable) / recipe.batch_rows)
    total = per_epoch * recipe.epochs
    for step in range(total):
        epoch, place = divmod(step, per_epoch)
        order = generator(recipe.seed, epoch, LOW_RANK_ORDER).permutation(len(usable))
        taken = [usable[i] for i in order[place * recipe.batch_rows : (place + 1) * recipe.batch_rows]]
        batch = {name: one.to(device) for name, one in collate(taken, pad_id, "loss_mask").items()}
        one_over = 1.0 / batch["target_mask"][:, 1:].sum()
        loss, _ = micro_batched_loss(partial(summed_nll, model), batch, one_over, parameters, budget)
        if not torch.isfinite(loss):
            cause = f"its loss is not finite at step {step + 1} of {total}"
            raise InstructMiningError(message("finetuning on the targets", cause, "try --precision fp32"))
        loss.backward()
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * _rate(step, total)
        optimizer.step()
        optimizer.zero_grad()
        told((step + 1) / total)
    for one in parameters:
        one.requires_grad_(False)
    return pairs


def _rate(step: int, total: int) -> float:
    """Share of the peak learning rate at a step."""
    warmup = math.ceil(total / 10)
    rising = (step + 1) / warmup
    return min(1.0, rising, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, total - warmup))))
