"""What a score depends on: the identity of its inputs, which must match, and its numerics, which may differ.

Identities are worked out without loading any model: weight hashes are remembered (`models.identity`), and so is what
a template comes down to for a tokenizer, which otherwise would have to be loaded to find out.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from im_lightning._utils.files import write_json
from im_lightning._utils.hashing import digest_bytes, digest_json
from im_lightning.errors import InstructMiningError, RequestError, message
from im_lightning.indicators.base import Indicator
from im_lightning.models.checkpoint import hidden_width
from im_lightning.models.device import Precision, resolve_device, resolve_precision
from im_lightning.models.fingerprint import cache_root, checkpoint_identity, folder_identity, tokenizer_identity

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
_BASE_MODEL = ("tokens", "conditional", "unconditional")
_JUDGES = {"reward": ("reward_model", "a reward model"), "unieval": ("unieval_model", "a UniEval model")}


@dataclass(frozen=True)
class Setup:
    """How to score: models, template, lengths, numerics and cache; see `score_examples` for each."""

    model: str | None = None
    revision: str | None = None
    embedding_model: str | None = None
    template: str = "auto"
    max_length: int = 1024
    batch_tokens: int | None = None
    precision: str = "auto"
    device: str | torch.device = "auto"
    cache_dir: str | None = None
    reward_model: str | None = None
    unieval_model: str | None = None

    @cached_property
    def root(self) -> Path:
        return cache_root(self.cache_dir)

    @cached_property
    def torch_device(self) -> torch.device:
        return resolve_device(self.device)

    @cached_property
    def number_format(self) -> Precision:
        return self.format_of(self.model, self.revision)

    def format_of(self, model: str | None, revision: str | None = None) -> Precision:
        """The number format of a model: "auto" looks at its width."""
        width = 0
        if self.precision == "auto" and self.torch_device.type == "cpu" and model is not None:
            width = hidden_width(model, revision)
        return resolve_precision(self.precision, self.torch_device, width)

    @property
    def tokens_per_batch(self) -> int:
        return self.batch_tokens or BATCH_TOKENS.get(self.torch_device.type, BATCH_TOKENS["cpu"])


class Keys:
    """Identity and numerics of each indicator under one set-up."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._judges: dict[str, dict[str, Any]] = {}

    def check(self, indicators: Iterable[Indicator]) -> None:
        """Refuses indicators whose model was not named.

        Raises:
            RequestError: names the indicators and the argument that is missing.
        """
        indicators = list(indicators)
        base = [i.name for i in indicators if any(need in _BASE_MODEL for need in i.needs)]
        if base and self.setup.model is None:
            remedy = "name one with --model (model=), or leave these indicators out"
            raise RequestError(message(", ".join(base), "a base model is needed and none was named", remedy))
        vectors = [i.name for i in indicators if "embedding" in i.needs]
        if vectors and self.setup.model is None and self.setup.embedding_model is None:
            remedy = "name one with --embedding-model (embedding_model=) or --model (model=)"
            raise RequestError(message(", ".join(vectors), "an embedding model or base model is needed", remedy))
        for need, (argument, kind) in _JUDGES.items():
            judged = [i.name for i in indicators if need in i.needs]
            if judged and getattr(self.setup, argument) is None:
                flag = f"--{argument.replace('_', '-')} ({argument}=)"
                remedy = f"name one with {flag}, or leave these indicators out"
                raise RequestError(message(", ".join(judged), f"{kind} is needed and none was named", remedy))

    def identity(self, indicator: Indicator) -> dict[str, Any]:
        """JSON-like: name, version, and the identity of all that the values depend on."""
        parts: dict[str, Any] = {"indicator": indicator.name, "version": indicator.version}
        for need in indicator.needs:
            parts.update(self._of_need(need))
        if indicator.derived_from:
            from im_lightning.indicators.base import get_indicator

            parts["from"] = {name: self.identity(get_indicator(name)) for name in indicator.derived_from}
        return parts

    def _of_need(self, need: str) -> dict[str, Any]:
        if need == "tokens":
            return {"tokenizer": tokenizer_identity(self.checkpoint)}
        if need == "conditional":
            return {"model": self.checkpoint, "template": self.template, "max_length": self.setup.max_length}
        if need == "unconditional":
            return {"model": self.checkpoint, "max_length": self.setup.max_length}
        if need == "embedding":
            return {"embedding": self.embedding}
        if need in _JUDGES:
            argument = _JUDGES[need][0]
            if argument not in self._judges:
                model = str(getattr(self.setup, argument))
                self._judges[argument] = checkpoint_identity(model, cache_dir=self.setup.root)
            return {argument: self._judges[argument]}
        return {}

    @cached_property
    def embedding(self) -> dict[str, Any]:
        """Identity of the vector of an example."""
        if self.setup.embedding_model is not None:
            model = folder_identity(self.setup.embedding_model, cache_dir=self.setup.root)
            return {"version": 1, "kind": "sentence-transformers", "model": model}
        return {"version": 1, "kind": "mean of the base model's last hidden states", **self._of_need("conditional")}

    @cached_property
    def checkpoint(self) -> dict[str, Any]:
        if self.setup.model is None:
            raise RequestError(message("the base model", "none was named", "name one with --model (model=)"))
        return checkpoint_identity(self.setup.model, self.setup.revision, self.setup.root)

    @cached_property
    def template(self) -> str:
        """`Template.identity` of the template that `setup.template` comes down to for this tokenizer."""
        asked = {"tokenizer": tokenizer_identity(self.checkpoint), "template": self.setup.template, "code": _code()}
        note = self.setup.root / "templates" / f"{digest_json(asked)}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(note.read_text())["identity"])
        from im_lightning.data.tokenization import resolve_template
        from im_lightning.models.checkpoint import load_tokenizer

        tokenizer = load_tokenizer(str(self.setup.model), self.setup.revision)
        identity = resolve_template(self.setup.template, tokenizer).identity
        with contextlib.suppress(InstructMiningError):
            write_json(note, {**asked, "identity": identity})
        return identity

    def numerics(self, indicator: Indicator) -> dict[str, Any]:
        """JSON-like: what can change the last digits of the values."""
        needs = set(indicator.needs)
        for name in indicator.derived_from:
            from im_lightning.indicators.base import get_indicator

            needs.update(get_indicator(name).needs)
        if "embedding" in needs and self.setup.embedding_model is not None:
            return self.embedding_numerics
        if needs & {"conditional", "unconditional", "embedding"}:
            return self.model_numerics
        for need in _JUDGES:
            if need in needs:
                judge = getattr(self.setup, _JUDGES[need][0])
                return {**self._versions, "precision": self.setup.format_of(judge).name}
        return {"tokenizers": version("tokenizers")} if "tokens" in needs else {}

    @cached_property
    def model_numerics(self) -> dict[str, Any]:
        return {**self._versions, "precision": self.setup.number_format.name}

    @cached_property
    def _versions(self) -> dict[str, Any]:
        device = self.setup.torch_device.type
        return {"device": device, "torch": version("torch"), "transformers": version("transformers")}

    @cached_property
    def embedding_numerics(self) -> dict[str, Any]:
        if self.setup.embedding_model is None:
            return self.model_numerics
        versions = {name: version(name) for name in ("torch", "transformers", "sentence-transformers")}
        return {"precision": "fp32", "device": self.setup.torch_device.type, **versions}


def _code() -> str:
    """Digest of the code that renders templates: what was remembered under other code is not used."""
    import im_lightning.data

    folder = Path(im_lightning.data.__path__[0])
    return digest_bytes(*(p.read_bytes() for p in sorted(folder.glob("*.py"))))
