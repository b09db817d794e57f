"""Two Lightning packages: the one in use is chosen once, and a Trainer of the other is refused by name."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as pl
from fitting import World

from im_lightning import _lightning
from im_lightning.training.callback import InstructMiningCallback

foreign = type("Trainer", (), {"__module__": "lightning.pytorch.trainer.trainer"})
FOREIGN: Any = foreign()
TEXT = r"is built on pytorch_lightning, but the Trainer comes from lightning.pytorch.*import lightning.pytorch before"


def test_what_is_imported_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _lightning.choose_package() == "pytorch_lightning"
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch", ModuleType("lightning.pytorch"))
    assert _lightning.choose_package() == "lightning.pytorch"


def test_what_is_installed_is_used_and_its_absence_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    assert _lightning.choose_package() == "pytorch_lightning"
    installed = {"lightning"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert _lightning.choose_package() == "lightning.pytorch"
    installed.clear()
    with pytest.raises(ImportError, match="pip install pytorch-lightning"):
        _lightning.choose_package()


def test_a_subclass_of_trainer_is_recognised() -> None:
    class Own(pl.Trainer):
        pass

    assert _lightning.package_of(Own.__new__(Own)) == "pytorch_lightning"
    assert _lightning.package_of(FOREIGN) == "lightning.pytorch" and _lightning.package_of(object()) is None


def test_each_part_refuses_the_other_package(world: World) -> None:
    """Without this the mix fails deep inside Lightning, with a message that names neither."""
    data, tuner = world.data(), world.tuner()
    data.trainer = FOREIGN
    with pytest.raises(TypeError, match="InstructMiningDataModule " + TEXT):
        data.setup("fit")
    tuner._trainer = FOREIGN
    with pytest.raises(TypeError, match="InstructTuningModule " + TEXT):
        tuner.setup("fit")
    with pytest.raises(TypeError, match="InstructMiningCallback " + TEXT):
        InstructMiningCallback().setup(FOREIGN, tuner, "fit")
