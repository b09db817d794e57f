"""InstructMining for PyTorch Lightning: score instruction data, learn which of it helps, finetune on weights.

Public names load on first use, so that `import im_lightning` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "DataError": "errors",
    "Example": "data.example",
    "IndicatorLossStatistics": "training.loss_statistics.metric",
    "Indicator": "indicators.base",
    "InstructMiningCallback": "training.callback",
    "InstructMiningDataModule": "training.datamodule",
    "InstructMiningError": "errors",
    "InstructTuningModule": "training.module",
    "LinearRule": "rule.linear_rule",
    "Message": "data.example",
    "Missing": "indicators.base",
    "QualityWeightedSampler": "sampling.draws.sampler",
    "RequestError": "errors",
    "ResumableDataLoader": "sampling.draws.sampler",
    "RunLedger": "ledger.ledger",
    "RunRecord": "ledger.ledger",
    "ScoreTable": "data.score_table",
    "encode_examples": "data.tokenization",
    "fit_rule": "rule.fit",
    "join_external": "data.external_scores",
    "load_examples": "data.loading",
    "load_rule": "rule.published",
    "micro_batched_loss": "models.batching",
    "prompt_groups": "data.overlap.keys",
    "quality_weights": "sampling.weights.quality_weights",
    "register_indicator": "indicators.base",
    "resolve_template": "data.tokenization",
    "response_nll": "models.likelihood",
    "score_examples": "scoring.api",
    "select_subset": "sampling.selection.select",
    "targets_of": "sampling.selection.targeted",
    "to_dataset": "data.hf",
}

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from im_lightning.data.example import Example as Example
    from im_lightning.data.example import Message as Message
    from im_lightning.data.external_scores import join_external as join_external
    from im_lightning.data.hf import to_dataset as to_dataset
    from im_lightning.data.loading import load_examples as load_examples
    from im_lightning.data.overlap.keys import prompt_groups as prompt_groups
    from im_lightning.data.score_table import ScoreTable as ScoreTable
    from im_lightning.data.tokenization import encode_examples as encode_examples
    from im_lightning.data.tokenization import resolve_template as resolve_template
    from im_lightning.errors import DataError as DataError
    from im_lightning.errors import InstructMiningError as InstructMiningError
    from im_lightning.errors import RequestError as RequestError
    from im_lightning.indicators.base import Indicator as Indicator
    from im_lightning.indicators.base import Missing as Missing
    from im_lightning.indicators.base import register_indicator as register_indicator
    from im_lightning.ledger.ledger import RunLedger as RunLedger
    from im_lightning.ledger.ledger import RunRecord as RunRecord
    from im_lightning.models.batching import micro_batched_loss as micro_batched_loss
    from im_lightning.models.likelihood import response_nll as response_nll
    from im_lightning.rule.fit import fit_rule as fit_rule
    from im_lightning.rule.linear_rule import LinearRule as LinearRule
    from im_lightning.rule.published import load_rule as load_rule
    from im_lightning.sampling.draws.sampler import QualityWeightedSampler as QualityWeightedSampler
    from im_lightning.sampling.draws.sampler import ResumableDataLoader as ResumableDataLoader
    from im_lightning.sampling.selection.select import select_subset as select_subset
    from im_lightning.sampling.selection.targeted import targets_of as targets_of
    from im_lightning.sampling.weights.quality_weights import quality_weights as quality_weights
    from im_lightning.scoring.api import score_examples as score_examples
    from im_lightning.training.callback import InstructMiningCallback as InstructMiningCallback
    from im_lightning.training.datamodule import InstructMiningDataModule as InstructMiningDataModule
    from im_lightning.training.loss_statistics.metric import IndicatorLossStatistics as IndicatorLossStatistics
    from im_lightning.training.module import InstructTuningModule as InstructTuningModule


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
