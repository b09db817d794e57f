"""What the training tests share: encoded rows, batches, and a Trainer without side effects."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from im_lightning.models.likelihood import collate


def encoded_rows(n: int, empty: tuple[int, ...] = ()) -> list[Any]:
    """n rows of random tokens with responses of very different lengths; those in `empty` have no response token."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        prompt, response = int(rng.integers(2, 6)), int(rng.integers(1, 14))
        ids = rng.integers(5, 200, size=prompt + response).astype(np.int32)
        mask = np.arange(prompt + response) >= prompt
        if i in empty:
            mask = np.zeros_like(mask)
        rows.append(SimpleNamespace(input_ids=ids, response_mask=mask, loss_mask=mask, earlier=()))
    return rows


def batch_of(rows: list[Any], positions: list[int]) -> dict[str, Tensor]:
    return {**collate([rows[i] for i in positions], 0, "loss_mask"), "row": torch.tensor(positions)}


def trainer(root: str | Path, **options: Any) -> Any:
    """A Trainer on the CPU that writes only what `options` ask for."""
    import pytorch_lightning as pl

    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(root),
    }  # fmt: skip
    return pl.Trainer(**{**defaults, **options})


SUBJECTS = ("atoms", "primary colors", "air pollution", "diet and exercise", "a story", "numbers")


def write_pool(path: Path, n: int = 40, seed: int = 0, tag: str = "") -> str:
    """n different Alpaca rows of two sources with responses of different lengths."""
    rng = np.random.default_rng(seed)
    with path.open("w") as stream:
        for i in range(n):
            words = " ".join(f"{SUBJECTS[int(k)]} {i}" for k in rng.integers(0, 6, size=int(rng.integers(1, 8))))
            row = {"instruction": f"Describe {tag}{i}.", "output": words, "source": "ab"[i % 2]}
            stream.write(json.dumps(row) + "\n")
    return str(path)


def write_scores(path: Path, pool: str, missing: tuple[int, ...] = (), seed: int = 0) -> str:
    """A score table of the pool with synthetic values of three indicators; rows in `missing` lack a perplexity."""
    from im_lightning.data.loading import load_examples
    from im_lightning.data.score_table import ScoreTable

    examples, rng = load_examples(pool), np.random.default_rng(seed)
    n = len(examples)
    ppl = np.exp(rng.normal(1.0, 0.5, n))
    ppl[list(missing)] = np.nan
    values = {"length_output": rng.integers(3, 60, n).astype(float), "ppl": ppl, "mtld": rng.uniform(5, 80, n)}
    keys = {name: {"identity": {"indicator": name, "version": 1}, "numerics": {}} for name in values}
    reasons = {"ppl": ["empty response" if i in missing else None for i in range(n)]}
    table = ScoreTable(range(n), [e.id for e in examples], [e.source for e in examples], values, reasons, keys)
    table.write(path)
    return str(path)


def write_rule(path: Path, scores: str, coef: tuple[float, ...] = (-0.1, 0.2, 0.0)) -> str:
    """A rule with a fitted region around the pool's mean."""
    from im_lightning.data.score_table import ScoreTable
    from im_lightning.indicators.transforms import default_transforms, phi_matrix
    from im_lightning.rule.linear_rule import LinearRule

    table = ScoreTable.read(scores)
    names = ["length_output", "ppl", "mtld"]
    transforms = default_transforms(table, names)
    phi = phi_matrix(table, transforms)
    phi = phi[~np.isnan(phi).any(1)]
    LinearRule(
        name="made", intercept_=1.0, coef_=np.array(coef), feature_names_in_=names, transforms_=transforms,
        mean_=phi.mean(0), cov_=np.cov(phi, rowvar=False) / 30, radius_=2.0,
        identities={n: table.keys[n]["identity"] for n in names}, n_runs_=20,
    ).save(path)  # fmt: skip
    return str(path)


class World(NamedTuple):
    """Files of a small study."""

    base: str
    pool: str
    eval: str
    scores: str
    rule: str
    root: Path

    def data(self, **options: Any) -> Any:
        """A data module on the pool; by default scored from the file, so that no model is loaded for scoring."""
        from im_lightning.training.datamodule import InstructMiningDataModule

        defaults = {"model": self.base, "eval_data": self.eval, "scores": self.scores, "batch_size": 4}
        return InstructMiningDataModule(self.pool, **{**defaults, **options})

    def tuner(self, **options: Any) -> Any:
        from im_lightning.training.module import InstructTuningModule

        defaults = {"lora_rank": 2, "learning_rate": 5e-3, "token_budget": 40}  # a batch of 4 is several micro-batches
        return InstructTuningModule(self.base, **{**defaults, **options})


def make_world(base: str, root: Path) -> World:
    """A pool of 40 rows in two sources, an evaluation set of 7, synthetic scores and a rule on them, in `root`."""
    pool = write_pool(root / "pool.jsonl")
    evaluation = write_pool(root / "eval.jsonl", n=7, seed=9, tag="e")
    scores = write_scores(root / "scores.parquet", pool)
    return World(base, pool, evaluation, scores, write_rule(root / "rule.json", scores), root)
