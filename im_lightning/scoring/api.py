"""`score_examples`: the public way from examples to a table of indicators.

Where the passes over the examples run: in this process, or on Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from im_lightning._utils.progress import log
from im_lightning.data.example import Example
from im_lightning.data.score_table import ScoreTable
from im_lightning.errors import RequestError, message
from im_lightning.indicators.base import get_indicators
from im_lightning.scoring.settings import Setup

if TYPE_CHECKING:
    import torch

    from im_lightning.data.score_table import ScoreTable
    from im_lightning.scoring.plan import Plan
    from im_lightning.scoring.report import Coverage


TEXT_INDICATORS = ("mtld",)
BASE_MODEL_INDICATORS = ("length_input", "length_output", "mtld", "ppl", "ppl_unconditional", "ifd", "knn_6")
REWARD_INDICATORS = ("reward",)
UNIEVAL_INDICATORS = ("naturalness", "coherence", "understandability")


def default_indicators(
    model: str | None = None,
    embedding_model: str | None = None,
    reward_model: str | None = None,
    unieval_model: str | None = None,
) -> list[str]:
    """The indicators of the text, and those whose model was named.

    >>> default_indicators()
    ['mtld']
    """
    names = list(BASE_MODEL_INDICATORS if model is not None else TEXT_INDICATORS)
    if model is None and embedding_model is not None:
        names.append("knn_6")
    judged = (REWARD_INDICATORS, reward_model), (UNIEVAL_INDICATORS, unieval_model)
    return [*names, *(name for some, named in judged if named is not None for name in some)]


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
        template: "auto" (the tokenizer's chat template, else Alpaca's), "alpaca" or "chat".
        max_length: Tokens per row; longer rows are cut, and counted in the report.
        batch_tokens: Tokens per batch, padding included; by default what suits the device.
        precision: "auto", "fp32" or "bf16".
        device: "auto", or a torch device.
        cache_dir: The score store; by default $IM_LIGHTNING_CACHE or ~/.cache/im_lightning.
        reward_model: A one-label sequence classifier (folder or hub id) for `reward`.
        unieval_model: A T5-type UniEval evaluator (folder or hub id) for naturalness, coherence, understandability.
        knn_reference: Data (file, folder or id) or examples among which `knn_<i>` looks for neighbours, instead of the
            pool itself: values then do not depend on the pool. An example is not its own neighbour there either.
        engine: "local", or "ray": passes over the examples run on a Ray cluster, neighbours and the table here.
        ray_address: Of a running cluster; by default the one this process uses, $RAY_ADDRESS, or this machine's cores.
        ray_workers: Copies of each model; by default one per GPU of the cluster, or per CPU core if it has none.

    Returns:
        One row per example, in order; NaN with a reason where there is no value.

    Raises:
        RequestError: an unknown indicator, a model that is missing or unusable, a wrong argument.
        InstructMiningError: the store cannot be written, or the work on Ray failed.
    """
    from im_lightning.scoring.plan import Plan

    where = Where(engine, ray_address, ray_workers, device)
    setup = make_setup(
        model, revision, embedding_model, template, max_length, batch_tokens, precision, where.device_here, cache_dir,
        reward_model, unieval_model,
    )  # fmt: skip
    if indicators is None:
        indicators = default_indicators(setup.model, setup.embedding_model, setup.reward_model, setup.unieval_model)
    table, coverage = where.execute(Plan(examples, get_indicators(indicators), setup, load_reference(knn_reference)))
    for line in coverage.lines():
        log(line)
    return table


def load_reference(reference: str | os.PathLike[str] | Sequence[Example] | None) -> Sequence[Example] | None:
    """The examples named by `knn_reference`.

    Raises:
        RequestError: there is no such data; DataError: it cannot be read.
    """
    if reference is None or not isinstance(reference, str | os.PathLike):
        return reference
    from im_lightning.data.loading import load_examples

    return load_examples(reference)


