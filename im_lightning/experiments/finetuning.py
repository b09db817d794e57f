"""The finetunes of a study: their settings, what may evaluate them, and one short fit in this process.

A fit is that of the ordinary Trainer, data module, module and callback, without their chatter. An evaluation set may
not evaluate if the rule was fitted on it, or if it shares rows with the set searched. What `--force` overrode
becomes sentences for the result, since a warning at the start is gone when it is read.

Commands take `Study` and `Tuning` as parameters and offer a flag per field, described by the text under it; so that
their help is fast, Lightning is imported where it is used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from im_lightning._utils.files import parse_json, plain
from im_lightning._utils.force import Force, accepted, to_force
from im_lightning._utils.json_diff import differences
from im_lightning._utils.outputs import Replacing, json_with
from im_lightning.data.overlap.keys import EXACT
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Encoding, Reading
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.ledger.regime import lora_rank_of
from im_lightning.ledger.targets import set_of, terms_of
from im_lightning.models.device import PRECISIONS, resolve_device
from im_lightning.rule.linear_rule import LinearRule, objections
from im_lightning.rule.published import load_rule
from im_lightning.rule.transfer import weigh_evidence

if TYPE_CHECKING:
    import torch

    from im_lightning.training.datamodule import InstructMiningDataModule
    from im_lightning.training.module import InstructTuningModule
    from im_lightning.training.run.encoded_pool import Pool

GROUPS = ("study", "encoding", "reading", "weights", "targeting")
"""Names of the parameters whose fields stand beside the others in a result's file, as their flags do."""


@dataclass(frozen=True)
class Study:
    """What a comparison or a search starts from."""

    data: list[str]
    """The pool, as it was scored: files, folders or data sets."""
    scores: str
    """Score table of the pool (im-lightning score)."""
    rule: str | None = None
    """Rule file or published name; a comparison without one leaves out the arms that need it."""
    seed: int = 0
    """The first seed; the others follow it."""
    mixture: str | None = None
    """Mixture of sources (im-lightning mix), for the arms mix and mix+rule of a comparison."""
    exclude: str | None = None
    """What of an evaluation set is in no arm: prompt (the usual: rows of the same prompt, too), normalised or exact."""
    force: bool | str = False
    """Go on with a rule that its own runs find no better than the mean; after it, separated by commas, what else to
    accept: other-base (a rule of other models), seen-evaluation (a set it was fitted on), worse-target; loudly."""


