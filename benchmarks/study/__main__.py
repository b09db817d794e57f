"""`scripts/study`: the study's stages, one or all."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import status_of
from benchmarks.study.kept import KEPT, keep, restore
from benchmarks.study.sets import FAST, Sizes
from benchmarks.study.stages import STAGES, Study


def main(argv: list[str] | None = None) -> int:
    """0; 1 for a stage that failed, 2 for a wrong request, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="scripts/study", description="Does it pay? See docs/study_plan.md.")
    parser.add_argument("stage", nargs="?", default="all", choices=[*STAGES, "all"])
    parser.add_argument("--data", type=Path, required=True, help="folder of the sources: alpaca.jsonl.gz, …")
    parser.add_argument("--out", type=Path, default=Path("study-out"), help="folder of everything that is written")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of the numbers that the repository has")
    parser.add_argument("--jobs", type=int, default=1, help="designed runs at a time, which share the processors")
    parser.add_argument("--fast", action="store_true", help="a small form, to try the way: its numbers mean nothing")
    given = parser.parse_args(argv)
    kept = given.out / "kept" if given.fast else given.kept
    study = Study(given.data, given.out, FAST if given.fast else Sizes(), kept, given.jobs)

    def work() -> None:
        study.out.mkdir(parents=True, exist_ok=True)
        restore(study.out, kept)
        try:
            for name in STAGES if given.stage == "all" else [given.stage]:
                STAGES[name](study)
        finally:
            keep(study.out, kept, study.sizes.mixtures)

    return status_of("study", work)


if __name__ == "__main__":
    sys.exit(main())