def make_setup(
    model: str | os.PathLike[str] | None,
    revision: str | None,
    embedding_model: str | os.PathLike[str] | None,
    template: str,
    max_length: int,
    batch_tokens: int | None,
    precision: str,
    device: str | torch.device,
    cache_dir: str | os.PathLike[str] | None,
    reward_model: str | os.PathLike[str] | None = None,
    unieval_model: str | os.PathLike[str] | None = None,
) -> Setup:
    """The arguments of `score_examples` in one value; checks what can be checked at once."""
    from im_lightning.data.tokenization import MIN_LENGTH, TEMPLATES
    from im_lightning.models.device import PRECISIONS

    for what, value, known in (("template", template, TEMPLATES), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise RequestError(message(f"{what} {value!r}", "is not known", f"give one of {', '.join(known)}"))
    if max_length < MIN_LENGTH:
        raise RequestError(message(f"max_length {max_length}", "is too short", f"give at least {MIN_LENGTH} tokens"))
    if batch_tokens is not None and batch_tokens < 1:
        raise RequestError(message(f"batch_tokens {batch_tokens}", "is less than one token", "give 1 or more"))
    return Setup(
        model=None if model is None else os.fspath(model),
        revision=revision,
        embedding_model=None if embedding_model is None else os.fspath(embedding_model),
        template=template,
        max_length=max_length,
        batch_tokens=batch_tokens,
        precision=precision,
        device=device,
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        reward_model=None if reward_model is None else os.fspath(reward_model),
        unieval_model=None if unieval_model is None else os.fspath(unieval_model),
    )


ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Where:
    """The engine of a scoring; checks its arguments, so that a wrong one is refused before any work.

    Args:
        engine: "local" or "ray".
        ray_address: Of a running Ray cluster.
        ray_workers: Copies of each model on Ray.
        device: What was asked for, of the workers where there are some.

    Raises:
        RequestError: there is no such engine, Ray is not installed, or its arguments do not fit.
    """

    engine: str = "local"
    ray_address: str | None = None
    ray_workers: int | None = None
    device: Any = "auto"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            remedy = f"give one of {', '.join(ENGINES)}"
            raise RequestError(message(f"engine {self.engine!r}", "is not known", remedy))
        if self.engine == "local":
            for name, value in (("ray_address", self.ray_address), ("ray_workers", self.ray_workers)):
                if value is not None:
                    flag = f"--{name.replace('_', '-')} {value}"
                    raise RequestError(message(flag, "the engine is local", "add --engine ray (engine='ray')"))
            return
        if self.ray_workers is not None and self.ray_workers < 1:
            cause = "is less than one worker"
            raise RequestError(message(f"--ray-workers {self.ray_workers}", cause, "give 1 or more"))
        if str(self.device).split(":")[0] not in ("auto", "cpu", "cuda") or ":" in str(self.device):
            cause = "Ray's workers take whichever GPU Ray gives them"
            raise RequestError(message(f"--device {self.device}", cause, "name auto, cpu or cuda"))
        from im_lightning.scoring.ray_cluster.engine import check_ray

        check_ray()

    @property
    def device_here(self) -> Any:
        """For what this process computes itself (neighbours): the device asked for, unless only the workers have it."""
        if self.engine == "local" or str(self.device) != "cuda":
            return self.device
        import torch

        return self.device if torch.cuda.is_available() else "auto"

    def execute(self, plan: Plan) -> tuple[ScoreTable, Coverage]:
        """As `engine.execute`; Ray is not started where everything is in the store."""
        from im_lightning.scoring.plan import execute

        if self.engine == "local" or not plan.passes:
            return execute(plan)
        from im_lightning.scoring.ray_cluster.engine import ray_engine

        with ray_engine(self.ray_address, self.device, self.ray_workers) as ray:
            return execute(plan, ray.run)

    def estimate(self, plan: Plan) -> list[str]:
        """What the work would take, for a person."""
        from im_lightning.scoring.estimate import describe, estimate

        if self.engine == "local" or not plan.passes:
            return describe(plan, *estimate(plan))
        from im_lightning.scoring.ray_cluster.engine import ray_engine

        with ray_engine(self.ray_address, self.device, self.ray_workers) as ray:
            return describe(plan, *ray.estimate(plan))
