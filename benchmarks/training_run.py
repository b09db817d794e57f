"""One short LoRA finetune in a process of its own, so that its peak memory is its own; what came of it as JSON.

    python -m benchmarks.training_run REQUEST.json RESULT.json

A step's seconds are those between the beginnings of its batch and of what follows: set-up is not among them.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

RANK = 16
RATE = 2e-4


def main(argv: list[str]) -> int:
    """Runs what the request says: kind (micro-batches, padded or trl), precision, model, pool, rows, steps, ….

    The result has the seconds and loss of each step, and the peak of resident memory in bytes.
    """
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    found = _trl(request) if request["kind"] == "trl" else _ours(request)
    peak = peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
    Path(argv[1]).write_text(json.dumps({**found, "peak": peak}), encoding="utf-8")
    return 0


def peak_bytes(usage: resource.struct_rusage) -> float:
    """Peak of resident memory."""
    return float(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


class _Steps:
    """Seconds between marks."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._begun = 0.0

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self._begun)

    def result(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "losses": self.losses}


def padded_module() -> Any:
    """`InstructTuningModule` on the path of strategies that take a batch whole, padding and all."""
    from im_lightning.training.module import InstructTuningModule

    class Padded(InstructTuningModule):
        def _micro_batch_budget(self) -> None:
            return None

    return Padded


def _ours(request: dict[str, Any]) -> dict[str, Any]:
    """By `InstructTuningModule` under a Trainer."""
    from torch.utils.data import DataLoader

    from im_lightning._lightning import Callback, Trainer
    from im_lightning._utils.progress import silence
    from im_lightning.data.settings import Encoding, Reading
    from im_lightning.training.module import InstructTuningModule
    from im_lightning.training.run.encoded_pool import Collate, coding_of, encoded_pool, read_pool

    steps, accumulate = _Steps(), request["accumulate"]

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % accumulate == 0:
                steps.begin()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if (batch_idx + 1) % accumulate == 0:
                steps.end()
                steps.losses.append(float(trainer.callback_metrics["train_loss"]))

    kind = padded_module() if request["kind"] == "padded" else InstructTuningModule
    coding = coding_of(Encoding(request["model"], max_length=request["max_length"]))
    rows = encoded_pool(read_pool(request["pool"], Reading()), coding)
    at, size = range(len(rows)), request["rows"]
    batches = [list(at[i * size : (i + 1) * size]) for i in range(request["steps"] * accumulate)]
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=Collate(coding.tokenizer))
    with silence():
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, callbacks=[Watch()], gradient_clip_val=1.0,
            accumulate_grad_batches=accumulate, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=Path(request["pool"]).parent,
        )  # fmt: skip
        precision = request["precision"]
        tuner = kind(request["model"], lora_rank=RANK, learning_rate=RATE, warmup_ratio=0.0, dtype=precision)
        trainer.fit(tuner, loader)
    return {**steps.result(), **tuner.numerics()}


def _trl(request: dict[str, Any]) -> dict[str, Any]:
    """By TRL's SFTTrainer: its default loss and collator, completions only, the same rows in the same order."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    steps = _Steps()

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                steps.losses.append(float(logs["loss"]))

    lines = Path(request["pool"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    pairs = [{"prompt": [turns[0]], "completion": [turns[1]]} for turns in rows]
    arguments = SFTConfig(
        output_dir=str(Path(request["pool"]).parent / "trl"), use_cpu=True, per_device_train_batch_size=request["rows"],
        gradient_accumulation_steps=request["accumulate"], max_steps=request["steps"], learning_rate=RATE,
        lr_scheduler_type="cosine", max_length=request["max_length"], train_sampling_strategy="sequential",
        gradient_checkpointing=False, bf16=request["precision"] == "bf16", fp16=False, logging_steps=1,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(request["model"]),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Watch()],
    )
    trainer.train()
    return {**steps.result(), "precision": request["precision"]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
