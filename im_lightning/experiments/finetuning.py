"""The finetunes of a study: their settings, the runs that are there by their keys, and one short fit in this process.

A fit is that of the ordinary Trainer, data module, module and callback, without their chatter.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from im_lightning._lightning import PACKAGE, Trainer, isolate_rng, passing_on_ctrl_c, pl
from im_lightning._utils.progress import silence
from im_lightning.data.overlap.keys import EXACT, USUAL, check_exclusion
from im_lightning.data.settings import Encoding, Reading
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.experiments.settings import Study, Tuning
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.models import checkpoint
from im_lightning.training.callback import InstructMiningCallback
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.module import InstructTuningModule, training_precision
from im_lightning.training.run.encoded_pool import Pool, coding_of, read_pool

if TYPE_CHECKING:
    import torch

_LOGGERS = (PACKAGE, f"{PACKAGE}.utilities.rank_zero", "lightning_fabric", "lightning.fabric")


GROUPS = ("study", "encoding", "reading")
"""Names of the parameters whose fields stand beside the others in a result's file, as their flags do."""


@dataclass(frozen=True)
class TuningSettings(Tuning):
    """How each finetune of a study is made, all of it."""

    batch_size: int = 10
    """Rows per batch, where the study does not set them otherwise."""
    gradient_clip: float = 1.0
    """Largest gradient norm."""

    @property
    def rate(self) -> float:
        """The peak learning rate: where none is given, 2e-4 for an adapter, 2e-5 for all weights."""
        usual = 2e-4 if self.lora_rank else 2e-5
        return usual if self.learning_rate is None else self.learning_rate

    @property
    def torch_device(self) -> torch.device:
        """The device that a Trainer with this accelerator takes."""
        import torch

        name = self.device
        if name in ("auto", "gpu"):
            name = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(name)

    @property
    def title(self) -> str:
        """`full finetuning, learning rate 0.001`."""
        method = f"LoRA of rank {self.lora_rank}" if self.lora_rank else "full finetuning"
        return f"{method}, learning rate {self.rate:g}"


_NEWER = {"revision": None, "columns": None, "answer": "error", "exclude": EXACT, "mixture": None}
"""Settings that earlier results do not have, and what they are then."""


@dataclass(frozen=True)
class StudySettings:
    """What the finetunes of a comparison or a search share."""

    study: Study
    encoding: Encoding
    reading: Reading
    tuning: TuningSettings

    @property
    def model(self) -> str:
        """The base model, which the commands require."""
        return str(self.encoding.model)

    @property
    def options(self) -> dict[str, Any]:
        """What the data module takes of them."""
        s = self.study
        given = {"force": s.force, "scores": s.scores, "exclude": s.exclude}
        return {**given, **asdict(self.encoding), **asdict(self.reading)}

    def pool(self, data: str | list[str]) -> Pool:
        """A pool or evaluation set, without the rows that are set aside."""
        return read_pool(data, self.reading, coding_of(self.encoding).template.refusal)

    def to_json(self) -> dict[str, Any]:
        """JSON-like; the fields of shared groups beside the others, as the flags are; newer ones where used."""
        out: dict[str, Any] = {}
        for name, value in {**asdict(self), "tuning": self.tuned}.items():
            out |= value if name in GROUPS else {name: value}
        return {name: value for name, value in out.items() if name not in _NEWER or value not in (None, _NEWER[name])}

    @property
    def tuned(self) -> dict[str, Any]:
        """How they are finetuned, JSON-like, the learning rate settled; what changes rounding alone is left out.

        Where "auto" is bf16 on a CPU it is named, since it was fp32 in earlier versions.
        """
        t = self.tuning
        out = {**asdict(t), "learning_rate": t.rate}
        del out["token_budget"]
        device = t.torch_device
        if t.dtype == "auto" and device.type == "cpu":
            precision = training_precision("auto", self.model, self.encoding.revision, device)
            out |= {"precision": precision} if precision != "fp32" else {}
        return out


def settle_exclusion(asked: str | None, records: Sequence[RunRecord]) -> str:
    """What an experiment leaves out of its pool for the evaluation sets: what is asked for, else what its runs left
    out, else the usual. Runs of earlier versions, which do not say, left out rows of the same content alone."""
    if asked is not None:
        check_exclusion(asked)
        return asked
    before = [str(r.subset.get("exclude", EXACT)) for r in records if r.subset.get("size")]
    return before[-1] if before else USUAL


class KeyedRuns:
    """The runs of one purpose in a ledger, by what decides them: found by their key, or made.

    A key is a digest of everything that decides a run's numbers. So an interrupted experiment goes on where it was, and
    nothing that was made under other settings is ever taken over.

    Args:
        ledger: Where they are kept.
        purpose: compare or search.
        whole: Whether a run has all that is asked for; one that has not is made anew.

    Attributes:
        made: How many were made.
        replayed: How many were found.
    """

    def __init__(
        self, ledger: RunLedger, purpose: str, whole: Callable[[RunRecord], bool] = lambda record: True
    ) -> None:
        known = ((r.subset.get("key"), r) for r in ledger.records(purpose) if whole(r))
        self._by_key: dict[str, RunRecord] = {str(key): r for key, r in known if key}
        self.made = self.replayed = 0

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def find_or_make(self, key: str, make: Callable[[], RunRecord]) -> RunRecord:
        """The run of this key; `make` must leave it in the ledger with `subset["key"] == key`."""
        record = self._by_key.get(key)
        if record is not None:
            self.replayed += 1
            return record
        record = self._by_key[key] = make()
        self.made += 1
        return record


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
    module = InstructTuningModule(
        model,
        lora_rank=settings.lora_rank,
        learning_rate=settings.rate,
        warmup_ratio=settings.warmup_ratio,
        gradient_checkpointing=settings.gradient_checkpointing,
        dtype=settings.dtype,
        token_budget=settings.token_budget,
        revision=data.hparams["revision"],
    )
    callback = InstructMiningCallback(ledger=os.fspath(ledger), refit=False)
    with quiet(), isolate_rng(), keep_environment(seed):
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
        with passing_on_ctrl_c(trainer):
            trainer.fit(module, datamodule=data)
    record = callback.record
    if record is None or record.status != "complete":
        cause = "the fit ended without a complete record" + (f" ({record.note})" if record is not None else "")
        remedy = "run the same command again"
        if record is not None and record.evaluation:  # measured, and not finite: the same seed diverges again
            remedy = "lower the learning rate (--learning-rate): the same command would diverge again"
        raise InstructMiningError(message(os.fspath(ledger), cause, remedy))
    return record


def check_seed(seed: int) -> None:
    """Refuses a first seed that Lightning and numpy would refuse at the first fit.

    Raises:
        RequestError: it is negative, or too large for those after it.
    """
    if not 0 <= seed < 1 << 31:
        raise RequestError(message("--seed", f"it is {seed}", "give one from 0 to 2,147,483,647"))


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what Lightning, transformers and this package say at every one of a hundred short fits."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with checkpoint.quiet(), silence(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a weighting warns of is in its report, and so in the run's record
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def keep_environment(seed: int) -> Iterator[None]:
    """Seeds every generator as Lightning does; its environment variables are as before afterwards."""
    before = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    try:
        pl.seed_everything(seed, verbose=False)
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
