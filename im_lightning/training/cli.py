"""The LightningCLI behind `im-lightning fit` and the trials of a sweep: arguments in, a finished fit out."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
import zipfile
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from im_lightning import __version__
from im_lightning._lightning import passing_on_ctrl_c, submodule
from im_lightning._utils.answer import manner
from im_lightning._utils.command_line import null_for_none, wrong_argument
from im_lightning._utils.files import write_json
from im_lightning._utils.progress import log
from im_lightning.errors import DataError, InstructMiningError, RequestError, message
from im_lightning.ledger.regime import lora_of
from im_lightning.rule.published import load_rule
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.module import InstructTuningModule

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningCLI

SEE_HELP = "see im-lightning fit --help"
EXPORTED = "im_lightning.json"  # in a folder that a fit exported to, and may export to again
_RULED = ("model.lora_rank", "model.learning_rate")
_ABOUT = """Finetunes on rows drawn by a rule's weights, or on a designed subset, and records the run in a ledger.
Arguments come from --config FILE and from the command line, which wins. With --dry-run it only says what it would
take.
example: """


def run_fit(argv: list[str], example: str = "", before: Callable[[Any], None] | None = None) -> LightningCLI:
    """One fit, from its arguments to its end. Under `wandb agent`, which writes null as None, None is null.

    Args:
        argv: Arguments as `im-lightning fit` takes them.
        example: Shown in the help.
        before: Called with the CLI when trainer, model and data module are made and nothing has been computed.

    Raises:
        RequestError: an argument is unknown, missing or of the wrong type.
    """
    if os.environ.get("WANDB_SWEEP_ID"):
        argv = [null_for_none(word) for word in argv]
    return _build_cli(example, before)(argv)


def _build_cli(example: str, before: Callable[[Any], None] | None) -> Callable[[list[str]], LightningCLI]:
    cli: Any = submodule("cli")
    _quiet()  # importing Lightning sets the level of its loggers, so this comes after

    class FitCLI(cli.LightningCLI):
        """LightningCLI with one subcommand, the callback's arguments under `mining`, and the model named once."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {"fit": cli.LightningCLI.subcommands()["fit"]}

        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_lightning_class_args(InstructMiningCallback, "mining")
            parser.link_arguments("data.model", "model.model")
            parser.link_arguments("data.revision", "model.revision")
            help = "Folder to write to: the finished adapter, as plain peft loads it; without LoRA the whole model."
            parser.add_argument("--export", type=str | None, default=None, help=help)

        def parse_arguments(self, parser: Any, args: Any) -> None:
            try:
                self.config = parser.parse_args(args)
                ruled, self.ruled = as_ruled(self.config.get("fit.data.rule"))
                usual = {name: value for name, value in ruled.items() if name in _RULED}
                if usual:
                    self._parser("fit").set_defaults(usual)
                    self.config = parser.parse_args(args)
                same = usual and self.config.get("fit.model.lora_rank") == usual["model.lora_rank"]
                if same and len(ruled) > len(usual):  # alpha and layers are those of the rule's rank
                    self._parser("fit").set_defaults(ruled)
                    self.config = parser.parse_args(args)
            except ArgumentError as error:
                options = list(self._parser("fit")._option_string_actions)
                raise wrong_argument(error.message, args[1:], options, SEE_HELP) from error
            except UnicodeDecodeError as error:
                remedy = "name a recipe in YAML with --config"
                raise RequestError(message("arguments", f"a file of arguments is no text ({error})", remedy)) from error

        def instantiate_trainer(self, **options: Any) -> Any:
            """The Trainer; what it refuses is a wrong request, without a traceback.

            Under `wandb agent` it logs to wandb where the recipe names no logger: the sweep waits for its metric.
            """
            if os.environ.get("WANDB_SWEEP_ID") and not self._get(self.config_init, "trainer.logger"):
                options["logger"] = submodule("loggers").WandbLogger()
            try:
                return super().instantiate_trainer(**options)
            except (ValueError, submodule("utilities.exceptions").MisconfigurationException) as error:
                raise RequestError(message("arguments of the Trainer", str(error), SEE_HELP)) from error

        def _parse_ckpt_path(self) -> None:
            """A resumed fit takes its arguments from the recipe, as the first one did; the data module says what
            differs from the checkpoint."""

        def before_fit(self) -> None:
            """Hook of LightningCLI: everything is made, nothing computed."""
            if self.ruled and self.model.describe() == self.ruled:
                method, rate = self.ruled["method"], self.ruled["learning_rate"]
                log(f"method and learning rate as in the rule's runs: {method}, learning_rate {rate:g}")
            mining = self._get(self.config_init, "mining")
            mining.config = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
            folder = self._get(self.config, "export")
            zero = getattr(self.trainer.strategy, "zero_stage_3", False)
            sharded = "DeepSpeed stage 3" if zero else "FSDP" if "FSDP" in type(self.trainer.strategy).__name__ else ""
            if folder and sharded:
                how = "zero_to_fp32.py" if zero else "state_dict_type: full"
                remedy = f"leave it out, and take the weights from the checkpoint ({how})"
                raise RequestError(message("export", f"under {sharded} no rank has the whole weights", remedy))
            if folder:  # not after hours of training
                _check_export(Path(folder), self.model.hparams.lora_rank)
            if before is not None:
                before(self)
            if folder:
                try:
                    Path(folder).mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise _no_folder(folder, error) from error

        def fit(self, **options: Any) -> None:
            """Trainer.fit, with Ctrl-C passed on."""
            _check_checkpoint(options.get("ckpt_path"))
            with passing_on_ctrl_c(self.trainer):
                self.trainer.fit(**options)

        def after_fit(self) -> None:
            folder = self._get(self.config, "export")
            if folder and self.trainer.is_global_zero:
                write_json(Path(folder) / EXPORTED, {"made_by": f"im_lightning {__version__}"})
                self.model.export_adapter(folder)
                rank = self.model.hparams.lora_rank
                what = (
                    f"an adapter (LoRA of rank {rank})" if rank else "the whole model, since all weights were trained"
                )
                log(f"{folder}: written, {what}")

    def run(argv: list[str]) -> LightningCLI:
        bars = sys.stderr.isatty() and not manner().quiet
        # three epochs, as the paper
        trainer = {"max_epochs": 3, "enable_model_summary": False, "enable_progress_bar": bars}
        about = {"description": _ABOUT + example}
        return FitCLI(
            InstructTuningModule,
            InstructMiningDataModule,
            args=["fit", *argv],
            save_config_callback=None,  # Lightning's overwrites a config.yaml in the current folder
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults=trainer,
            # wrong arguments raise: a hundred lines of usage would hide which one it is
            parser_kwargs={"prog": "im-lightning", "exit_on_error": False, "fit": {**about, "exit_on_error": False}},
        )

    return run


