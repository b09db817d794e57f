"""How to score, and what the values then depend on: identities, which must match, and numerics, which may differ.

Identities are worked out without loading any model: weight hashes are remembered (`models.fingerprint`), and so is what
a template comes down to for a tokenizer, which otherwise would have to be loaded to find out.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from im_lightning._utils.files import write_json
from im_lightning._utils.hashing import digest_bytes, digest_json
from im_lightning._utils.optional import require
from im_lightning.data import chat_template, prompt_templates, tokenization
from im_lightning.data.settings import Encoding, Reading
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.indicators.base import Indicator, get_indicators, with_parts
from im_lightning.models.checkpoint import hidden_width
from im_lightning.models.device import Precision, check_precision, resolve_device, resolve_precision
from im_lightning.models.embedding import is_plain_causal_lm
from im_lightning.models.fingerprint import cache_root, checkpoint_identity, folder_identity, tokenizer_identity

if TYPE_CHECKING:
    import torch

    from im_lightning.data.example import Example
    from im_lightning.scoring.columns import DistinctPool

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
ENGINES = ("local", "ray")
EMBED = ("both", "response")
_TEMPLATES = (chat_template, prompt_templates, tokenization)
_BASE_MODEL = ("tokens", "conditional", "unconditional", "tuned", "gradient")
_TARGETS = ("tuned", "gradient")
_SCORERS = {"reward": ("reward_model", "a reward model"), "unieval": ("unieval_model", "a UniEval model")}
_READING = Reading()


@dataclass(frozen=True)
class ScorerModels:
    """What scores beside the base model."""

    embedding_model: str | None = None
    """sentence-transformers model for knn_<i>; without it, mean hidden states of the base model."""
    reward_model: str | None = None
    """One-label sequence classifier for reward; by default the paper's under a published rule."""
    unieval_model: str | None = None
    """T5-type UniEval evaluator for naturalness, coherence, understandability; likewise."""
    knn_reference: str | None = None
    """Data among which knn_<i> looks for neighbours, instead of the rows scored."""
    embed: str = "both"
    """What knn_<i> compares: both (prompt and response) or response."""
    targets: str | None = None
    """Rows of the evaluation set's kind, for loss_drop and gradient_similarity; none of the pool's, nor of a set's."""

    def __post_init__(self) -> None:
        if self.embed not in EMBED:
            raise RequestError(message(f"embed {self.embed!r}", "is not known", f"use one of {', '.join(EMBED)}"))


