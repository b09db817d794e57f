"""`im-lightning fit`: LightningCLI with our data module, module and callback; a recipe file holds the arguments."""

from __future__ import annotations

SUMMARY = "finetune with the data module, the module and the callback (LightningCLI)"
EXAMPLE = "im-lightning fit --config recipes/02_designed_runs/designed_run.yaml --data.subset_seed=7"


def main(argv: list[str]) -> int:
    """Runs one fit.

    Args:
        argv: Arguments as LightningCLI takes them, the word `fit` left out.

    Returns:
        0; what goes wrong is raised.
    """
    from im_lightning.training.cli import run_fit

    run_fit(argv[1:] if argv[:1] == ["fit"] else argv, EXAMPLE)
    return 0
