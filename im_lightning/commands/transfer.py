"""`im-lightning transfer`: whether what a small base's runs say carries over to another base."""

from __future__ import annotations

from pathlib import Path

from im_lightning._utils.answer import answer
from im_lightning._utils.files import parse_json
from im_lightning._utils.outputs import Replacing, json_with
from im_lightning._utils.progress import log
from im_lightning.errors import RequestError, message
from im_lightning.experiments.transfer.settings import TransferSettings

SUMMARY = "finetune a small base's subsets on another base; say whether both rank them alike"
EXAMPLE = "im-lightning transfer runs/ --model meta-llama/Llama-3.2-1B --rule runs/rule.json --out transfer/"
POSITIONAL = ("ledger",)
REQUIRED = ("model",)

_REPLACING = Replacing()


def run(ledger: str, transfer: TransferSettings, out: str, replacing: Replacing = _REPLACING) -> int:
    """Finetunes some subsets of a small base's designed runs on another base, and compares how they rank.

    Prints their rank correlation with its interval, for each learning rate, and what more subsets would buy. With
    --rule, OUT/rule.json is the rule with this as its evidence: fit, compare and search accept it for the other base
    where the interval lies above 0, and refuse it elsewhere, unless --force other-base. The pool stays scored by the
    small base. The runs are kept in OUT/runs; the same command goes on after an interruption.

    Args:
        ledger: Folder of the small base's designed runs, made by im-lightning sweep or im-lightning fit.
        transfer: What is finetuned.
        out: Folder to write, or to go on in.
        replacing: What may be replaced.
    """
    from im_lightning._utils.files import write_json
    from im_lightning._utils.text_tables import terminal_width
    from im_lightning.commands.runs import open_ledger
    from im_lightning.experiments.transfer.result import FORMAT
    from im_lightning.experiments.transfer.run import run_transfer
    from im_lightning.ledger.ledger import RULE_FORMAT

    folder = Path(out)
    replacing.check(folder / "transfer.json", "result of im-lightning transfer", json_with(FORMAT))
    _refuse_another(folder / "transfer.json", transfer.model, replacing)
    if transfer.rule is not None:
        replacing.check(folder / "rule.json", "rule", json_with(RULE_FORMAT))
    result = run_transfer(open_ledger(ledger), transfer, folder)
    found = result.to_json()
    answer(found, result.text(terminal_width()))
    write_json(folder / "transfer.json", found)
    log(f"wrote {folder / 'transfer.json'}")
    if (ruled := result.ruled) is not None:
        ruled.save(folder / "rule.json")
        log(f"wrote {folder / 'rule.json'}")
    return 0


def _refuse_another(file: Path, model: str, replacing: Replacing) -> None:
    """Refuses a folder with what was found of another base: its numbers and its rule's evidence would be gone."""
    there = None if replacing.overwrite or not file.exists() else parse_json(file.read_bytes() or b"{}").get("model")
    if there not in (None, model):
        cause = f"it holds the result of another base ({there} there, {model} asked for)"
        raise RequestError(message(f"--out {file.parent}", cause, "name another folder, or pass --overwrite"))
