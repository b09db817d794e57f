"""One base model for the many fits of a process: loaded once, lent to one fit at a time, then put back as it was.

    with shared_base():
        for run in runs:
            with returning_base(module):
                module.network = borrow_base(folder)
                ...  # adapters, hooks, modes, gradients, trained weights: whatever a fit does to it

Kept are the network on its device, its modules' attributes as loaded (which share the weights), a checksum of every
tensor, and, once it was lent to be trained in full, a copy of its weights in the host's memory. What comes back gets
its attributes again, so that adapters, hooks, modes and gradients are gone; a network whose frozen weights have changed
all the same is not lent again but loaded.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from im_lightning._utils.progress import log
from im_lightning.models.checkpoint import load_causal_lm
from im_lightning.models.fingerprint import hub_commit, local_folder, weight_files
from im_lightning.models.likelihood import base_model, same_route

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Base:
    """A loaded network, and what it was like when it was loaded."""

    def __init__(self, key: Any, network: PreTrainedModel) -> None:
        self.key, self.network = key, network
        objects: dict[int, Any] = {id(module): module for module in network.modules()}
        for module in list(objects.values()):  # and the settings that they share
            objects |= {id(one): one for one in vars(module).values() if hasattr(one, "to_dict")}
        self._objects = [(one, _copied(vars(one))) for one in objects.values()]
        self._tensors = [(one, one.data, one.requires_grad) for one in _tensors(network)]
        self._sums = self._checksums()
        self._weights: list[Tensor] | None = None

    def keep_weights(self) -> None:
        """Takes the copy from which trained weights become the base's again."""
        if self._weights is None:
            self._weights = [one.detach().to("cpu", copy=True) for one, _, _ in self._tensors]

    def tidy(self) -> None:
        """Takes away what a fit has added: modules and hooks, modes, gradients, other types and devices."""
        for one, attributes in self._objects:
            vars(one).clear()
            vars(one).update(_copied(attributes))
        for one, data, requires_grad in self._tensors:
            one.grad, one.data = None, data
            one._backward_hooks = one._post_accumulate_grad_hooks = None  # type: ignore[assignment]
            one.requires_grad_(requires_grad)

    def whole(self) -> bool:
        """Puts the base's weights back where a copy is kept; whether the weights are the base's."""
        if self._weights is not None:
            with torch.no_grad():
                for (one, _, _), weights in zip(self._tensors, self._weights, strict=True):
                    one.copy_(weights)
        return self._checksums() == self._sums

    def _checksums(self) -> list[int]:
        """Of each tensor: its elements read as whole numbers, added up."""
        sums = [
            one.detach().reshape(-1).view(_WHOLE_NUMBERS[one.element_size()]).sum(dtype=torch.int64)
            for one, _, _ in self._tensors
            if not one.is_complex()
        ]
        return torch.stack(sums).tolist()


class _Shared:
    """What fits share: the base that is free, the one that is lent, and what was measured of bases."""

    def __init__(self) -> None:
        self.free: _Base | None = None
        self.lent: _Base | None = None
        self.measured: dict[str, Any] = {}


shared: _Shared | None = None
"""What the fits of this process share; None where each loads its own base."""


@contextmanager
def shared_base() -> Iterator[None]:
    """Inside, networks that are returned are lent again. A second one inside changes nothing; one thread at a time."""
    global shared
    if shared is not None:
        yield
        return
    shared = _Shared()
    try:
        yield
    finally:
        shared = None


def borrow_base(
    model: str | os.PathLike[str],
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    trained: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, as `load_causal_lm` gives it; inside `shared_base` the one that was
    returned, where files, type, device and precision are the same.

    Args:
        model: A checkpoint folder or a hub id.
        revision: Of a hub id.
        dtype: Of the weights.
        device: Where they go.
        precision: In which forward passes will be computed: fp32 or bf16.
        trained: Whether the weights themselves will be trained, so that a copy has to be kept.

    Raises:
        RequestError: as `load_causal_lm`.
    """
    if shared is None:
        return load_causal_lm(model, revision, dtype, device)
    key = (_identity(model, revision), dtype, torch.device(device), precision)
    base, shared.free, shared.lent = shared.free, None, None
    if base is not None and (base.key != key or not base.whole()):
        if base.key == key:
            log(f"{model}: its frozen weights were changed by a fit; loaded anew")
        base = None  # before another is loaded: only one is held
    if base is None:
        base = _Base(key, load_causal_lm(model, revision, dtype, device))
    if trained:
        base.keep_weights()
    shared.lent = base
    return base.network


def return_base(module: Any) -> None:
    """Takes the network of a module back where it was borrowed, with the adapter that may be on it. Inside
    `shared_base` the module has no network then."""
    if shared is None or shared.lent is None or getattr(module, "network", None) is None:
        return
    base, network = shared.lent, module.network
    if base_model(network) is base.network:
        module.network = None
        same_route(base.network, network)
        base.tidy()
        shared.free, shared.lent = base, None


@contextmanager
def borrowed_base(*arguments: Any) -> Iterator[PreTrainedModel]:
    """The network of `borrow_base(*arguments)`, to be looked at; returned at the end."""
    holder = SimpleNamespace(network=borrow_base(*arguments))
    with returning_base(holder):
        yield holder.network


@contextmanager
def returning_base(module: Any) -> Iterator[None]:
    """Around a fit of the module: `return_base` after it."""
    try:
        yield
    finally:
        return_base(module)


def release_base() -> None:
    """Frees the memory of a base that is kept and not lent, for another model that is about to be loaded."""
    if shared is not None and shared.free is not None:
        shared.free = None


def _identity(model: str | os.PathLike[str], revision: str | None) -> Any:
    """What the files are: where, names, sizes, times; or a hub id with its commit."""
    folder = local_folder(model)
    if folder is None:
        return str(model), hub_commit(str(model), revision)
    stats = [(path.name, path.stat()) for path in (folder / "config.json", *weight_files(folder))]
    return str(folder.resolve()), tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes, with copies of what can be added to; what they hold is shared."""
    return {name: copy.copy(v) if isinstance(v, dict | list | set) else v for name, v in attributes.items()}
