"""The examples in docstrings run, and every public name that can have a cheap one has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import im_lightning

PACKAGE = Path(im_lightning.__file__).parent
MODULES = [
    ".".join(("im_lightning", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]
ON_THE_PAGE = {
    "fit_rule", "score_examples", "encode_examples", "resolve_template", "response_nll", "Indicator",
    "InstructMiningCallback", "InstructMiningDataModule", "InstructTuningModule",
    "InstructMiningError", "RequestError", "DataError", "targets_of",
}  # fmt: skip
"""Names whose example needs a model, a Trainer or runs, or says nothing alone: theirs is in docs/api.md."""


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example that gives something else than it shows is worse than none."""
    from im_lightning.indicators import base
    from im_lightning.indicators.built_in import BUILT_IN
    from im_lightning.rule import published

    base.get_indicators(list(BUILT_IN))  # their modules register them once, and must not do so in the copy below
    monkeypatch.setattr(base, "_registered", dict(base._registered))  # an example registers an indicator
    monkeypatch.setattr(published, "_warned", set(published._warned))  # and one loads a rule that warns once
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried and not failed


@pytest.mark.parametrize("name", sorted(set(im_lightning.__all__) - ON_THE_PAGE - {"__version__"}))
def test_a_public_name_has_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(getattr(im_lightning, name)) or "")
