"""Finetunes merged without training: the base plus Σ c_b Δ_b, Δ_b the low-rank update of adapter b.

The adapters stand side by side as one LoRA of rank Σ r_b, whose update B diag(c) A is the sum of theirs to the last
product: nothing is cut off, no base weight is copied or changed (so that it is as exact over a base in bf16 or in 4
bits), and a mixture changes c alone. Adapters whose c is 0 cost nothing. (Weights of finetunes averaged: Wortsman et
al. 2022, arXiv 2203.05482; adapters in place of data mixtures: MergeMix, arXiv 2601.17858.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from im_lightning._utils.files import parse_json
from im_lightning.errors import DataError, message

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files of a peft adapter; the second is written last."""


class StackedAdapters:
    """Adapters in the place of the one that a network has.

    Args:
        network: A `peft.PeftModel` with one LoRA adapter, whose own weights are given up.
        folders: Name → folder of an adapter of the same layers (`InstructTuningModule.export_adapter`), of any rank.

    Raises:
        DataError: a folder holds no adapter of these layers.
    """

    def __init__(self, network: Any, folders: Mapping[str, Path]) -> None:
        from peft.tuners.lora import LoraLayer

        self.names = list(folders)
        self.layers: dict[str, Any] = {
            name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)
        }
        self.active = network.active_adapter
        read = {name: _read(Path(folder)) for name, folder in folders.items()}
        self.ranks = [next(iter(state.values()))[0].shape[0] if state else 0 for state, _ in read.values()]
        self.stacks: dict[str, tuple[Tensor, Tensor]] = {}
        for where, layer in self.layers.items():
            a, b = layer.lora_A[self.active].weight, layer.lora_B[self.active].weight
            parts: list[tuple[Tensor, Tensor]] = []
            for (name, folder), (state, scaling) in zip(folders.items(), read.values(), strict=True):
                down, up = state.get(where, (None, None))
                if down is None or up is None or (down.shape[1], up.shape[0]) != (a.shape[1], b.shape[0]):
                    cause = f"block {name} has no update of {where} of the shape that the base has"
                    raise DataError(message(str(folder), cause, "make the sweep again in a new folder (--out)"))
                parts.append((down.to(a), up.to(b) * (scaling / layer.scaling[self.active])))
            self.stacks[where] = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts], dim=1)

    @torch.no_grad()
    def mix(self, coefficients: Mapping[str, float]) -> None:
        """Makes the network the base plus Σ c_b Δ_b; `coefficients` is name → c, 0 where none is given."""
        each = torch.tensor([float(coefficients.get(name, 0.0)) for name in self.names])
        scale = each.repeat_interleave(torch.tensor(self.ranks))
        kept = torch.nonzero(scale).flatten()
        for where, layer in self.layers.items():
            down, up = self.stacks[where]
            at = kept.to(down.device)
            layer.lora_A[self.active].weight.data = down[at]
            layer.lora_B[self.active].weight.data = up[:, at] * scale[kept].to(up)


def _read(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Layer → (A [r, in], B [out, r]) of an adapter, and its scaling, alpha / r."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = parse_json((folder / CONFIG).read_bytes())
        scaling = float(config["lora_alpha"]) / float(config["r"])
        state = load_file(folder / ADAPTER)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        remedy = "make the sweep again in a new folder (--out)"
        raise DataError(message(str(folder), f"it holds no adapter ({error})", remedy)) from error
    places = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    pairs = {place: (state[f"{place}.lora_A.weight"], state[f"{place}.lora_B.weight"]) for place in places}
    return pairs, scaling
