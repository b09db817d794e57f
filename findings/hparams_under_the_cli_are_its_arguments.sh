#!/usr/bin/env bash
# Guess: save_hyperparameters() in __init__ keeps the values that the arguments have at that line, so a class that
# settles an argument first (a path, a default worked out from others) saves the settled value.
#
# What happens: That holds where the class is called in Python. Instantiated by LightningCLI, the same class saves the
# text of the configuration: what __init__ made of it before the call is lost, and two runs of one setting, one from a
# script and one from the command line, have different hparams in checkpoint and logger.
#
# Versions: pytorch-lightning 2.6.6, jsonargparse 4.53.0, torch 2.13.0, on Python 3.11.
#
# Output seen:
#     called in Python: rate 0.2, folder /data/pool
#     by LightningCLI:  rate 0.1, folder pool
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile \
    pytorch-lightning==2.6.6 "jsonargparse[signatures]==4.53.0" torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'EOF'
import pytorch_lightning as pl
from pytorch_lightning.cli import LightningCLI


class Data(pl.LightningDataModule):
    def __init__(self, folder: str = "pool"):
        super().__init__()
        folder = f"/data/{folder}"
        self.save_hyperparameters()


class Net(pl.LightningModule):
    def __init__(self, rate: float = 0.1):
        super().__init__()
        rate = 2 * rate
        self.save_hyperparameters()


plain = (Net().hparams["rate"], Data().hparams["folder"])
cli = LightningCLI(
    Net, Data, run=False, args=[], save_config_callback=None, trainer_defaults={"logger": False, "accelerator": "cpu"}
)
ours = (cli.model.hparams["rate"], cli.datamodule.hparams["folder"])
print(f"called in Python: rate {plain[0]}, folder {plain[1]}")
print(f"by LightningCLI:  rate {ours[0]}, folder {ours[1]}")

assert plain == (0.2, "/data/pool") and ours == (0.1, "pool")
EOF