@dataclass(frozen=True)
class Numerics:
    """In what batches and number format to calculate, and where."""

    batch_tokens: int | None = None
    """Tokens per batch, padding included; by default what suits the device."""
    precision: str = "auto"
    """auto (what suits the device; stored values of either serve), fp32 (stored values in bf16 do not), or bf16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if self.batch_tokens is not None and self.batch_tokens < 1:
            what = f"batch_tokens {self.batch_tokens}"
            raise RequestError(message(what, "is less than one token", "give 1 or more"))


@dataclass(frozen=True)
class Engine:
    """Where the passes over the examples run: in this process, or on Ray.

    Raises:
        RequestError: there is no such engine, Ray is not installed, or its arguments do not fit.
    """

    engine: str = "local"
    """local, or ray: on a Ray cluster (needs the extra ray)."""
    ray_address: str | None = None
    """Running Ray cluster; by default $RAY_ADDRESS, else this machine's cores."""
    ray_workers: int | None = None
    """Copies of each model on Ray; by default one per GPU, or per CPU core where there is none."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            remedy = f"give one of {', '.join(ENGINES)}"
            raise RequestError(message(f"engine {self.engine!r}", "is not known", remedy))
        if self.engine == "local":
            for name, value in (("ray_address", self.ray_address), ("ray_workers", self.ray_workers)):
                if value is not None:
                    flag = f"--{name.replace('_', '-')} {value}"
                    raise RequestError(message(flag, "the engine is local", "add --engine ray (engine='ray')"))
        elif self.ray_workers is not None and self.ray_workers < 1:
            cause = "is less than one worker"
            raise RequestError(message(f"--ray-workers {self.ray_workers}", cause, "give 1 or more"))


@dataclass(frozen=True)
class Setup:
    """How to score. Identity and numerics of an indicator under it are JSON-like; each is worked out once.

    Raises:
        RequestError: there is no such template, the length is too short, or engine and device do not fit.
    """

    encoding: Encoding = field(default_factory=Encoding)
    models: ScorerModels = field(default_factory=ScorerModels)
    numerics: Numerics = field(default_factory=Numerics)
    engine: Engine = field(default_factory=Engine)
    long_rows: int | None = None  # rows whose text is longer than the embedding model takes; None: not looked yet
    target_rows: Sequence[Example] | None = None  # by default those that models.targets names
    reading: Reading = _READING  # of target rows and of a reference
    long_own: int = 0  # of `long_rows` those of the pool itself, without a reference's
    structured: bool = False  # whether answers of the pool hold calls or reasoning, which count in their lengths

    def __post_init__(self) -> None:
        tokenization.check_template(self.encoding.template)
        tokenization.check_length(self.encoding.max_length)
        if self.engine.engine == "ray":
            device = self.numerics.device
            if device.split(":")[0] not in ("auto", "cpu", "cuda") or ":" in device:
                cause = "Ray's workers take whichever GPU Ray gives them"
                raise RequestError(message(f"--device {device}", cause, "name auto, cpu or cuda"))
            check_ray()

    @cached_property
    def root(self) -> Path:
        """The score store."""
        return cache_root(self.encoding.cache_dir)

    @cached_property
    def targets(self) -> DistinctPool | None:
        """The target rows; None where none are named, a RequestError where there are none, a DataError for bad ones."""
        from im_lightning.data.loading import load_examples
        from im_lightning.scoring.columns import DistinctPool

        rows = self.target_rows
        if rows is None and self.models.targets is not None:
            refuses = None if self.encoding.model is None else self.tokenizer_and_template()[1].refusal
            rows = load_examples(self.models.targets, refuses=refuses, **asdict(self.reading))
        if rows is not None and not rows:
            raise RequestError(message("the targets", "they have no rows", "name data with rows in --targets"))
        return None if rows is None else DistinctPool(rows)

    @cached_property
    def torch_device(self) -> torch.device:
        """Where this process calculates: the device asked for, unless only Ray's workers have it."""
        device = self.numerics.device
        if self.engine.engine == "ray" and device == "cuda":
            import torch

            device = device if torch.cuda.is_available() else "auto"
        return resolve_device(device)

    @cached_property
    def number_format(self) -> Precision:
        """Of the base model."""
        return self.format_of(self.encoding.model, self.encoding.revision)

    def format_of(self, model: str | None, revision: str | None = None) -> Precision:
        """The number format of a model: "auto" looks at its width."""
        width = 0
        if self.numerics.precision == "auto" and self.torch_device.type == "cpu" and model is not None:
            width = hidden_width(model, revision)
        return resolve_precision(self.numerics.precision, self.torch_device, width)

    @property
    def tokens_per_batch(self) -> int:
        return self.numerics.batch_tokens or BATCH_TOKENS.get(self.torch_device.type, BATCH_TOKENS["cpu"])

    def require_models(self, indicators: Iterable[Indicator]) -> None:
        """Validates that the models which the indicators need were named; the RequestError names what is missing."""
        indicators = list(indicators)
        base = [i.name for i in indicators if any(need in _BASE_MODEL for need in i.needs)]
        if base and self.encoding.model is None:
            remedy = "name one with --model (model=), or leave these indicators out"
            raise RequestError(message(", ".join(base), "a base model is needed and none was named", remedy))
        vectors = [i.name for i in indicators if "embedding" in i.needs]
        if vectors and self.encoding.model is None and self.models.embedding_model is None:
            remedy = "name one with --embedding-model (embedding_model=) or --model (model=)"
            raise RequestError(message(", ".join(vectors), "an embedding model or base model is needed", remedy))
        aimed = [i.name for i in indicators if any(need in _TARGETS for need in i.needs)]
        if aimed and self.models.targets is None and self.target_rows is None:
            remedy = "name some of the evaluation set's kind with --targets (targets=), or leave these indicators out"
            raise RequestError(message(", ".join(aimed), "target rows are needed and none were named", remedy))
        for need, (argument, kind) in _SCORERS.items():
            scored = [i.name for i in indicators if need in i.needs]
            if scored and getattr(self.models, argument) is None:
                remedy = f"name one with --{argument.replace('_', '-')} ({argument}=), or leave these indicators out"
                raise RequestError(message(", ".join(scored), f"{kind} is needed and none was named", remedy))

    def identity_of(self, indicator: Indicator) -> dict[str, Any]:
        """Name, version, and the identity of all that the values depend on."""
        parts: dict[str, Any] = {"indicator": indicator.name, "version": indicator.version}
        for need in indicator.needs:
            parts.update(self._identity_of_need(need))
        if self.structured and "tokens" in indicator.needs and indicator.name != "length_input":
            own = self.encoding.template not in tokenization.TEMPLATES  # else the tokenizer says how they are written
            parts["calls and reasoning"] = self.template if own else "counted"
        if indicator.derived_from:
            parts["from"] = {one.name: self.identity_of(one) for one in get_indicators(indicator.derived_from)}
        return parts

    def _identity_of_need(self, need: str) -> dict[str, Any]:
        if need == "tokens":
            return {"tokenizer": tokenizer_identity(self.checkpoint)}
        if need == "conditional":
            return self._conditional
        if need == "unconditional":
            named = {"template": self.template, "chat-eos": "eos"}.get(self._rendering["start"])
            own = {"start": named} if named else {}  # what every value once started from has no name
            if self.encoding.template == "none":  # it takes special tokens at the end for no part of the answer
                own["completion"] = "without its end"
            return {"model": self.checkpoint, "max_length": self.encoding.max_length, **own}
        if need == "embedding":
            return {"embedding": self.embedding}
        if need in _TARGETS:
            made = {"gradient": self.gradient} if need == "gradient" else {**self._conditional, **self._recipe}
            return {**made, "targets": None if self.targets is None else self.targets.digest()}
        if need in _SCORERS:
            argument = _SCORERS[need][0]
            if argument not in self._scorers:
                self._scorers[argument] = checkpoint_identity(getattr(self.models, argument), cache_dir=self.root)
            return {argument: self._scorers[argument]}
        return {}

    @property
    def _conditional(self) -> dict[str, Any]:
        return {"model": self.checkpoint, "template": self.template, "max_length": self.encoding.max_length}

    @property
    def _recipe(self) -> dict[str, Any]:
        from im_lightning.models.low_rank import Recipe

        return {"finetune": asdict(Recipe())}

    @cached_property
    def gradient(self) -> dict[str, Any]:
        """Identity of the vector that stands for an example's gradient."""
        from im_lightning.models.row_gradients import DIMENSIONS, RANK

        kind = {"version": 1, "kind": "LoRA B at its start, sketched", "rank": RANK, "dimensions": DIMENSIONS}
        return {**kind, **self._conditional}

    def of_vectors(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Identity and numerics of "embeddings" or "gradients"."""
        if name == "gradients":
            return {"gradient": self.gradient}, self.model_numerics
        return {"embedding": self.embedding}, self.embedding_numerics

    @cached_property
    def _scorers(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def embedding(self) -> dict[str, Any]:
        """Identity of the vector of an example."""
        own = {} if self.models.embed == "both" else {"text": self.models.embed}
        if self.models.embedding_model is None:
            return {"version": 1, "kind": "mean of the base model's last hidden states", **self._conditional, **own}
        model = folder_identity(self.models.embedding_model, cache_dir=self.root)
        own |= {"pooling": "mean"} if is_plain_causal_lm(self.models.embedding_model) else {}
        own |= {"long texts": "mean of parts by tokens"} if self.long_rows else {}
        return {"version": 1, "kind": "sentence-transformers", "model": model, **own}

    def measured(self, *pools: DistinctPool | None) -> Setup:
        """With `long_rows`: how many rows of these pools the embedding model cannot see whole, and `long_own`, how many
        of the first; counted once.

        Raises:
            RequestError: as `embedding.load_embedder`.
        """
        if self.models.embedding_model is None or self.long_rows is not None:
            return self
        there = [pool for pool in pools if pool is not None]
        asked = {"embedding": self.embedding, "pools": [pool.digest() for pool in there]}
        note = self.root / "long-texts" / f"{digest_json(asked)}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(note.read_text())
            own = known["own" if len(there) > 1 else "rows"]
            return replace(self, long_rows=int(known["rows"]), long_own=int(own))
        from im_lightning.models.embedding import embedding_text, load_embedder, long_texts

        embedder, counted = load_embedder(self.models.embedding_model), list[int]()
        for pool in there:
            long = long_texts(embedder, [embedding_text(one, self.models.embed) for one in pool.examples])
            counted.append(int(pool.counts()[long].sum()))
        found = {"rows": sum(counted), "own": counted[0]}
        with contextlib.suppress(InstructMiningError):
            write_json(note, {**asked, **found, "tokens": embedder.max_seq_length})
        return replace(self, long_rows=found["rows"], long_own=found["own"])

    @cached_property
    def checkpoint(self) -> dict[str, Any]:
        """Identity of the base model."""
        if self.encoding.model is None:
            raise RequestError(message("the base model", "none was named", "name one with --model (model=)"))
        return checkpoint_identity(self.encoding.model, self.encoding.revision, self.root)

    @property
    def template(self) -> str:
        """`Template.identity` of the template that `encoding.template` comes down to for this tokenizer."""
        return self._rendering["identity"]

    @cached_property
    def _rendering(self) -> dict[str, str]:
        """The template's identity, and what unconditional likelihoods start from; noted: tokenizers load slowly."""
        code = digest_bytes(*(Path(str(one.__file__)).read_bytes() for one in _TEMPLATES))
        own = tokenization.template_text(self.encoding.template)
        told = self.encoding.template if own is None else {"text": own}
        asked = {"tokenizer": tokenizer_identity(self.checkpoint), "template": told, "code": code}
        note = self.root / "templates" / f"{digest_json(asked)}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(note.read_text())
            return {"identity": str(known["identity"]), "start": str(known["start"])}
        tokenizer, template = self.tokenizer_and_template()
        found = {"identity": template.identity, "start": tokenization.unconditional_start(tokenizer, template)[1]}
        with contextlib.suppress(InstructMiningError):
            write_json(note, {**asked, **found})
        return found

    def tokenizer_and_template(self) -> tuple[Any, prompt_templates.Template]:
        """Of the base model, loaded anew."""
        from im_lightning.models.checkpoint import load_tokenizer

        tokenizer = load_tokenizer(str(self.encoding.model), self.encoding.revision)
        return tokenizer, tokenization.resolve_template(self.encoding.template, tokenizer)

    def numerics_of(self, indicator: Indicator) -> dict[str, Any]:
        """What can change the last digits of the values."""
        parts = with_parts(indicator) if indicator.derived_from else [indicator]
        needs = {need for one in parts for need in one.needs}
        if "embedding" in needs and self.models.embedding_model is not None:
            return self.embedding_numerics
        if needs & {"conditional", "unconditional", "embedding", *_TARGETS}:
            return self.model_numerics
        for need, (argument, _) in _SCORERS.items():
            if need in needs:
                return {**self._versions, "precision": self.format_of(getattr(self.models, argument)).name}
        return {"tokenizers": version("tokenizers")} if "tokens" in needs else {}

    @cached_property
    def model_numerics(self) -> dict[str, Any]:
        return {**self._versions, "precision": self.number_format.name}

    @cached_property
    def embedding_numerics(self) -> dict[str, Any]:
        if self.models.embedding_model is None:
            return self.model_numerics
        versions = {name: version(name) for name in ("torch", "transformers", "sentence-transformers")}
        return {"precision": "fp32", "device": self.torch_device.type, **versions}

    @cached_property
    def _versions(self) -> dict[str, Any]:
        device = self.torch_device.type
        return {"device": device, "torch": version("torch"), "transformers": version("transformers")}


def check_ray() -> None:
    """Validates that Ray is installed; the RequestError names the extra to install."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    require("ray.data", "ray", "engine 'ray'", "use the engine local")
