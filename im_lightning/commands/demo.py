"""`im-lightning demo`: the whole loop on the playground, offline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from im_lightning._utils.answer import answer
from im_lightning._utils.progress import log

SUMMARY = "the whole loop on a small synthetic pool, offline, ending in a table"
EXAMPLE = "im-lightning demo --fast --out demo-fast"


def run(out: str | None = None, fast: bool = False, null: bool = False, seed: int = 0) -> int:
    """Runs the whole loop on a synthetic pool of known quality with tiny models made on the spot, without network.

    Makes pool and base, scores, runs designed finetunes into a ledger, refits the rule, and compares rows drawn by it
    with others at equal supervised tokens and steps. Everything is kept under OUT (look with `im-lightning runs
    OUT/ledger`); the same command goes on where it was interrupted. It shows the loop; it is no result about LLaMA.

    Args:
        out: Folder to write, or to go on in; by default demo-out, with -fast, -null and -seedN added.
        fast: Smaller models and pool, the five indicators of text alone, 16 runs, 2 seeds; under 90 s, and too small
            to conclude.
        null: Permute the indicators over rows first: nothing should then differ from random.
        seed: Of the pool, the models, the designs and the draws.
    """
    log("loading Lightning and transformers")
    import torch

    torch.set_num_threads(1)  # the models are so small that a second thread mostly waits for the first
    from im_lightning.experiments.demo.run import Demo
    from im_lightning.experiments.demo.settings import FAST, FULL
    from im_lightning.report.page import write_demo_report

    if out is None:
        out = "demo-out" + "-fast" * fast + "-null" * null + (f"-seed{seed}" if seed else "")
    result = Demo(out, replace(FAST if fast else FULL, seed=seed, null=null)).run()
    answer({**result.to_json(), "folder": out}, result.text())
    total = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    log(f"{sum(result.seconds.values()):.0f} s in all: {total}\nkept in {out}; see im-lightning runs {out}/ledger")
    page = write_demo_report(Path(out), result.settings.subset_rows)
    log(f"everything on one page: {page}")
    return 0