@dataclass(frozen=True)
class Tuning:
    """How each finetune is made, as the commands offer it."""

    lora_rank: int | None = None
    """Rank of LoRA; 0 finetunes all weights. By default as the rule's runs. Under LoRA the paper saw no effect."""
    learning_rate: float | None = None
    """Peak learning rate; by default that of the rule's runs under their method, else 2e-5, with LoRA 2e-4."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the rate rises."""
    epochs: int = 1
    """Passes over the rows; in a comparison, tokens and steps are those of one."""
    accumulate: int = 1
    """Batches per optimiser step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    device: str = "auto"
    """cpu, cuda, mps or auto; one device."""
    dtype: str = "auto"
    """fp32, bf16 or auto (bf16 where the device multiplies it faster)."""
    token_budget: int | str = "auto"
    """Tokens of a micro-batch on the device, padding included, or auto by its memory; the gradient is the same."""


@dataclass(frozen=True)
class TuningSettings(Tuning):
    """How each finetune of a study is made, all of it."""

    lora_rank: int = 0
    """Rank of LoRA; 0 finetunes all weights."""
    batch_size: int = 10
    """Rows per batch, where the study does not set them otherwise."""
    gradient_clip: float = 1.0
    """Largest gradient norm."""

    def __post_init__(self) -> None:
        if self.dtype not in PRECISIONS:
            raise RequestError(message("--dtype", f"there is no {self.dtype!r}", f"use one of {', '.join(PRECISIONS)}"))
        for name in ("epochs", "accumulate", "batch_size"):  # 0 epochs train nothing, and -1 of them never end
            if (value := getattr(self, name)) < 1:
                raise RequestError(message(f"--{name.replace('_', '-')}", f"it is {value}", "give 1 or more"))

    @property
    def rate(self) -> float:
        """The peak learning rate: where none is given, 2e-4 for an adapter, 2e-5 for all weights."""
        usual = 2e-4 if self.lora_rank else 2e-5
        return usual if self.learning_rate is None else self.learning_rate

    @property
    def torch_device(self) -> torch.device:
        """The device that a Trainer with this accelerator takes."""
        return resolve_device("auto" if self.device == "gpu" else self.device)

    @property
    def title(self) -> str:
        """`full finetuning, learning rate 0.001`."""
        method = f"LoRA of rank {self.lora_rank}" if self.lora_rank else "full finetuning"
        return f"{method}, learning rate {self.rate:g}"


NEWER: dict[str, Any] = {"revision": None, "columns": None, "answer": "error", "temperature": 1.0, "floor": 0.0}
NEWER |= {"turns": "last", "exclude": EXACT, "one_per_prompt": False}
NEWER |= dict.fromkeys(("mixture", "target", "target_model"))
"""Settings that earlier results do not have, and what they are then."""


@dataclass(frozen=True)
class StudySettings:
    """What the finetunes of a comparison or a search share."""

    study: Study
    encoding: Encoding
    reading: Reading
    tuning: TuningSettings

    def __post_init__(self) -> None:
        """What is of no kind is found out before anything is read or written."""
        accepted(self.study.force)
        resolve_device("auto" if self.tuning.device == "gpu" else self.tuning.device)

    @property
    def model(self) -> str:
        """The base model, which the commands require."""
        return str(self.encoding.model)

    @property
    def options(self) -> dict[str, Any]:
        """What the data module takes of them."""
        s = {name: getattr(self.study, name) for name in ("force", "scores", "exclude")}
        return {**s, **asdict(self.encoding), **asdict(self.reading)}

    def pool(self, data: str | list[str]) -> Pool:
        """A pool or evaluation set, without the rows that are set aside."""
        from im_lightning.training.run.encoded_pool import coding_of, read_pool

        return read_pool(data, self.reading, coding_of(self.encoding).template.refusal)

    def to_json(self) -> dict[str, Any]:
        """JSON-like; the fields of shared groups beside the others, as the flags are; newer ones where used."""
        out: dict[str, Any] = {}
        for name, value in {**asdict(self), "tuning": self.tuned}.items():
            out |= value if name in GROUPS else {name: value}
        return {name: value for name, value in out.items() if name not in NEWER or value not in (None, NEWER[name])}

    @property
    def tuned(self) -> dict[str, Any]:
        """How they are finetuned, JSON-like, the learning rate settled; what changes rounding alone is left out. Where
        "auto" is bf16 on a CPU it is named, since it was fp32 in earlier versions."""
        t = self.tuning
        out = {**asdict(t), "learning_rate": t.rate}
        del out["token_budget"]
        device = t.torch_device
        if t.dtype == "auto" and device.type == "cpu":
            from im_lightning.training.module import training_precision

            precision = training_precision("auto", self.model, self.encoding.revision, device)
            out |= {"precision": precision} if precision != "fp32" else {}
        return out


def finetune(
    data: InstructMiningDataModule,
    model: str,
    settings: TuningSettings,
    seed: int,
    ledger: str | os.PathLike[str],
    root: str | os.PathLike[str],
    callbacks: Sequence[Any] = (),
) -> RunRecord:
    """Finetunes `model` on what `data` gives, evaluates, and adds the run to the ledger; no refit.

    Args:
        data: Decides rows, evaluation sets and the run's purpose.
        model: Folder of the base model.
        settings: Learning rate, epochs, ….
        seed: Training seed: dropout and the adapter's start (the order of rows is the data module's).
        ledger: Folder of the runs.
        root: The Trainer's folder; frozen tables go there.
        callbacks: Further ones, called after the one that keeps the run.

    Returns:
        The run's record.

    Raises:
        InstructMiningError: the fit ended without a complete record.
    """
    from im_lightning._lightning import Trainer, isolate_rng, keep_environment, passing_on_ctrl_c, pl, quiet
    from im_lightning.training.callback import InstructMiningCallback
    from im_lightning.training.shared_base import returning_base

    module = tuning_module(model, settings, data.hparams["revision"])
    callback = InstructMiningCallback(ledger=os.fspath(ledger), refit=False)
    with quiet(), isolate_rng(), keep_environment("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        pl.seed_everything(seed, verbose=False)
        trainer = Trainer(
            accelerator=settings.device,
            devices=1,
            max_epochs=settings.epochs,
            gradient_clip_val=settings.gradient_clip,
            accumulate_grad_batches=settings.accumulate,
            callbacks=[callback, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=Path(root),
        )
        with returning_base(module), passing_on_ctrl_c(trainer):
            trainer.fit(module, datamodule=data)
    if (record := callback.record) is None or record.status != "complete":
        cause = f"the fit ended without a complete record{'' if record is None else f' ({record.note})'}"
        remedy = "run the same command again"
        if record is not None and record.evaluation:  # measured, and not finite: the same seed diverges again
            remedy = "lower the learning rate (--learning-rate): the same command would diverge again"
        raise InstructMiningError(message(os.fspath(ledger), cause, remedy))
    return record


def tuning_module(model: str, settings: TuningSettings, revision: str | None) -> InstructTuningModule:
    """The module of such a finetune, without weights as yet."""
    from im_lightning.training.module import InstructTuningModule

    names = "lora_rank", "warmup_ratio", "gradient_checkpointing", "dtype", "token_budget"
    options = {name: getattr(settings, name) for name in names}
    return InstructTuningModule(model, learning_rate=settings.rate, revision=revision, **options)


def check_seed(seed: int, most: int = (1 << 31) - 1) -> None:
    """Raises a RequestError for a first seed that Lightning and numpy would refuse, or one made of it."""
    if not 0 <= seed <= most:
        raise RequestError(message("--seed", f"it is {seed}", f"give one from 0 to {most:,}"))


def as_in_rule(tuning: Tuning, rule: str | None, ledger: Path | None = None) -> tuple[Tuning, list[str]]:
    """How to finetune: where the request does not say, as an experiment that goes on was begun, else by the method and
    learning rate of the rule's runs.

    Args:
        tuning: What was asked for.
        rule: Rule file or published name.
        ledger: Where the experiment keeps its runs; earlier versions began them by defaults of their own.

    Returns:
        The settings, rank and rate named; and a sentence on them where the rule says how its runs were made.
    """
    with warnings.catch_warnings(action="ignore"):  # said where the rule is used
        regime = {} if rule is None else load_rule(rule).regime
    begun = [] if ledger is None else [r.regime for r in RunLedger(ledger).records() if r.steps]
    usual = begun[-1] if begun else regime
    rank, rate = lora_rank_of(usual.get("method")), usual.get("learning_rate")
    if rank is None:
        return replace(tuning, lora_rank=tuning.lora_rank or 0), []
    chosen = rank if tuning.lora_rank is None else tuning.lora_rank
    own = rate if tuning.learning_rate is None and chosen == rank else tuning.learning_rate
    made = replace(tuning, lora_rank=chosen, learning_rate=own)
    if lora_rank_of(regime.get("method")) is None:
        return made, []
    here = f"lora r={chosen} alpha={2 * chosen:g} all-linear" if chosen else "full"
    if here == regime["method"] and own == regime.get("learning_rate"):
        return made, [f"Method and learning rate are those of the rule's runs: {here}, {own:g}."]
    return made, [
        f"NOT AS THE RULE'S RUNS: they were finetuned by {regime['method']} at learning rate "
        f"{regime.get('learning_rate')}, these by {here} at {'its usual one' if own is None else f'{own:g}'}; what "
        "helped there need not help here."
    ]


UNKNOWN = "The rule does not say which evaluation sets it was fitted on: that they differ is not checked."
UNKNOWN_ROWS = "The ledger does not say which rows the rule's evaluation set had: that none is shared is not checked."


def check_unseen(
    option: str,
    one: Pool,
    rule: LinearRule,
    ledger: RunLedger | None = None,
    runs: Sequence[RunRecord] = (),
    force: Force = False,
) -> str:
    """Refuses a set that the rule was fitted on, whole or (where its runs are known) in part; returns what a reader
    must know, or "".

    Args:
        option: What names the set: `--eval-data report.jsonl`.
        one: The set.
        rule: The rule.
        ledger: Of the runs it was fitted on.
        runs: Those runs.
        force: With "seen-evaluation", go on, loudly.

    Raises:
        RequestError: the set was seen and `force` does not name that.
    """
    fitted = rule.regime.get("evaluation_sets") or {}
    same = [name for name, digest in fitted.items() if digest == one.digest]
    cause = ""
    if same:
        cause = f"{rule.title} was fitted on this very set ({', '.join(same)}), which flatters it"
    elif ledger is not None and runs:
        if (seen := _seen(rule, ledger, runs)) is None:
            return UNKNOWN_ROWS
        if shared := sum(i in seen for i in one.ids):
            cause = f"{shared:,} of its {len(one):,} rows are in the set that {rule.title} was fitted on"
    elif not fitted:
        return UNKNOWN
    if not cause:
        return ""
    if "seen-evaluation" not in accepted(force):
        remedy = f"evaluate on rows that no rule was fitted on, or {to_force(['seen-evaluation'], force)}"
        raise RequestError(message(option, cause, remedy))
    return f"FORCED (seen-evaluation): {option}: {cause}. DIFFERENCES BELOW ARE NO EVIDENCE FOR THE RULE."


def _seen(rule: LinearRule, ledger: RunLedger, runs: Sequence[RunRecord]) -> set[str] | None:
    """Ids of the rule's evaluation sets, from the first run that kept their losses; None where none did."""
    for run in runs:
        try:
            losses = ledger.losses(run.run_id)
        except InstructMiningError:  # none kept, or a torn file: another run knows the same rows
            continue
        if named := losses.keys() & set(map(set_of, terms_of(rule.evaluation))):
            return {i for name in named for i in losses[name].ids}
    return None


