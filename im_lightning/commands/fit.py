"""`im-lightning fit`: LightningCLI with our data module, module and callback; a recipe file holds the arguments."""

from __future__ import annotations

from typing import Any

from im_lightning._utils.answer import answer

SUMMARY = "finetune with the data module, the module and the callback (LightningCLI)"
DRY_RUN = "--dry-run"
EXAMPLE = "im-lightning fit --config recipes/02_designed_runs/designed_run.yaml --data.subset_seed=7"


def main(argv: list[str]) -> int:
    """Runs one fit; with --dry-run says what it would take, after some steps that are timed.

    Args:
        argv: Arguments as LightningCLI takes them, the word `fit` left out.

    Returns:
        0; what goes wrong is raised.
    """
    from im_lightning.training.callback import InstructMiningCallback
    from im_lightning.training.cli import run_fit

    words = argv[1:] if argv[:1] == ["fit"] else argv
    if DRY_RUN in words:
        from im_lightning.experiments.fit_estimate import estimate_fit

        found = estimate_fit([word for word in words if word != DRY_RUN])
        answer(found.to_json(), "\n".join(found.lines()))
        return 0
    trainer: Any = run_fit(words, EXAMPLE).trainer
    if trainer.is_global_zero:
        record = next(one.record for one in trainer.callbacks if isinstance(one, InstructMiningCallback))
        answer({"metrics": trainer.callback_metrics, "run": record and record.to_json()})
    return 0
