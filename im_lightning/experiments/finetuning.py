"""One short finetune in this process: the ordinary Trainer, data module, module and callback, without their chatter."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from im_lightning._lightning import PACKAGE, Trainer, isolate_rng, passing_on_ctrl_c, pl
from im_lightning._utils.progress import silence
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.experiments.settings import TuningSettings
from im_lightning.ledger.record import RunRecord
from im_lightning.models import checkpoint
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.module import InstructTuningModule

_LOGGERS = (PACKAGE, f"{PACKAGE}.utilities.rank_zero", "lightning_fabric", "lightning.fabric")


def finetune(
    data: InstructMiningDataModule,
    model: str,
    settings: TuningSettings,
    seed: int,
    ledger: str | os.PathLike[str],
    root: str | os.PathLike[str],
    callbacks: Sequence[Any] = (),
) -> RunRecord:
    """Finetunes `model` on what `data` gives, evaluates, and adds the run to the ledger; no refit.

    Args:
        data: Decides rows, evaluation sets and the run's purpose.
        model: Folder of the base model.
        settings: Learning rate, epochs, ….
        seed: Training seed: dropout and the adapter's start (the order of rows is the data module's).
        ledger: Folder of the runs.
        root: The Trainer's folder; frozen tables go there.
        callbacks: Further ones, called after the one that keeps the run.

    Returns:
        The run's record.

    Raises:
        InstructMiningError: the fit ended without a complete record.
    """
    module = InstructTuningModule(
        model,
        lora_rank=settings.lora_rank,
        learning_rate=settings.rate,
        warmup_ratio=settings.warmup_ratio,
        gradient_checkpointing=settings.gradient_checkpointing,
        dtype=settings.dtype,
        revision=data.hparams["revision"],
    )
    callback = InstructMiningCallback(ledger=os.fspath(ledger), refit=False)
    with quiet(), isolate_rng(), keep_environment(seed):
        trainer = Trainer(
            accelerator=settings.device,
            devices=1,
            max_epochs=settings.epochs,
            gradient_clip_val=settings.gradient_clip,
            accumulate_grad_batches=settings.accumulate,
            callbacks=[callback, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=Path(root),
        )
        with passing_on_ctrl_c(trainer):
            trainer.fit(module, datamodule=data)
    record = callback.record
    if record is None or record.status != "complete":
        cause = "the fit ended without a complete record" + (f" ({record.note})" if record is not None else "")
        remedy = "run the same command again"
        if record is not None and record.evaluation:  # measured, and not finite: the same seed diverges again
            remedy = "lower the learning rate (--learning-rate): the same command would diverge again"
        raise InstructMiningError(message(os.fspath(ledger), cause, remedy))
    return record


def check_seed(seed: int) -> None:
    """Refuses a first seed that Lightning and numpy would refuse at the first fit.

    Raises:
        RequestError: it is negative, or too large for those after it.
    """
    if not 0 <= seed < 1 << 31:
        raise RequestError(message("--seed", f"it is {seed}", "give one from 0 to 2,147,483,647"))


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what Lightning, transformers and this package say at every one of a hundred short fits."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with checkpoint.quiet(), silence(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a weighting warns of is in its report, and so in the run's record
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def keep_environment(seed: int) -> Iterator[None]:
    """Seeds every generator as Lightning does; its environment variables are as before afterwards."""
    before = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    try:
        pl.seed_everything(seed, verbose=False)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
