"""`im-lightning sweep`: runs a wandb sweep file without a server, many short finetunes in one process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from im_lightning._utils.answer import answer
from im_lightning._utils.progress import log
from im_lightning.commands import runs

if TYPE_CHECKING:
    from im_lightning.experiments.sweep.file import SweepFile

SUMMARY = "run a wandb sweep file without a server: many short finetunes in one process"
EXAMPLE = "im-lightning sweep recipes/02_designed_runs/sweep_random.yaml --count 40"
POSITIONAL = ("file",)
_LENGTH = {f"data.{name}" for name in ("data", "model", "eval_data", "subset_size", "budget", "max_length")}
_LENGTH |= {"trainer.max_epochs", "trainer.max_steps", "mining.stop_at", "mining.eval_at"}
"""What decides how long a finetune takes."""


def run(
    file: str,
    arguments: str | None = None,
    out: str | None = None,
    count: int | None = None,
    jobs: int = 1,
    seed: int = 0,
    max_failures: int = 3,
    stop_at: float | None = None,
    eval_at: str | None = None,
    dry_run: bool = False,
) -> int:
    """Runs the trials of a wandb sweep file (grid, random, bayes), each as `im-lightning fit` with its arguments.

    The same file works with `wandb sweep` and `wandb agent`. Trials run in this process, one after the other; the same
    command goes on after an interruption. Over blocks (im-lightning design --kind merged) the merged runs follow, which
    are evaluated only. At the end the ledger is listed, with the command that refits the rule: no trial does.

    Args:
        file: Sweep file (YAML).
        arguments: More arguments of `im-lightning fit` for every trial, in one text; they win over the command of the
            file, and the trial's own win over them. Write --arguments="--data.model=… --trainer.devices=2".
        out: Folder of the sweep's state; by default sweeps/<name of the file>.
        count: Most trials of this call; by default all that are left. Random and bayes need it where the file has no
            run_cap.
        jobs: Trials at a time, in processes that share the processors (and GPUs).
        seed: Of random and bayes.
        max_failures: Trials that may fail one after the other before the sweep gives up.
        stop_at: End every run early, at a share of its optimiser steps (0.2) or a number of them, on the learning rates
            of the full run; im-lightning refit --at fits such runs.
        eval_at: Measure the evaluation losses at these points, too, separated by commas: 0.2,0.5.
        dry_run: Only say what the trials that are left would take, were they as the next one, some steps of which are
            timed.
    """
    from im_lightning._utils.command_line import words_of
    from im_lightning.experiments.sweep.file import read_sweep
    from im_lightning.ledger.curve import read_points

    words = words_of("--arguments", arguments)
    for name, points in (("stop_at", stop_at), ("eval_at", eval_at)):
        if read_points(f"--{name.replace('_', '-')}", points):
            words.append(f"--mining.{name}={points}")
    sweep = read_sweep(file).with_arguments(words)
    folder = out or str(Path("sweeps") / Path(file).stem)

    from im_lightning.experiments.sweep.run import run_sweep, trials_left

    if dry_run:
        from im_lightning.experiments.fit_estimate import estimate_fit

        left, of_one = trials_left(sweep, folder, count, seed)
        one = estimate_fit(of_one) if left else None
        text = "no trial is left" if one is None else "\n".join(one.lines(left))
        if differing := _differing(sweep) if left > 1 else []:
            text += f"\neach is reckoned as the next one, and they differ in {', '.join(differing)}"
        found = {"trials_left": left, "run": one and one.to_json(left), "differ_in": differing}
        answer(found, text)
        return 0

    summary = run_sweep(sweep, folder, count, jobs, seed, max_failures)
    state = summary.state
    spent = sum(trial.seconds for trial in summary.ran)
    stopped = f", {state.count('stopped')} of them stopped early" if state.count("stopped") else ""
    done = f"{state.count('done', 'stopped')} trials done{stopped}"
    log(f"{folder}: {done}; {len(summary.ran)} in this call, {spent:,.0f} s of trials")
    if state.merged is not None and state.sweep.trials != state.count("done"):
        log(f"{folder}: merged runs follow when all {state.sweep.trials} trials are done")
    listed = [runs.listing(ledger) for ledger in summary.ledgers]
    trials = {"trials": [asdict(trial) for trial in state.trials], "ran": len(summary.ran), "seconds": spent}
    answer(
        {"folder": folder, **trials, "ledgers": [record for record, _ in listed]},
        "\n".join(text for _, text in listed) or None,
    )
    summary.check()
    return 0


def _differing(sweep: SweepFile) -> list[str]:
    """The parameters that make some trials of a sweep longer than others."""
    several = (p.name for p in sweep.parameters if p.grid is None or len(p.grid) > 1)
    return [name for name in several if name in _LENGTH]
