"""`scripts/benchmark`: measures, prints the table, writes the figures as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import status_of
from benchmarks.registry import Ratio, Setting, subjects
from im_lightning._utils.files import write_json
from im_lightning._utils.progress import log
from im_lightning.errors import RequestError, message


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; 0 whether or not every bar is met (it only measures), 2 for a wrong request."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description="Ratios measured side by side on this machine, as a table and as JSON."
    )
    parser.add_argument("--data", type=Path, help="folder or file of instruction rows; without it, synthetic rows")
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats: under three minutes")
    parser.add_argument("--only", help="subjects separated by commas, such as likelihood,mtld")
    parser.add_argument("--repeats", type=int, help="rounds of each measurement (5; 3 with --quick)")
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="where the figures go")
    parser.add_argument("--markdown", action="store_true", help="print the table as docs/performance.md has it")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time: for a machine others use")
    given = parser.parse_args(argv)
    return status_of("benchmark", lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    if given.repeats is not None and given.repeats < 1:
        raise RequestError(message(f"--repeats {given.repeats}", "is less than one round", "give 1 or more"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if given.busy:
        _one_thread()
    from benchmarks.machine import describe, load, machine
    from benchmarks.report import markdown, plain

    chosen = subjects(given.only)
    about, begun = machine(), time.monotonic()
    ratios: list[Ratio] = []
    figures = []
    with tempfile.TemporaryDirectory(prefix="im_lightning_benchmark_") as folder:
        os.environ["IM_LIGHTNING_CACHE"] = str(Path(folder) / "cache")
        setting = Setting(Path(folder), given.data, given.quick, given.repeats or (3 if given.quick else 5))
        data = None if given.data is None else given.data.name
        rows = {"data": data, "quick": given.quick, "repeats": setting.repeats}
        about["clock"] = "processor time of one thread" if given.busy else "elapsed time"
        for subject, measure in chosen.items():
            for found in measure(setting):
                log(f"{subject}: {found.work}: {found.value:.{found.digits}f} ({time.monotonic() - begun:,.0f} s)")
                ratios.append(found)
                figures.append(found.as_json(subject))
            about["load_after"], seconds = load(), time.monotonic() - begun  # an hour's figures outlive what fails next
            write_json(given.json, {"machine": about, "rows": rows, "seconds": seconds, "ratios": figures})
    print((markdown if given.markdown else plain)(ratios))
    print(f"\n{describe(about)}")
    log(f"wrote {given.json}: {json.dumps(rows)}")
    return 0


def _one_thread() -> None:
    """Threads that wait for each other on a busy machine measure the load; one thread's own time does not."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    from benchmarks.timing import count_processor_time

    torch.set_num_threads(1)
    count_processor_time()


if __name__ == "__main__":
    sys.exit(main())
