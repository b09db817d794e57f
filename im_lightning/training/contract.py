"""What `InstructMiningCallback` asks of the data module and of a LightningModule, and what it says when it lacks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from im_lightning.errors import RequestError, message
from im_lightning.training.datamodule import InstructMiningDataModule

_CONTRACT = (
    'return {"loss": …, "example_loss": mean nats per response token of each example [B], "row": batch["row"]} from '
    "training_step, both detached"
)


def check_parts(trainer: Any, module: Any, evaluation: str | None, who: str) -> InstructMiningDataModule:
    """The Trainer's data module, if it and the module can be worked with; before hours of training.

    Args:
        trainer: The Trainer, its data module set up.
        module: The LightningModule.
        evaluation: The evaluation set asked for, None for the first.
        who: What asks.

    Raises:
        RequestError: another data module, a module without `response_nll`, an unknown evaluation set.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, InstructMiningDataModule):
        cause = f"the Trainer's datamodule is {type(datamodule).__name__}"
        raise RequestError(message(who, cause, "pass Trainer.fit(..., datamodule=InstructMiningDataModule(...))"))
    if datamodule.eval_sets and not callable(getattr(module, "response_nll", None)):
        remedy = "define response_nll(self, batch) -> (summed NLL [B], response tokens [B]), or leave out eval_data"
        cause = f"{type(module).__name__} has no response_nll, which measures the evaluation loss"
        raise RequestError(message(who, cause, remedy))
    if evaluation is not None and evaluation not in datamodule.eval_sets:
        cause = f"there is no evaluation set {evaluation!r}"
        named = ", ".join(datamodule.eval_sets) or "none: pass eval_data="
        raise RequestError(message("evaluation", cause, f"name one of the sets of eval_data ({named})"))
    return datamodule


def step_losses(module: Any, outputs: Any) -> tuple[Tensor, Tensor] | None:
    """example_loss float [B] and row int64 [B] of a training step, detached; None where the step was skipped.

    Raises:
        RequestError: the module's `training_step` returned something else.
    """
    if outputs is None:
        return None
    if not isinstance(outputs, dict) or "example_loss" not in outputs or "row" not in outputs:
        has = f"with {', '.join(outputs)}" if isinstance(outputs, dict) else f"as a {type(outputs).__name__}"
        lacks = [k for k in ("example_loss", "row") if not isinstance(outputs, dict) or k not in outputs]
        cause = f"its training_step returned {has}: {' and '.join(lacks)} missing"
        raise RequestError(message(type(module).__name__, cause, _CONTRACT))
    loss, row = outputs["example_loss"].detach(), outputs["row"].detach()
    if loss.shape != row.shape or loss.ndim != 1:
        cause = f"example_loss has shape {tuple(loss.shape)} and row {tuple(row.shape)}, not [B] both"
        raise RequestError(message(type(module).__name__, cause, _CONTRACT))
    return loss, row
