#!/usr/bin/env bash
# Guess: `EMAWeightAveraging(update_starting_at_step=100)` leaves training alone for 100 steps. Until there is an
# average, validation looks at the model in training, and a fit that ends earlier returns that model.
#
# What happens: The average is there from the start, as a copy of the initial weights, and is used whether or not it was
# ever updated. Every validation before step 100 measures the untrained model (EarlyStopping sees no progress and stops
# the fit), the checkpoints' `state_dict` holds the untrained weights, and a fit that ends before step 100 puts them
# back into the model: the training is lost, without a warning. StochasticWeightAveraging validates and saves the model
# in training, but also puts the initial weights back at the end if its first epoch was never reached.
#
# Versions: pytorch-lightning 2.6.6, torch 2.13.0, numpy 2.4.6, on Python 3.11.
#
# Output seen (the loss starts at 10):
#     no averaging              validation losses [6.4, 4.1, 2.62, 1.68, 1.07]; after the fit 1.07, checkpoint 1.07
#     StochasticWeightAveraging validation losses [6.4, 4.1, 2.62, 1.68, 1.07]; after the fit 10.0, checkpoint 1.07
#     EMAWeightAveraging        validation losses [10.0, 10.0, 10.0, 10.0, 10.0]; after the fit 10.0, checkpoint 10.0
#     and EarlyStopping         validation losses [10.0, 10.0]; after the fit 10.0, checkpoint 10.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile pytorch-lightning==2.6.6 torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import logging

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from torch.utils.data import DataLoader

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Slope(LightningModule):
    """One weight, which starts at 0 and should be 1; its loss starts at 10."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.losses = []

    def loss(self):
        return 10 * (1 - self.weight).square().sum()

    def training_step(self, batch, batch_idx):
        return self.loss()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss())
        self.losses.append(float(f"{self.loss().item():.3g}"))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(*callbacks):
    module = Slope()
    rows = DataLoader(torch.zeros(1, 1))
    trainer = Trainer(
        max_epochs=5, accelerator="cpu", logger=False, callbacks=list(callbacks), num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, rows, rows)
    after = float(f"{module.loss().item():.3g}")
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]["weight"]
    return module.losses, after, float(f"{10 * (1 - saved.item()) ** 2:.3g}")


found = {
    "no averaging": fit(),
    "StochasticWeightAveraging": fit(StochasticWeightAveraging(0.01, swa_epoch_start=100)),
    "EMAWeightAveraging": fit(EMAWeightAveraging(update_starting_at_step=100)),
    "and EarlyStopping": fit(
        EMAWeightAveraging(update_starting_at_step=100), EarlyStopping("val_loss", patience=1)
    ),
}
for name, (losses, after, saved) in found.items():
    print(f"{name:25} validation losses {losses}; after the fit {after}, checkpoint {saved}")

plain, late, averaged, stopped = found.values()
assert len(plain[0]) == 5 and plain[0] == sorted(plain[0], reverse=True) and plain[1] == plain[2] < 2
assert late == (plain[0], 10.0, plain[2])
assert averaged == ([10.0] * 5, 10.0, 10.0)
assert stopped == ([10.0] * 2, 10.0, 10.0)
EOF