def check_out(result: Path, keys: Collection[str], inputs: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The result in the folder that this one goes on with; {} where there is none, or it is to be replaced.

    Args:
        result: The JSON file of the result; its text lies beside it.
        keys: What results of earlier versions hold, which had no `format`.
        inputs: What decides the numbers, JSON-like, files by their digests.
        overwrite: Replace it all the same.

    Raises:
        RequestError: no such result, or one of other inputs, is there; more arms, seeds or trials are no other inputs.
    """
    kind, replacing = result.stem, Replacing(overwrite)
    replacing.check(result, f"result of im-lightning {kind}", json_with(f"im_lightning.{kind}", keys=keys))
    known: dict[str, Any] = parse_json(result.read_bytes() or b"{}") if result.exists() and not overwrite else {}
    text = result.with_suffix(".txt")
    replacing.check(text, f"text of {result}", lambda path: path.read_text("utf-8") == known["rendered"] + "\n")
    if other := differences(known["inputs"], plain(inputs)) if "inputs" in known else []:
        cause = f"it holds another result ({'; '.join(one.text('there', 'asked for') for one in other)})"
        raise RequestError(message(f"--out {result.parent}", cause, "name another folder, or pass --overwrite"))
    return known


def check_rule(rule: LinearRule, table: ScoreTable, encoding: Encoding, force: Force) -> list[str]:
    """Checks the rule against the scores and against the base that is to be finetuned, before anything is.

    Args:
        rule: The rule.
        table: Scores of the pool.
        encoding: Base model and template of the finetunes.
        force: Accept what would be refused.

    Returns:
        What was forced, and the evidence by which another base was accepted, one sentence each.

    Raises:
        RequestError: the rule does not fit, and `force` does not name how.
    """
    rule.check(table, force)
    forced = [f"FORCED ({one.risk}): rule {rule.title}: {one.cause}." for one in objections(rule, table)[0]]
    from im_lightning.training.run.encoded_pool import base_model_name, coding_of

    coding = coding_of(encoding)
    template = f"{coding.template.name} {coding.template.identity}"
    here = {"base_model": base_model_name(coding.model), "template": template}
    loudly = "" if rule.transfers and weigh_evidence(rule, here)[0] else "FORCED (other-base): "
    return [*forced, *(f"{loudly}{note}." for note in rule.check_regime(here, force))]
