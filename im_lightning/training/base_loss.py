"""The untouched base's evaluation loss, measured once per frozen folder: every finetune is compared with it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from im_lightning._utils.files import parse_json, write_json
from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import log
from im_lightning.errors import InstructMiningError
from im_lightning.training.evaluation import evaluate_with


def base_losses(trainer: Any, module: Any, datamodule: Any, fresh: bool) -> dict[str, float]:
    """Nats per token of the weights that the fit starts from, per evaluation set; every rank calls it.

    Args:
        trainer: The Trainer, its process group alive.
        module: Its LightningModule; its `base_weights()`, where it has one, is a context with the base's weights, or
            None where training has changed them.
        datamodule: An InstructMiningDataModule after setup.
        fresh: Whether nothing has been trained yet: without `base_weights()` the present weights are then the base's.

    Returns:
        Empty where there is no evaluation set, or the base's weights are gone.
    """
    base = getattr(module, "base_weights", None)
    weights = base() if callable(base) else nullcontext() if fresh else None
    if not datamodule.eval_sets or weights is None:
        return {}
    path = _note(trainer, module, datamodule) if callable(base) else None
    known = _read(path, set(datamodule.eval_sets)) if path is not None and trainer.is_global_zero else None
    known = trainer.strategy.broadcast(known)
    if known is not None:
        return known
    with weights:
        losses = evaluate_with(trainer, module, datamodule.eval_sets)
    out = {name: one.loss for name, one in losses.items()}
    if path is not None and trainer.is_global_zero and all(math.isfinite(loss) for loss in out.values()):
        try:
            write_json(path, {"losses": out})
        except InstructMiningError as error:  # it only saves time
            log(str(error))
    return out


def _note(trainer: Any, module: Any, datamodule: Any) -> Path | None:
    """Where the losses of this base are kept; None where the module trains another model than the data module names."""
    options = module.hparams
    if options.get("model") != datamodule.hparams["model"] or options.get("revision") != datamodule.hparams["revision"]:
        return None
    numerics = {
        "dtype": options.get("dtype"),
        "precision": str(trainer.precision_plugin.precision),
        "device": trainer.strategy.root_device.type,
        "full": not options.get("lora_rank"),
        **({"quantization": options["quantization"]} if options.get("quantization") else {}),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    return datamodule.run_folder / "base" / f"{digest_json(numerics)}.json"


def _read(path: Path, names: set[str]) -> dict[str, float] | None:
    try:
        losses = parse_json(path.read_text(encoding="utf-8"))["losses"]
        return {name: float(losses[name]) for name in sorted(names)}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not measured yet, or torn: measured again
