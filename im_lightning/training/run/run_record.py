"""The RunRecord of a fit: what it trained on, under which regime, and what came out."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from im_lightning import __version__
from im_lightning._lightning import PACKAGE, Trainer
from im_lightning._utils.files import plain
from im_lightning._utils.hashing import digest_json, digest_strings
from im_lightning.indicators.transforms import basis_means, mean_phi, weighted_mean
from im_lightning.ledger.record import MERGED, RunRecord, now
from im_lightning.models.cost import base_parameters
from im_lightning.models.fingerprint import checkpoint_identity
from im_lightning.sampling.rows import source_phi_means, source_shares
from im_lightning.training.datamodule import InstructMiningDataModule
from im_lightning.training.module import InstructTuningModule
from im_lightning.training.run.encoded_pool import base_model_name

_PACKAGES = ("torch", "transformers", "peft", PACKAGE.replace("_", "-").replace(".pytorch", ""))


def build_record(
    trainer: Trainer,
    module: Any,
    datamodule: InstructMiningDataModule,
    run_id: str,
    created: str,
    seconds: float,
    exposures: np.ndarray,
    evaluation: Mapping[str, Mapping[str, Any]],
    status: str,
    note: str = "",
) -> RunRecord:
    """The record of a run, at the end of its fit; fields are explained at `RunRecord`.

    `exposures` int [N] says how often each row was trained on, over all ranks, and `seconds` are over resumes. The
    module's `describe()` gives its part of the regime where there is one.
    """
    told = datamodule.describe()
    table, scored, seen = datamodule.table, datamodule.scored, np.flatnonzero(exposures)
    means: dict[str, Any] = {"indicator_means": {}, "phi_means": {}, "transforms": {}, "keys": {}}
    if table is not None and scored is not None:
        means = {
            "indicator_means": {n: weighted_mean(table.values[n], exposures) for n in table.indicators},
            "phi_means": mean_phi(table, scored.transforms, exposures),
            "transforms": {name: t.to_json() for name, t in scored.transforms.items()},
            "basis_means": basis_means(table, scored.transforms, scored.knots, exposures),
            "source_phi_means": source_phi_means(table, scored.transforms, exposures),
            "keys": {name: table.keys[name] for name in table.indicators if name in table.keys},
        }
    regime, weights = run_regime(trainer, module, datamodule), dict(told["weights"])
    if datamodule.rule is not None and table is not None and other_base(module, datamodule) is not None:
        weights |= {"forced": forced} if (forced := datamodule.rule.forced(table, regime)) else {}
    ids = datamodule.pool.ids
    chosen = datamodule.rows if datamodule.rows is not None else seen
    subset = {
        **told["design"],
        "digest": subset_digest(ids, chosen),
        "size": told["regime"]["subset_size"],
        "rows_seen": len(seen),
        "exposures": int(exposures.sum()),
        "source_shares": source_shares(datamodule.pool.sources, exposures),
    }
    return RunRecord(
        run_id=run_id,
        status=status,
        purpose=told["purpose"],
        created=created,
        subset=plain(subset),
        pool_digest=told["pool_digest"],
        evaluation=plain(dict(evaluation)),
        regime=plain(regime),
        tokens=int((datamodule.encoded.tokens(seen) * exposures[seen]).sum()),
        steps=int(trainer.global_step),
        seeds={"training": _global_seed(), **told["seeds"]},
        seconds=round(seconds, 3),
        numerics=plain(run_numerics(trainer, module)),
        compute=plain(run_compute(module, datamodule, seen, exposures)),
        versions=_versions(),
        loggers=logger_ids(trainer),
        weights=plain(weights),
        note=note,
        **means,
    )


def subset_digest(ids: Sequence[str], rows: Iterable[int]) -> str:
    """Digest of the rows of a subset, whatever their order."""
    return digest_strings(sorted(ids[row] for row in rows))


def merged_record(
    run_id: str,
    shares: Mapping[str, float],
    parts: Mapping[str, RunRecord],
    subset_size: int,
    s: float,
    evaluation: Mapping[str, Mapping[str, Any]],
    seconds: float,
) -> RunRecord:
    """The record of a merged run: that of a run of `subset_size` rows drawn from blocks in these shares, but for what
    it was not: trained. Its means are Σ shares · means of the blocks (`parts`, their records)."""
    kept = [(share, parts[name]) for name, share in shares.items() if share > 0]
    first = kept[0][1]

    def mixed(field: str) -> dict[str, float]:
        return {n: sum(a * getattr(r, field)[n] for a, r in kept) for n in getattr(first, field)}

    hats = {
        name: {"knots": one["knots"], "means": sum(a * np.array(r.basis_means[name]["means"]) for a, r in kept)}
        for name, one in first.basis_means.items()
    }
    parted = {
        source: {n: sum(a * r.source_phi_means.get(source, {}).get(n, 0.0) for a, r in kept) for n in first.phi_means}
        for source in sorted({source for _, r in kept for source in r.source_phi_means})
        if all(r.source_phi_means for _, r in kept)
    }
    names = sorted({source for _, r in kept for source in r.subset["source_shares"]})
    sources = {n: sum(a * r.subset["source_shares"].get(n, 0.0) for a, r in kept) for n in names}
    blocks = {name: {"digest": parts[name].subset["digest"], "run_id": parts[name].run_id} for name in shares}
    made = {"kind": MERGED, "alpha": dict(shares), "s": s, "blocks": blocks}
    subset = {"size": subset_size, "blocks": first.subset["blocks"], "shares_wanted": dict(shares)}
    subset |= {"digest": digest_json(made), "source_shares": sources, "exclude": first.subset.get("exclude")}
    losses = {n: {**e, "base_loss": first.evaluation[n].get("base_loss")} for n, e in evaluation.items()}
    finite = all(np.isfinite(e["loss"]) for e in evaluation.values())
    return RunRecord(
        run_id=run_id,
        status="complete" if finite else "incomplete",
        purpose="designed",
        created=now(),
        subset=plain(subset),
        pool_digest=first.pool_digest,
        indicator_means=mixed("indicator_means"),
        phi_means=mixed("phi_means"),
        transforms=first.transforms,
        basis_means=plain(hats),
        source_phi_means=plain(parted),
        keys=first.keys,
        evaluation=plain(losses),
        regime={**first.regime, "subset_size": subset_size},
        seeds={"training": first.seeds.get("training")},
        seconds=round(seconds, 3),
        numerics=first.numerics,
        compute={**first.compute, "tokens_trained": 0} if first.compute else {},
        versions=_versions(),
        note="" if finite else "the evaluation loss is not finite",
        made=plain(made),
    )


def run_regime(trainer: Trainer, module: Any, datamodule: InstructMiningDataModule) -> dict[str, Any]:
    """What must be equal for runs to share a rule."""
    h, base = datamodule.hparams, other_base(module, datamodule)
    describe = getattr(module, "describe", None)
    out = {**datamodule.regime(), "method": type(module).__name__, **(describe() if callable(describe) else {})}
    if base is not None:
        out["base_model"] = base_model_name(checkpoint_identity(*base, cache_dir=h["cache_dir"]))
    out["epochs"] = trainer.max_epochs
    if trainer.max_steps is not None and trainer.max_steps > 0:
        out["max_steps"] = trainer.max_steps
    if isinstance(trainer.limit_train_batches, int) or trainer.limit_train_batches < 1.0:  # 1 is a batch, 1.0 all
        out["limit_train_batches"] = trainer.limit_train_batches
    out["rows_per_step"] = h["batch_size"] * trainer.accumulate_grad_batches * trainer.world_size
    return out


def other_base(module: Any, datamodule: InstructMiningDataModule) -> tuple[str, str | None] | None:
    """Model and revision that an `InstructTuningModule` trains, where the data module names others."""
    if not isinstance(module, InstructTuningModule):
        return None
    here, there = module.hparams, datamodule.hparams
    own = str(here.get("model")), here.get("revision")
    return None if own == (str(there["model"]), there["revision"]) else own


def run_compute(module: Any, data: InstructMiningDataModule, seen: np.ndarray, exposures: np.ndarray) -> dict[str, Any]:
    """What the run's operations are reckoned from (`models.cost`)."""
    base = other_base(module, data) or (data.coding.name, data.hparams["revision"])
    return {
        "parameters": base_parameters(*base),
        "tokens_trained": int((data.encoded.lengths(seen) * exposures[seen]).sum()),
        "tokens_evaluated": sum(one.tokens for one in data.eval_sets.values()),
    }


def run_numerics(trainer: Trainer, module: Any) -> dict[str, Any]:
    """What changes a run's numbers by rounding alone: the device, and the module's `numerics()` or the Trainer's
    precision."""
    own = getattr(module, "numerics", None)
    told = own() if callable(own) else {"precision": str(trainer.precision)}
    return {"device": trainer.strategy.root_device.type, **told}


def logger_ids(trainer: Trainer) -> dict[str, Any]:
    """Logger class → where its run is: wandb's run id, a folder, or its version."""
    out: dict[str, Any] = {}
    for logger in trainer.loggers:
        where = getattr(logger, "log_dir", None) or getattr(logger, "version", None)
        out[type(logger).__name__] = None if where is None else str(where)
    return out


def _global_seed() -> int | None:
    seed = os.environ.get("PL_GLOBAL_SEED")  # where Lightning's seed_everything leaves it
    return int(seed) if seed is not None and seed.lstrip("-").isdigit() else None


def _versions() -> dict[str, str]:
    out = {"im_lightning": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        module = sys.modules.get(name.replace("-", "_"))
        found = getattr(module, "__version__", None)
        if found is None:
            try:
                found = version(name)
            except PackageNotFoundError:
                continue
        out[name] = str(found)
    return out
