"""How often the loop sees a difference where there is none: many small demos with permuted indicators.

With every arm's indicators permuted over rows, all arms are random draws, so a difference from random at a
Holm-corrected p below 0.05 should show in about one demo of twenty. The demos share a base model and its scorer models;
pool, scores, permutation, designs, rule and draws are each seed's own. One line per seed is appended to a log; seeds in
the log are not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import status_of
from im_lightning._utils.progress import log
from im_lightning.errors import RequestError, message
from im_lightning.experiments.demo.playground.base import make_base
from im_lightning.experiments.demo.playground.judges import JudgeSettings, make_reward, make_unieval
from im_lightning.experiments.demo.run import Demo
from im_lightning.experiments.demo.settings import FAST, DemoSettings

SEEDS = tuple(range(1000, 1020))
ALLOWED = 3
"""Demos of the twenty that may show a difference: under the null four or more have a chance of 1.6 %."""

NULL = replace(
    FAST,
    name="null check",
    null=True,
    judges=JudgeSettings(pairs=2000, reward_steps=80, rows=2000, unieval_steps=160),
    runs=20,
    seeds=5,
)
"""All nine indicators; what the scorer models say is permuted with the rest, however much they learnt."""


def check(out: Path, seeds: Sequence[int], settings: DemoSettings = NULL) -> list[dict[str, Any]]:
    """Runs the seeds that the log `<out>/null_check.jsonl` lacks, and returns its lines for all of them.

    Raises:
        RequestError: the log was made with other settings.
    """
    path, shared = out / "null_check.jsonl", out / "models"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    sizes = {name: getattr(settings, name) for name in ("runs", "seeds", "fold_rows")} | {"base": settings.base.steps}
    if settings.judges is not None:
        sizes["judges"] = settings.judges.reward_steps
    if any(line["sizes"] != sizes for line in lines):
        raise RequestError(message(str(path), "it was made with other sizes", "name another folder"))
    done = {line["seed"]: line for line in lines}
    for seed in seeds:
        if seed in done:
            continue
        demo = Demo(out / f"seed-{seed}", replace(settings, seed=seed))
        _give_models(demo, shared)
        result = demo.run()
        tested = {arm: r for arm, r in result.results.items() if r.verdict}
        line = {
            "seed": seed,
            "shown": result.comparison.differences_shown,
            "holm_p": {arm: round(r.p_holm, 4) for arm, r in tested.items()},
            "difference": {arm: round(r.difference, 4) for arm, r in tested.items()},
            "seconds": round(sum(result.seconds.values()), 1),
            "sizes": sizes,
        }
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        done[seed] = line
        shutil.rmtree(demo.folder.path)
        log(summary([done[s] for s in seeds if s in done]))
    return [done[seed] for seed in seeds]


def _give_models(demo: Demo, shared: Path) -> None:
    """Copies the shared base and scorer models to a demo, and makes those that are not there yet."""
    f, s = demo.folder, demo.settings
    makers: dict[str, Callable[[Path], Any]] = {f.base.name: lambda path: make_base(path, s.base, SEEDS[0])}
    if (judges := s.judges) is not None:
        makers[f.reward.name] = lambda path: make_reward(path, shared / f.base.name, judges, SEEDS[0])
        makers[f.unieval.name] = lambda path: make_unieval(path, judges, SEEDS[0])
    shared.mkdir(exist_ok=True)
    for name, make in makers.items():
        if not (shared / name).exists():
            make(shared / name)
        if not (f.path / name).exists():
            shutil.copytree(shared / name, f.path / name)


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """`1 of 20 demos showed a difference: seed 1003 (worst)`."""
    shown = [f"seed {line['seed']} ({', '.join(line['shown'])})" for line in lines if line["shown"]]
    return f"{len(shown)} of {len(lines)} demos showed a difference" + (f": {', '.join(shown)}" if shown else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check; status 1 if more demos than allowed showed a difference."""
    parser = argparse.ArgumentParser(
        prog="scripts/null_check", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--out", default="null-check", help="folder of the log and of the demo under way")
    parser.add_argument("--count", type=int, default=len(SEEDS), help=f"how many of the {len(SEEDS)} fixed seeds")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    def run() -> int:
        lines = check(out, SEEDS[: arguments.count])
        print(f"{summary(lines)}; {ALLOWED} are allowed")
        return int(sum(bool(line["shown"]) for line in lines) > ALLOWED)

    return status_of("null_check", run)


if __name__ == "__main__":
    sys.exit(main())
