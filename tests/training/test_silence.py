"""`fit` said nothing for 22 minutes: what is done, how far and how long stands in the log of a fit and of a sweep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fitting import World, trainer

from im_lightning._utils import progress as _progress
from im_lightning.cli import main
from im_lightning.training.callback import InstructMiningCallback


@pytest.fixture
def every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each piece of work took longer than the five seconds after which it is heard of."""
    monkeypatch.setattr(_progress, "LOG_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(_progress, "LOG_EVERY_SECONDS", 0.0)


def test_a_fit_says_how_far_its_evaluations_and_steps_are(world: World, every_word: None, capfd: Any) -> None:
    mining = InstructMiningCallback("runs")
    trainer(world.root, callbacks=[mining]).fit(world.tuner(), datamodule=world.data(subset_size=16, subset_seed=0))
    said = capfd.readouterr().err
    batches = len(re.findall(r"^training: (\d+) of \1?\d* ?", said, re.MULTILINE))
    assert re.search(r"^training: 1 of (\d+) batches, [\d,]+(/s| s each), [\d,]+ s left$", said, re.MULTILINE)
    assert batches and len(re.findall(r"^evaluation on eval: 7 of 7 rows, ", said, re.MULTILINE)) == 2, (
        "before and after"
    )


def test_a_sweep_says_how_far_its_trial_is(world: World, every_word: None, capfd: Any) -> None:
    Path("fit.yaml").write_text(
        f"data: {{data: {world.pool}, eval_data: {world.eval}, scores: {world.scores}, model: {world.base}}}\n"
        "model: {lora_rank: 2}\n"
        "trainer: {accelerator: cpu, max_epochs: 1, logger: false, enable_checkpointing: false, "
        "enable_progress_bar: false}\n"
    )
    Path("sweep.yaml").write_text(
        "method: grid\nprogram: im-lightning\ncommand: [im-lightning, fit, --config, fit.yaml, '${args}']\n"
        "parameters: {data.subset_seed: {values: [0, 1]}, data.subset_size: {value: 16}}\n"
    )
    assert main(["sweep", "sweep.yaml"]) == 0
    said = capfd.readouterr().err
    assert "trials of sweep.yaml: 0 of 2 trials, no rate yet; training: 1 of " in said
    assert re.search(
        r"^trials of sweep.yaml: 1 of 2 trials, .* s left; training: 1 of \d+ batches, ", said, re.MULTILINE
    )
