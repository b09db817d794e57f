"""Scorings on Ray in a process of their own: the tests' process forks children, which does not go with Ray's threads.

    python ray_child.py WHAT FOLDER MODEL

writes FOLDER/WHAT.parquet and prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from pools import make_pool

from im_lightning.errors import InstructMiningError
from im_lightning.scoring.api import score_examples
from im_lightning.scoring.passes import base as passes
from im_lightning.scoring.passes import language_model
from im_lightning.scoring.ray_cluster import engine as ray_engine

KILLED_AFTER = (1, 4, 9)  # outcomes of the base model's pass, at the least


def killed(folder: Path, model: str) -> dict[str, Any]:
    """Kills three workers, each as it sends an outcome; it has further pieces in hand then.

    What a killed worker had sent before may arrive afterwards, so the next to be killed is the next that lives.
    """
    language_model.FIRST_ROWS, language_model.PART_ROWS, passes.TEXT_PIECE = 8, 8, 50
    kills: list[int] = []
    workers: set[int] = set()
    seen = 0
    real = ray_engine.take

    def take(each: Any, rows: Any, outcome: Any) -> None:
        nonlocal seen
        real(each, rows, outcome)
        if each.tokens or outcome.tokens:
            seen += 1
            process = outcome.worker[1]
            workers.add(process)
            if len(kills) < len(KILLED_AFTER) and seen >= KILLED_AFTER[len(kills)] and process not in kills:
                os.kill(process, signal.SIGKILL)
                kills.append(process)

    ray_engine.take = take
    pool = make_pool(150)
    table = score_examples(
        [*pool, *pool[:3]], ["mtld", "ppl", "knn_2"], model, batch_tokens=512, device="cpu", cache_dir=folder / "cache",
        engine="ray", ray_workers=2,
    )  # fmt: skip
    table.write(folder / "killed.parquet")
    return {"kills": kills, "workers": sorted(workers), "outcomes": seen}


def deadly(folder: Path, model: str) -> dict[str, Any]:
    """An indicator that kills every worker; a cluster of the test's own goes on afterwards."""
    import ray

    from im_lightning.indicators.base import Indicator, register_indicator

    @register_indicator("deadly")
    class Deadly(Indicator):
        def score(self, example: Any) -> float:
            if len(example.response) % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return 1.0

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    passes.TEXT_PIECE = 20
    try:
        score_examples(make_pool(60), ["deadly"], cache_dir=folder / "cache", engine="ray")
        error = ""
    except InstructMiningError as told:
        error = str(told)
    return {"error": error, "left alone": ray.is_initialized()}


if __name__ == "__main__":
    what, folder, model = sys.argv[1:]
    print(json.dumps({"killed": killed, "deadly": deadly}[what](Path(folder), model)))
