"""The merged runs of a sweep: the adapters of its blocks, evaluated in mixtures, with nothing trained.

The trials of such a sweep (`im-lightning design --kind merged`) finetune on each block, whose adapter is kept, and on
the rows of some mixtures, the twins. When all have ended, one process loads the base once and evaluates every mixture α
as base + s · Σ α_b Δ_b. s is 1 where the blocks took as many optimiser steps as the twins; else it is the one under
which the twins' log losses are met best (least squares over twins and evaluation sets). Each merged run has its record
in the ledger as soon as it is evaluated, under an id that the sweep decides: after a kill the others follow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from im_lightning._lightning import quiet
from im_lightning._utils.files import parse_json
from im_lightning._utils.hashing import digest_json
from im_lightning._utils.progress import log, progress
from im_lightning.errors import RequestError, message
from im_lightning.experiments.sweep.file import SweepFile
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord
from im_lightning.sampling.designs.blocks import Blocks, read_blocks

PARAMETER = "data.blocks"
_STEP = 0.1  # to which log s is found
Shares = Mapping[str, float]


class _Evaluated(Exception):
    """Ends a fit of which only the parts were wanted."""


@dataclass(frozen=True)
class MergedRuns:
    """What a sweep merges: its blocks and mixtures, and where the blocks' adapters are kept."""

    blocks: Blocks
    folder: Path

    @classmethod
    def of(cls, sweep: SweepFile, folder: Path) -> MergedRuns | None:
        """Those of a sweep over blocks; None for another one.

        Raises:
            RequestError, DataError: as `read_blocks`.
        """
        named = next((p.grid[0] for p in sweep.parameters if p.name == PARAMETER and p.grid), None)
        return None if named is None else cls(read_blocks(str(named)), folder / "adapters")

    def export(self, number: int) -> list[str]:
        """The argument that keeps the adapter of a trial on a block; nothing for a twin."""
        names = list(self.blocks.rows)
        return [f"--export={self.folder / names[number]}"] if number < len(names) else []

    def evaluate(self, arguments: Sequence[str], runs: Sequence[tuple[str, str]], key: str) -> None:
        """Evaluates the mixtures that the ledger does not have yet.

        Args:
            arguments: Of `im-lightning fit`, as for the first block.
            runs: (ledger, run id) of the blocks, then of the twins.
            key: Of the sweep: its merged runs have ids of their own.

        Raises:
            RequestError: the blocks' file is another one than the trials had.
        """
        book = RunLedger(runs[0][0])
        records = [_record(*run) for run in runs]
        parts = dict(zip(self.blocks.rows, records, strict=False))
        for name, record in parts.items():
            if record.subset.get("blocks") != self.blocks.digest or record.subset["shares_wanted"].get(name) != 1:
                cause = f"run {record.run_id} was not trained on block {name} of its blocks, which have changed since"
                raise RequestError(message(f"the sweep's {PARAMETER}", cause, "run the sweep in a new folder (--out)"))
        made = digest_json([key, self.blocks.digest, [record.run_id for record in records]])[:12]
        ids = [f"merged-{made}-{k:03d}" for k in range(len(self.blocks.mixtures))]
        known = {r.run_id: r for r in book.records() if r.run_id in set(ids)}
        left = [(i, m) for i, m in zip(ids, self.blocks.mixtures, strict=True) if i not in known]
        if not left:
            return
        twins = list(zip(self.blocks.mixtures, records[len(parts) :], strict=False))
        scale = next((float(r.made["s"]) for r in known.values()), None)
        precision = str(records[0].numerics.get("precision", ""))

        def before(cli: Any) -> None:
            nonlocal scale
            start = time.monotonic()
            passes: list[float] = []
            losses = self._losses(cli, precision, passes)
            s = scale = _fitted(losses, twins, parts) if scale is None else scale
            with progress("merged runs", len(left), "runs") as bar:
                for run_id, shares in left:
                    found = losses(shares, s)
                    told = {name: one.summary() for name, one in found.items()}
                    seconds, start = time.monotonic() - start, time.monotonic()
                    record = merged_record(run_id, shares, parts, self.blocks.subset_size, s, told, seconds)
                    if record.compute:  # the first one paid for s
                        record.compute["tokens_evaluated"] *= len(passes)
                    passes.clear()
                    for name, one in found.items():
                        ids = cli.datamodule.eval_sets[name].ids
                        book.add_losses(run_id, name, ids, **one.columns())
                    book.add(record)
                    bar.advance()
            raise _Evaluated

        from im_lightning.training.cli import run_fit
        from im_lightning.training.run.run_record import merged_record

        try:
            with quiet():
                run_fit([*arguments, "--trainer.devices=1", "--trainer.num_nodes=1"], before=before)
        except _Evaluated:
            log(f"{len(left)} merged runs evaluated, s {scale:.3g}")

    def _losses(self, cli: Any, precision: str, passes: list[float]) -> Callable[[Shares, float], Any]:
        """(mixture, s) → evaluation set → its losses, under the base with the blocks' adapters; `passes` gets the s of
        every pass over the sets."""
        from im_lightning.models.device import PRECISIONS
        from im_lightning.training.evaluation import evaluate_with
        from im_lightning.training.merging import StackedAdapters
        from im_lightning.training.module import InstructTuningModule

        trainer, module, data = cli.trainer, cli.model, cli.datamodule
        if not isinstance(module, InstructTuningModule) or not module.hparams["lora_rank"]:
            cause = "what is merged are adapters, and the blocks were finetuned otherwise"
            raise RequestError(message("merged runs", cause, "pass --model.lora_rank=16 to the sweep (--arguments)"))
        module.trainer = data.trainer = trainer
        if precision in PRECISIONS:
            module.keep_precision(precision)
        data.setup("fit")
        module.configure_model()
        module.to(trainer.strategy.root_device)
        stack = StackedAdapters(module.network, {name: self.folder / name for name in self.blocks.rows})

        def losses(shares: Shares, s: float) -> Any:
            passes.append(s)
            stack.mix({name: s * share for name, share in shares.items()})
            return evaluate_with(trainer, module, data.eval_sets)

        return losses


def _fitted(
    losses: Callable[[Shares, float], Any], twins: Sequence[tuple[Shares, RunRecord]], parts: Mapping[str, RunRecord]
) -> float:
    """s: 1 where blocks and twins took as many steps, or there is no twin; else where the twins are met best."""
    from scipy.optimize import minimize_scalar

    steps = [record.steps for _, record in twins]
    ratio = max(steps, default=1) / max(1, *(record.steps for record in parts.values())) if steps else 1.0
    if ratio == 1.0:
        return 1.0

    def missed(log_s: float) -> float:
        found = [(losses(shares, math.exp(log_s)), record) for shares, record in twins]
        errors = [math.log(one.loss / record.loss(name)) for every, record in found for name, one in every.items()]
        return sum(error**2 for error in errors)

    bounds = sorted((-0.7, math.log(2.0 * ratio)))
    return math.exp(minimize_scalar(missed, bounds=bounds, method="bounded", options={"xatol": _STEP}).x)


def _record(ledger: str, run_id: str) -> RunRecord:
    path = Path(ledger) / f"{run_id}.json"
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cause = f"the run of a trial cannot be read ({getattr(error, 'strerror', None) or error})"
        raise RequestError(message(str(path), cause, "restore it, or run the sweep in a new folder (--out)")) from error
    return RunRecord.from_json(value, str(path))
