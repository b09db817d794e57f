#!/usr/bin/env bash
# Guess: A fit that is stopped twice and gone on from its last checkpoint each time makes as many steps as one that was not.
#
# What happens: Where the first of the two checkpoints was written at an epoch's last batch (every_n_train_steps divides the
# epoch), the fit that goes on from it writes later checkpoints which the next resume takes for such of an epoch's end: it
# counts the batches from 0 again and trains on the whole epoch once more. Of two epochs of four batches it makes ten steps,
# not eight, and says that it stopped at max_epochs. One resume, from either place, is right. A loader that knows its own
# position ends the epoch in time; batch_idx starts at 0 there all the same.
#
# Versions: pytorch-lightning 2.6.6, torch 2.13.0, on Python 3.11.
#
# Output seen (epoch and batch of every step):
#     stopped never            : 0/0 0/1 0/2 0/3 1/0 1/1 1/2 1/3
#     stopped after step 5     : 0/0 0/1 0/2 0/3 1/0 | 1/0 1/1 1/2 1/3
#     stopped after step 7     : 0/0 0/1 0/2 0/3 1/0 1/1 1/2 | 1/2 1/3
#     stopped after both       : 0/0 0/1 0/2 0/3 1/0 | 1/0 1/1 1/2 | 1/0 1/1 1/2 1/3
#     steps at the end         : 8 8 8 10
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile pytorch-lightning==2.6.6 torch==2.13.0
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import shutil
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader


class Stop(Exception):
    pass


class Model(pl.LightningModule):
    def __init__(self, until):
        super().__init__()
        self.layer, self.until, self.seen = torch.nn.Linear(1, 1), until, []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.until:
            raise Stop
        self.seen.append(f"{self.current_epoch}/{batch_idx}")
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(until):
    model, last = Model(until), Path("kept/last.ckpt")
    keep = pl.callbacks.ModelCheckpoint("kept", save_last=True, every_n_train_steps=2)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[keep])
    try:
        trainer.fit(model, DataLoader(torch.arange(4.0)[:, None]), ckpt_path=str(last) if last.exists() else None)
    except Stop:
        pass
    return " ".join(model.seen), trainer.global_step


steps = []
for title, stops in (("never", []), ("after step 5", [5]), ("after step 7", [7]), ("after both", [5, 7])):
    shutil.rmtree("kept", ignore_errors=True)
    seen, counts = zip(*(fit(until) for until in (*stops, None)))
    steps.append(counts[-1])
    print(f"stopped {title:16} : {' | '.join(seen)}")
print("steps at the end         :", *steps)
assert steps == [8, 8, 8, 10], steps
EOF
