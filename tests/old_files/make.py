"""Writes `desk/` and `expected.json`: one file of each kind that a build leaves behind, and what stood in it.

Run it from the repository's root, with the environment of the tests:

    OMP_NUM_THREADS=1 python tests/old_files/make.py

The files here were written by the build of commit 803302a. They are *old* files: they are made again
only when a change of format is meant, and then the change is told to the users. `flags.json`, `command_lines.txt` and
`recipes/` are written by `python tests/old_files/make.py flags`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

OLD = Path(__file__).resolve().parent
sys.path[:0] = [str(OLD.parent), str(OLD.parents[1])]
SUBJECTS = ("atoms", "primary colors", "air pollution", "diet and exercise", "a story", "numbers")
RECIPE = """\
seed_everything: 0
data: {data: pool.jsonl, eval_data: eval.jsonl, model: model, subset_size: 20, subset_seed: 0, batch_size: 8,
  precision: fp32}
model: {lora_rank: 2, learning_rate: 3.0e-2, dtype: fp32}
mining: {ledger: runs, refit: false, log_every_n_steps: 2}
trainer: {max_epochs: 1, accelerator: cpu, devices: 1, enable_checkpointing: false, logger: false}
"""


def write_rows(name: str, n: int, seed: int) -> None:
    """n Alpaca rows of two sources, with responses of different lengths."""
    rng = np.random.default_rng(seed)
    with Path(name).open("w", encoding="utf-8") as stream:
        for i in range(n):
            words = " ".join(f"{SUBJECTS[int(k)]} {i}" for k in rng.integers(0, 6, size=int(rng.integers(1, 8))))
            row = {"instruction": f"Describe {seed}-{i}.", "output": words, "source": "ab"[i % 2]}
            stream.write(json.dumps(row) + "\n")


def write_desk() -> dict[str, object]:
    """Everything, in the current folder; returns the values."""
    import test_old_files as old
    from tiny import make_tiny_llama

    from im_lightning import RunLedger, load_rule

    def run(*words: str) -> None:
        assert old.main([*words]) == 0, words

    make_tiny_llama("model", hidden=8, layers=1)
    for seed, (name, n) in enumerate({"pool": 64, "eval": 6, "search": 6, "report": 6}.items()):
        write_rows(f"{name}.jsonl", n, seed)
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    run(*old.SCORE, "--out", "scores.parquet")
    table = old.ScoreTable.read("scores.parquet")
    run(*old.DESIGN, "--out", "sweep.yaml")
    run(*old.SWEEP)
    Path("rules").mkdir()
    for method in old.FITTED:
        old.fit_rule_of(method).save(f"rules/{method}.json")
    run(*old.REFIT, "rules/refit.json")
    run(*old.COMPARE)
    run(*old.SEARCH)
    runs = {
        r.run_id: {"purpose": r.purpose, "status": r.status, "loss": r.loss("eval"), "steps": r.steps,
                   "means": dict(r.indicator_means)}
        for r in RunLedger("runs").records(status=None)
    }  # fmt: skip
    shutil.copytree("runs", "kept")
    tape = old.Tape("mid.ckpt", old.CHECKPOINT)
    record = old.fit(tape)
    make_portable(Path("mid.ckpt"))
    shutil.rmtree("runs")
    Path("kept").rename("runs")  # as it was when the checkpoint was written
    return {
        "rules": {name: old.values_of(load_rule(f"rules/{name}.json")) for name in old.RULES},
        "runs": runs,
        "scores": {
            "indicators": list(table.indicators), "ids": list(table.id),
            "values": {name: table.values[name].tolist() for name in old.INDICATORS},
        },
        "fit": {
            "steps": tape.steps, "loss": record.loss("eval"), "run_id": record.run_id,
            "means": dict(record.indicator_means),
        },
    }  # fmt: skip


def make_portable(path: Path) -> None:
    """Takes the scratch folder's name out of a checkpoint: it is in a hint of where the frozen folder was."""
    state = torch.load(path, weights_only=True)
    data = state["InstructMiningDataModule"]
    data["run_dir"] = f"/home/user/study/im-lightning/{Path(data['run_dir']).name}"
    torch.save(state, path)


def tidy() -> None:
    """Takes out what says nothing new, or only where the scratch folder was."""
    for name in ("cache/hashes", "cache/templates", "compare/work", "search/work", "im-lightning/.waiting"):
        shutil.rmtree(name, ignore_errors=True)
    for trial in sorted(Path("sweeps/sweep/trials").iterdir())[2:-1]:
        shutil.rmtree(trial)
    beside = [p for folder in ("runs", "compare", "search") for p in sorted(Path(folder).rglob("*.statistics.json"))]
    for path in [*Path().rglob(".lock"), *Path("search").glob("*.png"), *beside[3:]]:
        path.unlink()


def main() -> None:
    if sys.argv[1:] == ["flags"]:
        import test_flags

        test_flags.freeze()
        return
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        os.environ["IM_LIGHTNING_CACHE"] = str(Path(scratch) / "cache")
        expected = write_desk()
        tidy()
        os.chdir(home)
        shutil.rmtree(OLD / "desk", ignore_errors=True)
        shutil.copytree(scratch, OLD / "desk")
    (OLD / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
