"""`score_examples`: the public way from examples to a table of indicators; the passes run here, or on Ray."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from im_lightning._utils.progress import log
from im_lightning.data.example import Example
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Encoding, Reading
from im_lightning.indicators.base import get_indicators
from im_lightning.indicators.built_in import default_names
from im_lightning.scoring.estimate import describe, estimate
from im_lightning.scoring.passes.targets import UNNAMED, check_targets
from im_lightning.scoring.plan import ScoringPlan, execute
from im_lightning.scoring.report import Coverage
from im_lightning.scoring.settings import Engine, Numerics, ScorerModels, Setup

if TYPE_CHECKING:
    import torch

_READING = Reading()


def default_indicators(setup: Setup) -> list[str]:
    """The indicators of the text, and those whose model was named."""
    models = {"model": setup.encoding.model, **asdict(setup.models)}
    models["targets"] = models["targets"] or setup.target_rows
    return default_names([argument for argument, named in models.items() if named is not None])


def score_examples(
    examples: Sequence[Example],
    indicators: Sequence[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    embedding_model: str | os.PathLike[str] | None = None,
    template: str = "auto",
    max_length: int = 1024,
    batch_tokens: int | None = None,
    precision: str = "auto",
    device: str | torch.device = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    reward_model: str | os.PathLike[str] | None = None,
    unieval_model: str | os.PathLike[str] | None = None,
    knn_reference: str | os.PathLike[str] | Sequence[Example] | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    ray_workers: int | None = None,
    embed: str = "both",
    targets: str | os.PathLike[str] | Sequence[Example] | None = None,
) -> ScoreTable:
    """Scores examples with indicators; computes only what the score store lacks.

    Each model is loaded once, serves all indicators that read it, and is freed before the next. An example that occurs
    several times is scored once. What is finished is kept when the work is interrupted. A coverage report goes to
    standard error.

    Args:
        examples: The pool, N rows.
        indicators: Names, such as "ppl", "mtld", "knn_6"; by default those of the text and those whose model is named.
        model: Base model (folder or hub id) of lengths, perplexities, ifd, and of kNN without embedding_model.
        revision: Branch, tag or commit of a hub id.
        embedding_model: A sentence-transformers folder or hub id, for `knn_<i>`.
        template: "auto" (the tokenizer's chat template, else Alpaca's), "alpaca", "chat", "none", or a NAME.jinja.
        max_length: Tokens per row; longer rows are cut, and counted in the report.
        batch_tokens: Tokens per batch, padding included; by default what suits the device.
        precision: "auto" (what suits the device; stored values of either serve), "fp32" (those in bf16 do not), "bf16".
        device: "auto", or a torch device.
        cache_dir: The score store; by default $IM_LIGHTNING_CACHE or ~/.cache/im_lightning.
        reward_model: A one-label sequence classifier (folder or hub id) for `reward`.
        unieval_model: A T5-type UniEval evaluator (folder or hub id) for naturalness, coherence, understandability.
        knn_reference: Data (file, folder or id) or examples among which `knn_<i>` looks for neighbours, instead of the
            pool itself: values then do not depend on the pool. An example is not its own neighbour there either.
        engine: "local", or "ray": passes over the examples run on a Ray cluster, neighbours and the table here.
        ray_address: Of a running cluster; by default the one this process uses, $RAY_ADDRESS, or this machine's cores.
        ray_workers: Copies of each model; by default one per GPU of the cluster, or per CPU core if it has none.
        embed: What `knn_<i>` compares: "both" (prompt and response) or "response".
        targets: Data or examples of the evaluation set's kind for `loss_drop` and `gradient_similarity`, none of them
            in the pool, nor in a set that is evaluated on.

    Returns:
        One row per example, in order; NaN with a reason where there is no value.

    Raises:
        RequestError: an unknown indicator, a model that is missing or unusable, a wrong argument.
        InstructMiningError: the store cannot be written, or the work on Ray failed.
    """
    named, rows = (targets, None) if targets is None or isinstance(targets, str | os.PathLike) else (None, targets)
    scorers = ScorerModels(_text(embedding_model), _text(reward_model), _text(unieval_model), None, embed, _text(named))
    setup = Setup(
        Encoding(_text(model), revision, template, max_length, _text(cache_dir)),
        scorers,
        Numerics(batch_tokens, precision, str(device)),
        Engine(engine, ray_address, ray_workers),
        target_rows=rows,
    )
    return score(examples, indicators, setup, load_reference(knn_reference))


def score(
    examples: Sequence[Example],
    indicators: Sequence[str] | None,
    setup: Setup,
    reference: Sequence[Example] | None = None,
) -> ScoreTable:
    """As `score_examples`; without `reference`, neighbours are looked for among `setup.models.knn_reference`."""
    found = get_indicators(default_indicators(setup) if indicators is None else indicators)
    reference = load_reference(setup.models.knn_reference, setup.reading) if reference is None else reference
    if setup.targets is not None:
        check_targets(setup, {UNNAMED: examples})
    table, coverage = execute_plan(ScoringPlan(examples, found, setup, reference))
    for line in coverage.lines():
        log(line)
    return table


def execute_plan(plan: ScoringPlan) -> tuple[ScoreTable, Coverage]:
    """As `plan.execute`, by the engine of its set-up; Ray is not started where everything is in the store."""
    if plan.setup.engine.engine == "local" or not plan.passes:
        return execute(plan)
    from im_lightning.scoring.ray_cluster.engine import ray_engine

    with ray_engine(plan.setup) as ray:
        return execute(plan, ray.run)


def estimate_plan(plan: ScoringPlan) -> tuple[dict[str, Any], str]:
    """What the work would take: its numbers, and the same for a person."""
    plan.check()
    if plan.setup.engine.engine == "local" or not plan.passes:
        found, memory = estimate(plan)
    else:
        from im_lightning.scoring.ray_cluster.engine import ray_engine

        with ray_engine(plan.setup) as ray:
            found, memory = ray.estimate(plan)
    numbers = {"rows": len(plan.pool.codes), "distinct": len(plan.pool), "passes": [asdict(one) for one in found]}
    total = {"seconds": sum(one.seconds for one in found), "memory_bytes": memory}
    return {**numbers, **total}, "\n".join(describe(plan, found, memory))


def load_reference(
    reference: str | os.PathLike[str] | Sequence[Example] | None, reading: Reading = _READING
) -> Sequence[Example] | None:
    """The examples named by `knn_reference`; a RequestError where there is no such data, a DataError for a bad row."""
    if reference is None or not isinstance(reference, str | os.PathLike):
        return reference
    from im_lightning.data.loading import load_examples

    return load_examples(reference, **asdict(reading))


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)
