"""Which Lightning: `pytorch_lightning` and `lightning.pytorch` are two copies of one code, and they do not mix.

Resolved once, on import: whichever is already imported, else `pytorch_lightning`, else `lightning.pytorch`.
Only `im_lightning.training` and what stands above it import this module.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from im_lightning._utils.progress import silence, without_bars

NAMES = ("pytorch_lightning", "lightning.pytorch")


def choose_package() -> str:
    """Name of the Lightning package to use: one of `NAMES`.

    Raises:
        ImportError: neither is installed.
    """
    for name in NAMES:
        if name in sys.modules:
            return name
    for name in NAMES:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            return name
    raise ImportError("im_lightning.training needs Lightning; install it with: pip install pytorch-lightning")


def submodule(name: str) -> ModuleType:
    """A module of the chosen package, for example `submodule("cli")`."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def package_of(trainer: Any) -> str | None:
    """The Lightning package that a Trainer (or a subclass of it) comes from, None if from neither."""
    for cls in type(trainer).__mro__:
        for name in NAMES:
            if cls.__module__ == name or cls.__module__.startswith(name + "."):
                return name
    return None


def check_trainer(trainer: Any, who: str) -> None:
    """Refuses a Trainer of the other package, which would fail later with a message that says nothing.

    Args:
        trainer: The Trainer that `who` was given to.
        who: Name of the class of ours that checks.

    Raises:
        TypeError: names both packages and what to do.
    """
    other = package_of(trainer)
    if other is not None and other != PACKAGE:
        raise TypeError(
            f"{who} is built on {PACKAGE}, but the Trainer comes from {other}: the two packages do not mix. "
            f"Use {PACKAGE}.Trainer, or import {other} before im_lightning, which then builds on it."
        )


def isolate_rng() -> AbstractContextManager[None]:
    """Whatever is drawn inside, the generators of Python, numpy and torch go on as if it had not been.

    For optional work: scoring is skipped when the store has the values, and were its draws to move
    the global generators, one seed would give two adapter starts. CUDA's are kept where CUDA is in use already, since
    asking for them would start it.
    """
    import torch

    return submodule("utilities.seed").isolate_rng(include_cuda=torch.cuda.is_initialized())


@contextmanager
def passing_on_ctrl_c(trainer: Any) -> Iterator[None]:
    """Around a fit: Ctrl-C is a KeyboardInterrupt, which Lightning turns into an exit with status 1."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)  # Lightning made the process deaf to the next one
        raise KeyboardInterrupt from error


PACKAGE = choose_package()

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
else:
    pl = importlib.import_module(PACKAGE)
    Callback = pl.Callback
    LightningDataModule = pl.LightningDataModule
    LightningModule = pl.LightningModule
    Trainer = pl.Trainer

__all__ = [
    "NAMES",
    "PACKAGE",
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "check_trainer",
    "choose_package",
    "isolate_rng",
    "keep_environment",
    "package_of",
    "passing_on_ctrl_c",
    "pl",
    "quiet",
    "submodule",
]


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what Lightning, transformers and this package say at every one of a hundred short fits."""
    loggers = (PACKAGE, f"{PACKAGE}.utilities.rank_zero", "lightning_fabric", "lightning.fabric")
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with without_bars(), silence(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a weighting warns of is in its report, and so in the run's record
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def keep_environment(*names: str) -> Iterator[None]:
    """Environment variables of these names are afterwards as they were before."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