def as_ruled(rule: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of the module is as in the rule's runs, unless recipe or command line say otherwise: its arguments, and what
    such a module says of its method and rate; {} where the rule does not name them."""
    with contextlib.suppress(InstructMiningError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about the rule come where it is used
        regime = {} if rule is None else load_rule(rule).regime
        regime = {name: regime.get(name) for name in ("method", "learning_rate")}
        tuned = {**lora_of(regime["method"]), "learning_rate": regime["learning_rate"]}
        if len(tuned) > 1 and tuned["learning_rate"] is not None:
            return {f"model.{name}": value for name, value in tuned.items()}, regime
    return {}, {}


def _check_export(folder: Path, rank: int) -> None:
    """Refuses a folder of other files, or of an export of another kind than a module of this LoRA rank makes."""
    try:
        foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / EXPORTED).exists()
    except OSError as error:
        raise _no_folder(str(folder), error) from error
    cause = "this folder holds files, and no fit exported them" if foreign else ""
    kinds = {"adapter_config.json": "an adapter", "config.json": "a whole model"}
    other = list(kinds)[1 if rank else 0]
    if not cause and (folder / other).exists():  # loaded from both, it would be neither
        cause = f"an earlier fit exported {kinds[other]} to this folder, and this one writes another kind"
    if cause:
        raise RequestError(message(f"--export {folder}", cause, "name a new or an empty folder"))


def _no_folder(folder: str, error: OSError) -> RequestError:
    cause = f"the folder cannot be made: {error.strerror or error}"
    return RequestError(message(f"--export {folder}", cause, "name a folder that can"))


def _check_checkpoint(path: str | None) -> None:
    """Refuses a checkpoint that is not there or not whole, before the pool is scored for it.

    Lightning's own words (last, best, …) and addresses of other file systems are left to Lightning.
    """
    if path is None or path in ("last", "best", "hpc") or ":" in path:
        return
    file = Path(path)
    if not file.exists():
        raise RequestError(message(path, "there is no such checkpoint", "check --ckpt_path"))
    if file.is_file() and not zipfile.is_zipfile(file):  # its table of contents comes last, so a torn one lacks it
        raise DataError(message(path, "it is torn, or no checkpoint of Lightning", "resume from another one"))


def _quiet() -> None:
    """Lightning's greetings and known-harmless warnings stay out of the way of what the fit has to say."""
    if manner().verbose:
        return
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        "does not have many workers",
        "LeafSpec",
        "smaller than the logging interval",
    ):
        warnings.filterwarnings("ignore", message=f".*{text}.*")
