"""Runs of a sweep that share SmolLM2 in one process: the records of runs alone, and a quick start."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pools import write_jsonl

from im_lightning import load_examples, score_examples
from im_lightning._lightning import Callback
from im_lightning._utils.files import write_json
from im_lightning.experiments.finetuning import TuningSettings, finetune
from im_lightning.experiments.sweep.trial import TrialRequest, TrialResult, run_trial
from im_lightning.ledger.ledger import RunLedger
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.shared_base import shared_base
from tests.real.conftest import rows_of

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(1800)]
KINDS = (["--model.lora_rank=16"], ["--model.lora_rank=0", "--model.learning_rate=5e-5"], ["--model.lora_rank=8"])


@pytest.fixture
def parts(smollm2: str, tmp_path: Path) -> dict[str, str]:
    pool = write_jsonl(tmp_path / "pool.jsonl", rows_of(24, seed=2))
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows_of(4, seed=3))
    table = score_examples(load_examples(pool), ["length_output"], model="smollm2")
    table.write(tmp_path / "scores.parquet")
    return {"data": pool, "eval_data": held_out, "model": "smollm2", "scores": str(tmp_path / "scores.parquet")}


def request(parts: dict[str, str], place: str, number: int) -> TrialRequest:
    words = [f"--data.{name}={value}" for name, value in parts.items()]
    words += [
        "--data.subset_size=8", f"--data.subset_seed={number}", "--data.batch_size=4", f"--seed_everything={number}",
        "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false",
        "--trainer.enable_checkpointing=false", f"--trainer.default_root_dir={place}", f"--mining.ledger={place}/runs",
    ]  # fmt: skip
    return TrialRequest(
        number, [*words, *KINDS[number]], f"20260101-00000{number}-aaaaaaaa", f"{place}/trials/{number}"
    )


def test_the_records_are_those_of_runs_alone(parts: dict[str, str], tmp_path: Path) -> None:
    together, alone = str(tmp_path / "together"), str(tmp_path / "alone")
    with shared_base():
        for number in range(len(KINDS)):
            result = run_trial(request(parts, together, number))
            assert isinstance(result, TrialResult) and result.status == "done", result
    for number in range(len(KINDS)):
        asked, answer = tmp_path / "request.json", tmp_path / "result.json"
        write_json(asked, asdict(request(parts, alone, number)))
        command = [sys.executable, "-m", "im_lightning.experiments.sweep.trial", str(asked), str(answer)]
        subprocess.run(command, check=True)
    both = [RunLedger(f"{place}/runs") for place in (together, alone)]
    for one, other in zip(*(ledger.records() for ledger in both), strict=True):
        assert one.evaluation == other.evaluation
        assert one.subset == other.subset and one.numerics == other.numerics and one.tokens == other.tokens
        sums = [
            list(ledger.losses(run.run_id)["held_out"].sums) for ledger, run in zip(both, (one, other), strict=True)
        ]
        assert sums[0] == sums[1]


class Starts(Callback):
    """Processor seconds at which training begins."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.at.append(time.process_time())


def test_a_run_after_the_first_starts_in_two_seconds(parts: dict[str, str], tmp_path: Path) -> None:
    """Of the processor: from the call to the first batch, the base's evaluation included, which is known by then."""
    tuning = TuningSettings(lora_rank=16, batch_size=4, device="cpu")
    with shared_base():
        for seed in range(3):
            begun, starts = time.process_time(), Starts()
            data = InstructMiningDataModule(**parts, subset_size=8, subset_seed=seed, batch_size=4)
            finetune(data, "smollm2", tuning, seed, tmp_path / "runs", tmp_path, [starts])
            taken = starts.at[0] - begun
    assert taken < 2, taken
