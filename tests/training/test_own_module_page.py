"""docs/own_module.md as it stands: a user's own LightningModule with our data module and callback."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import World

from im_lightning.ledger.ledger import RunLedger
from im_lightning.models.likelihood import evaluating
from im_lightning.training.module import InstructTuningModule

PAGE = Path(__file__).parents[2] / "docs" / "own_module.md"
MODULE, FIT = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture
def space(world: World) -> dict[str, Any]:
    """What the page's code leaves behind, run at the size of a test."""
    space: dict[str, Any] = {"__name__": "page"}
    exec(compile(MODULE, str(PAGE), "exec"), space)
    step, space["modes"] = space["MyModule"].training_step, []

    def noting(self: Any, *given: Any) -> Any:
        space["modes"].append({part.training for part in self.modules()})
        return step(self, *given)

    space["MyModule"].training_step = noting
    small = FIT.replace("meta-llama/Llama-3.2-1B", world.base).replace("subset_size=1000", "subset_size=16")
    small = small.replace("pl.Trainer(", "pl.Trainer(accelerator='cpu', logger=False, enable_progress_bar=False, ")
    exec(compile(small, str(PAGE), "exec"), space)
    return space


def test_the_run_is_recorded_like_ones_of_our_module(space: dict[str, Any]) -> None:
    (record,) = RunLedger("runs").records()
    assert record.status == "complete" and record.purpose == "designed" and record.subset["size"] == 16
    assert record.regime["method"] == "full" and record.regime["learning_rate"] == 1e-5
    assert set(record.indicator_means) == {"length_input", "length_output", "ppl", "mtld", "knn_6"}
    assert record.evaluation["eval"]["loss"] > 0 and record.evaluation["eval"]["base_loss"] > 0


def test_it_trains_in_training_mode(space: dict[str, Any]) -> None:
    """from_pretrained gives a model in evaluation mode, and Lightning leaves it there: without dropout."""
    assert space["modes"] and all(modes == {True} for modes in space["modes"])


def test_its_likelihood_is_ours(space: dict[str, Any], world: World) -> None:
    """Otherwise evaluation losses of own modules and of ours would not compare."""
    batch = space["data"].eval_batches("eval")[0]
    mine, ours = space["MyModule"](world.base), InstructTuningModule(world.base, lora_rank=0)
    found = []
    for module in (mine, ours):
        module.configure_model()
        with torch.no_grad(), evaluating(module):
            found.append(module.response_nll(batch))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0][1], found[1][1])
