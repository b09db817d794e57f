"""The four walks that `scripts/trace_walks` traces, and their inputs; only public names of the package are used."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROWS = 40
"""Rows of the pool of walk b1."""
ROWS_COMPARED = 60
"""Rows of the pool of walk c, enough for the tokens of an arm."""

_KINDS = {"ppl": "log", "length_output": "log1p", "knn_6": "identity"}
_WORDS = ("atoms", "primary colors", "air pollution", "diet and exercise", "a story", "numbers")


def make_inputs(folder: Path) -> None:
    """Base model, pools, their scores, and runs with a rule fitted on them, in `folder`."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
    from tiny import make_tiny_llama

    from im_lightning import RunLedger, fit_rule

    make_tiny_llama(folder / "base", hidden=16, layers=1)
    _write_pool(folder / "one.jsonl", 1, "one ")
    _write_pool(folder / "eval.jsonl", 7, "e", seed=9)
    table = _write_scores(folder / "scores.parquet", _write_pool(folder / "pool.jsonl", ROWS, ""))
    _write_scores(folder / "scores-c.parquet", _write_pool(folder / "pool-c.jsonl", ROWS_COMPARED, ""))
    ledger = RunLedger(folder / "runs")
    ledger.make()
    for record in _records(table, 40):
        ledger.add(record)
    fit_rule(ledger, "ols").save(folder / "rule.json")


def walk(name: str, folder: Path) -> Callable[[], Any]:
    """The walk of this name, to be called under a trace."""
    base, rule = str(folder / "base"), str(folder / "rule.json")
    os.environ["IM_LIGHTNING_CACHE"] = str(folder / f"cache-{name}")
    if name == "a":
        from im_lightning import load_examples, score_examples

        def score() -> None:
            examples = load_examples(str(folder / "one.jsonl"))
            score_examples(examples, ["length_output", "ppl"], model=base, device="cpu")

        return score
    if name == "b1":
        import pytorch_lightning as pl

        from im_lightning import InstructMiningCallback, InstructMiningDataModule, InstructTuningModule

        def fit() -> None:
            data = InstructMiningDataModule(
                str(folder / "pool.jsonl"), eval_data=str(folder / "eval.jsonl"), model=base, rule=rule,
                scores=str(folder / "scores.parquet"), budget=24, batch_size=4,
            )  # fmt: skip
            callback = InstructMiningCallback(ledger=str(folder / "ledger-b1"), log_every_n_steps=2)
            trainer = pl.Trainer(
                accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, default_root_dir=str(folder / "b1"), max_epochs=1, callbacks=[callback],
            )  # fmt: skip
            trainer.fit(InstructTuningModule(base, lora_rank=2, learning_rate=5e-3), datamodule=data)

        return fit
    if name == "b2":
        from im_lightning import RunLedger, fit_rule

        records = RunLedger(folder / "runs").records()

        def refit() -> None:
            made = fit_rule(records, "auto", permutations=20, bootstrap=60)
            made.save(folder / "rule-b2.json")
            print(made.summary(110))

        return refit

    from im_lightning.cli import main

    def compare() -> None:
        arguments = [
            "compare", str(folder / "pool-c.jsonl"), "--scores", str(folder / "scores-c.parquet"), "--model", base,
            "--rule", rule, "--eval-data", str(folder / "eval.jsonl"), "--arms", "random,weighted", "--tokens", "400",
            "--steps", "4", "--seeds", "2", "--learning-rate", "1e-3", "--device", "cpu", "--out", str(folder / "out"),
        ]  # fmt: skip
        status = main(arguments)
        if status:
            raise SystemExit(f"compare ended with {status}")

    return compare


def _write_pool(path: Path, rows: int, tag: str, seed: int = 0) -> str:
    """Different Alpaca rows of two sources with responses of different lengths."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(rows):
        words = " ".join(f"{_WORDS[int(k)]} {i}" for k in rng.integers(0, 6, size=int(rng.integers(1, 8))))
        lines.append(json.dumps({"instruction": f"Describe {tag}{i}.", "output": words, "source": "ab"[i % 2]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def _write_scores(path: Path, pool: str) -> Any:
    """A score table of the pool with synthetic values."""
    from im_lightning import ScoreTable, load_examples

    examples, rng = load_examples(pool), np.random.default_rng(0)
    rows = len(examples)
    values = {
        "ppl": np.exp(rng.normal(1.0, 0.5, rows)),
        "length_output": rng.integers(3, 60, rows).astype(float),
        "knn_6": rng.uniform(0.2, 1.2, rows),
    }
    keys = {name: {"identity": {"indicator": name, "version": 1}, "numerics": {}} for name in values}
    table = ScoreTable(range(rows), [e.id for e in examples], [e.source for e in examples], values, keys=keys)
    table.write(path)
    return table


def _records(table: Any, runs: int, seen: int = 60) -> list[Any]:
    """Designed runs on subsets of the table, each leaning to random directions of φ, its square and the sources.

    The log loss is linear in the mean φ, plus noise.
    """
    from im_lightning import RunRecord

    rng = np.random.default_rng(0)
    raw = {name: np.asarray(table.values[name], dtype=np.float64) for name in _KINDS}
    transforms, phi, knots, hats = {}, {}, {}, {}
    for name, kind in _KINDS.items():
        column = np.log(raw[name]) if kind == "log" else np.log1p(raw[name]) if kind == "log1p" else raw[name]
        low, high = (float(v) for v in np.quantile(column, (0.005, 0.995)))
        transforms[name] = {"kind": kind, "low": low, "high": high}
        phi[name] = np.clip(column, low, high)
        knots[name] = [low, *(float(v) for v in np.quantile(phi[name], np.arange(1, 6) / 6)), high]
        hats[name] = np.column_stack([np.interp(phi[name], knots[name], row) for row in np.eye(len(knots[name]))])
    z = np.column_stack([(v - v.mean()) / v.std() for v in phi.values()])
    sources = np.array(table.source)
    records = []
    for i in range(runs):
        lean = z @ rng.normal(0, 0.7, z.shape[1]) + z**2 @ rng.normal(0, 0.4, z.shape[1])
        lean += np.where(sources == "a", 0.0, rng.normal(0, 2.5))
        if i % 4 == 0:
            lean = np.where(sources == "ab"[i // 4 % 2], lean, -50.0)
        p = np.exp(lean - lean.max())
        share = np.bincount(rng.choice(len(p), seen, p=p / p.sum()), minlength=len(p)) / seen
        loss = float(np.exp(0.9 + share @ (0.12 * z[:, 0] - 0.3 * z[:, 2]) + 0.02 * rng.standard_normal()))
        shares = {s: float(share[sources == s].sum()) for s in "ab" if share[sources == s].any()}
        records.append(
            RunRecord(
                run_id=f"run-{i:03d}",
                status="complete",
                purpose="designed",
                created=f"2026-01-01T00:00:{i:02d}+00:00",
                subset={"digest": f"s{i}", "size": seen, "seed": i, "source_shares": shares},
                pool_digest="p" * 32,
                indicator_means={name: float(share @ v) for name, v in raw.items()},
                phi_means={name: float(share @ v) for name, v in phi.items()},
                transforms=transforms,
                basis_means={n: {"knots": knots[n], "means": (share @ hats[n]).tolist()} for n in phi},
                keys={name: table.keys[name] for name in raw},
                evaluation={"held-out": {"loss": loss, "tokens": 1000, "examples": 50}},
                regime={"method": "lora-2", "learning_rate": 2e-4, "subset_size": seen},
                tokens=12345,
                steps=40,
            )
        )
    return records
