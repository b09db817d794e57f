"""The evaluation loss of the best checkpoint, recorded beside that of the final weights, by which a run is judged."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from im_lightning._utils.progress import log
from im_lightning.training.evaluation import all_sum, evaluate_with


def best_losses(trainer: Any, module: Any, datamodule: Any) -> dict[str, float]:
    """Nats per token of the best checkpoint's weights, per evaluation set; every rank calls it.

    Args:
        trainer: The Trainer, its process group alive.
        module: Its LightningModule; it has its present weights again afterwards.
        datamodule: An InstructMiningDataModule after setup.

    Returns:
        Empty where no checkpoint was kept by a monitored value, or where a rank cannot put its weights into the module
        as they are (sharded, or in a folder that it does not see).
    """
    checkpoint = trainer.checkpoint_callback
    if not datamodule.eval_sets or getattr(checkpoint, "best_model_score", None) is None:
        return {}
    named = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    own = {name: value for kind in named for name, value in kind}  # a tied weight stands in checkpoints under each name
    state = _weights(Path(checkpoint.best_model_path))
    fits = bool(state) and all(name in own and own[name].shape == value.shape for name, value in state.items())
    reduce, votes = all_sum(trainer), torch.tensor(float(fits))
    if (votes if reduce is None else reduce(votes)).item() < trainer.world_size:
        if trainer.is_global_zero:
            cause = "not all ranks can put its weights into the module as they are"
            log(f"{checkpoint.best_model_path}: the best checkpoint's evaluation loss is not measured: {cause}")
        return {}
    with _holding(own, state):
        losses = evaluate_with(trainer, module, datamodule.eval_sets)
    return {name: one.loss for name, one in losses.items()}


def best_note(trainer: Any) -> str:
    """Which checkpoint is the best, for the record; "" where none was kept by a monitored value."""
    checkpoint = trainer.checkpoint_callback
    score = getattr(checkpoint, "best_model_score", None)
    if score is None:
        return ""
    return f"best checkpoint by {checkpoint.monitor} ({float(score):.6g}): {checkpoint.best_model_path}"


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's state_dict; {} where there are none to be read here."""
    if not path.is_file():
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError):
        return {}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@contextmanager
def _holding(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[None]:
    """The module's tensors hold other values inside, and their own, kept in the host's memory, again afterwards: a
    device that trains all weights has no room for a second copy."""
    before = {name: own[name].detach().to("cpu", copy=True) for name in state}
    try:
        _copy(own, state)
        yield
    finally:
        _copy(own, before)


def _copy(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
