"""`scripts/benchmark_evidence`: the table of the ways × shares of the compute of sixty full runs."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import status_of
from benchmarks.evidence.measure import measure
from benchmarks.evidence.playground import FAST, FULL
from benchmarks.evidence.table import table
from im_lightning._utils.files import write_json
from im_lightning._utils.text_tables import terminal_width


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; 2 for a wrong request."""
    about = "Every way to evidence, at shares of what sixty full runs cost, on the demo's pool. Resumable."
    parser = argparse.ArgumentParser(prog="scripts/benchmark_evidence", description=about)
    parser.add_argument("--out", type=Path, default=Path("evidence-out"), help="a folder of this script, or a new one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="generator seeds of pool and bases")
    parser.add_argument("--test-runs", type=int, help="further runs that the rules of the ways are tested on (60)")
    parser.add_argument("--finetunes", action="store_true", help="finetune on rows drawn by the ways' weights, too")
    parser.add_argument("--fast", action="store_true", help="a small form, which concludes nothing")
    given = parser.parse_args(argv)

    def run() -> int:
        sizes = FAST if given.fast else FULL
        if given.test_runs is not None:
            sizes = replace(sizes, test_runs=given.test_runs)
        found = []
        for seed in given.seeds:
            demo = replace(sizes.demo, seed=seed)
            found.append(measure(given.out / f"seed-{seed}", replace(sizes, demo=demo), given.finetunes))
            text = table(found, terminal_width())
            write_json(given.out / "evidence.json", {"seeds": found, "rendered": text})
        print(text)
        return 0

    return status_of("benchmark_evidence", run)


if __name__ == "__main__":
    sys.exit(main())
