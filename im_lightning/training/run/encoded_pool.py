"""What a run reads: the pool, the evaluation sets, their token ids. Read once per process, however many fits.

A study makes dozens of short fits on one pool in one process. The caches here are keyed by what the files are (name,
size, modification time) and by digests of content, so that a changed file is read anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from im_lightning._utils.hashing import digest_json, digest_strings
from im_lightning.data.example import Example
from im_lightning.data.loading import Refuses, Rejected, find_sources, load_examples, note_rejected
from im_lightning.data.overlap.keys import prompt_groups
from im_lightning.data.prompt_templates import Template
from im_lightning.data.settings import Encoding, Reading
from im_lightning.data.tokenization import Encoded, check_vocabulary, encode_examples, resolve_template, template_key
from im_lightning.errors import RequestError, message
from im_lightning.models.checkpoint import checkpoint_identity, load_tokenizer, vocabulary
from im_lightning.models.fingerprint import tokenizer_identity
from im_lightning.models.likelihood import collate, padding_id
from im_lightning.sampling.rows import Choice
from im_lightning.training.run.run_folder import stamp


class Pool:
    """Examples in input order, and the rows set aside while reading; `row` everywhere is the position here."""

    def __init__(self, examples: list[Example], rejected: list[Rejected] | None = None) -> None:
        self.examples = examples
        self.rejected = rejected or []

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def ids(self) -> list[str]:
        return [example.id for example in self.examples]

    @cached_property
    def sources(self) -> list[str]:
        return [example.source for example in self.examples]

    @cached_property
    def prompts(self) -> NDArray[np.int64]:
        """Which rows have the same prompt, int64 [N]."""
        return prompt_groups(self.examples)

    def groups(self, choice: Choice) -> NDArray[np.int64] | None:
        """The prompts, where a draw takes one row of each at most."""
        return self.prompts if choice.one_per_prompt else None

    @cached_property
    def digest(self) -> str:
        """Digest of the ids in order, as `ScoreTable.pool_digest`."""
        return digest_strings(self.ids)


def reading_of(options: Mapping[str, Any]) -> Reading:
    """How rows are read, by a data module's options or a recipe's, where columns may be a mapping."""
    given = {one.name: options[one.name] for one in fields(Reading) if one.name in options}
    if isinstance(columns := given.get("columns"), Mapping):  # one text, as on the command line
        given["columns"] = ",".join(f"{name}={field}" for name, field in columns.items()) or None
    return Reading(**given)


def read_pool(data: str | Sequence[str], reading: Reading, refuses: Refuses | None = None) -> Pool:
    """The examples of files, folders or hub data sets; as `load_examples`."""
    names = (data,) if isinstance(data, str) else tuple(data)
    stamps = tuple((source.name, stamp(Path(source.name))) for source in find_sources(list(names)))
    return _read_pool(names, stamps, reading, refuses)


@lru_cache(maxsize=6)
def _read_pool(names: tuple[str, ...], stamps: tuple[Any, ...], reading: Reading, refuses: Refuses | None) -> Pool:
    rejected: list[Rejected] = []
    pool = Pool(load_examples(list(names), rejected=rejected, refuses=refuses, **asdict(reading)), rejected)
    note_rejected(names, rejected)
    return pool


class Coding(NamedTuple):
    """How texts become token ids: by the tokenizer of a checkpoint, whose identity is `model`, and a template.

    `name` and `embeddings` are the checkpoint's name and how many tokens its model has embeddings for.
    """

    tokenizer: Any
    template: Template
    max_length: int
    model: dict[str, Any]
    name: str = ""
    embeddings: int | None = None

    @property
    def digest(self) -> str:
        return digest_json([tokenizer_identity(self.model), self.template.identity, self.max_length])


def coding_of(encoding: Encoding) -> Coding:
    """The coding by a checkpoint's tokenizer.

    Raises:
        RequestError: no checkpoint is named.
    """
    if encoding.model is None:
        cause = "the base model, whose tokenizer encodes the data, is not named"
        raise RequestError(message("model", cause, "pass model= (a folder or Hugging Face id)"))
    identity = checkpoint_identity(encoding.model, revision=encoding.revision, cache_dir=encoding.cache_dir)
    asked = encoding.model, encoding.revision, encoding.template, encoding.turns
    tokenizer, template, embeddings = _tokenizer(*asked, digest_json([identity, template_key(encoding.template)]))
    return Coding(tokenizer, template, encoding.max_length, identity, str(encoding.model), embeddings)


@lru_cache(maxsize=4)
def _tokenizer(model: str, revision: str | None, template: str, turns: str, identity: str) -> tuple[Any, Template, int]:
    tokenizer = load_tokenizer(model, revision=revision)
    return tokenizer, resolve_template(template, tokenizer, turns), vocabulary(model, revision)


def base_model_name(identity: dict[str, Any]) -> str:
    """One line for a regime: a hub name with its commit, or the digest of local weights; never a path."""
    if "name" in identity:
        return f"{identity['name']}@{identity.get('revision') or 'main'}"
    return f"weights {identity.get('weights') or digest_json(identity)}"


class EncodedPool(Dataset[tuple[int, Encoded]]):
    """Token ids of a pool, made for the rows that are asked for, in batches: a budget's worth of a pool of millions."""

    def __init__(self, pool: Pool, coding: Coding) -> None:
        self.pool, self.coding = pool, coding
        self.encoded: dict[int, Encoded] = {}

    def need(self, rows: Sequence[int] | np.ndarray) -> None:
        """Encodes those of the rows that are not yet."""
        new = [int(row) for row in rows if int(row) not in self.encoded]
        if new:
            c = self.coding
            examples = [self.pool.examples[r] for r in new]
            made = encode_examples(examples, c.tokenizer, c.template, c.max_length)
            if c.embeddings is not None:
                check_vocabulary(made, examples, c.tokenizer, c.name, c.embeddings)
            self.encoded.update(zip(new, made, strict=True))

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, row: int) -> tuple[int, Encoded]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[int, Encoded]]:
        """What a DataLoader asks for: the rows of one batch."""
        self.need(rows)
        return [(row, self.encoded[row]) for row in rows]

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """Supervised tokens (response with its end) of each row, int64."""
        self.need(rows)
        found = [self.encoded[int(row)] for row in rows]
        return np.array([sum(int(e.loss_mask.sum()) for e in (one, *one.earlier)) for one in found], dtype=np.int64)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each row, prompt and template included, int64."""
        self.need(rows)
        found = [self.encoded[int(row)] for row in rows]
        return np.array([sum(len(e.input_ids) for e in (one, *one.earlier)) for one in found], dtype=np.int64)


_encoded_pools: dict[tuple[str, str], EncodedPool] = {}


def encoded_pool(pool: Pool, coding: Coding) -> EncodedPool:
    """The one `EncodedPool` of this pool and coding in this process; the last four are kept."""
    key = (pool.digest, coding.digest)
    found = _encoded_pools.pop(key, None) or EncodedPool(pool, coding)
    _encoded_pools[key] = found
    while len(_encoded_pools) > 4:
        _encoded_pools.pop(next(iter(_encoded_pools)))
    return found


class Collate:
    """Turns (row, Encoded) pairs into a batch: input_ids, attention_mask, target_mask (the loss mask), row.

    Where a row has several sequences, they stand behind the B rows' own, S in all, and `owner` int64 [S] says which of
    the B each belongs to. `rows`: how many tokens the model has embeddings for, where it is known.
    """

    def __init__(self, tokenizer: Any, rows: int | None = None) -> None:
        self.pad_id = padding_id(tokenizer, rows)

    def __call__(self, items: Sequence[tuple[int, Encoded]]) -> dict[str, torch.Tensor]:
        more = [(place, one) for place, (_, encoded) in enumerate(items) for one in encoded.earlier]
        batch = collate([encoded for _, encoded in (*items, *more)], self.pad_id, "loss_mask")
        batch["row"] = torch.tensor([row for row, _ in items], dtype=torch.int64)
        if more:
            batch["owner"] = torch.tensor([*range(len(items)), *(place for place, _ in more)], dtype=torch.int64)
        return batch


def set_names(data: str | Sequence[str] | dict[str, str] | None) -> dict[str, str]:
    """Evaluation sets by name: a dict's own keys, else the stems of the files."""
    if data is None:
        return {}
    if isinstance(data, dict):
        return {str(name): str(path) for name, path in data.items()}
    named: dict[str, str] = {}
    for path in [data] if isinstance(data, str) else data:
        stem = Path(str(path).partition(":")[0]).name.split(".")[0] or str(path)
        if stem in named:
            cause = f"{named[stem]} and {path} would both be called {stem!r}"
            raise RequestError(message("eval_data", cause, "give a dict of names and paths"))
        named[stem] = str(path)
    return named
