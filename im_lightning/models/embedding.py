"""Sentence embeddings of instruction and response, by a sentence-transformers model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.optional import require
from im_lightning._utils.progress import without_bars
from im_lightning.data.example import Example
from im_lightning.data.tokenization import without_surrogates
from im_lightning.errors import RequestError, first_line, message
from im_lightning.models.checkpoint import load_config
from im_lightning.models.fingerprint import local_folder

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

_NO_LIMIT = 1 << 24  # tokenizers without one say 1e30
_BLOCK = 1024


def load_embedder(model: str | os.PathLike[str], device: str | torch.device = "cpu") -> SentenceTransformer:
    """A sentence-transformers model in fp32; code that comes with it is never run.

    A causal language model without settings for sentence-transformers gives the mean of its last hidden states.

    Raises:
        RequestError: sentence-transformers is not installed; the folder or the hub's model cannot be loaded as one, or
            takes no text beside what is its own.
    """
    otherwise = "leave --embedding-model out to use the base model"
    package = require("sentence_transformers", "embeddings", f"--embedding-model {model}", otherwise)
    folder = local_folder(model)
    remedy = f"name a sentence-transformers folder or hub id, or {otherwise}"
    try:
        with without_bars():
            loaded = package.SentenceTransformer(str(folder or model), device=str(device), trust_remote_code=False)
            if is_plain_causal_lm(model):
                (pooling,) = (one for one in loaded if hasattr(one, "pooling_mode"))
                pooling.pooling_mode = "mean"  # the package takes the last token, which was trained to guess the next
        loaded.eval()
    except Exception as error:  # the package raises OSError, ValueError, KeyError, RuntimeError of many makers
        cause = f"cannot be loaded as an embedding model ({first_line(error)})"
        raise RequestError(message(str(model), cause, remedy)) from error
    if (room := room_of(loaded)) is not None and room < 1:
        cause = f"takes {loaded.max_seq_length} tokens, which its own special tokens and prompt fill"
        raise RequestError(message(str(model), cause, remedy))
    return loaded


def is_plain_causal_lm(model: str | os.PathLike[str]) -> bool:
    """Whether a causal language model was named that says nothing about embeddings: no `modules.json`."""
    folder = local_folder(model)
    if folder is None:
        from sentence_transformers.util import load_file_path

        if load_file_path(str(model), "modules.json") is not None:
            return False
        config = load_config(str(model)).to_dict()
    elif (folder / "modules.json").is_file() or not (folder / "config.json").is_file():
        return False
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return (config.get("architectures") or [""])[0].endswith("ForCausalLM") and config.get("is_causal", True)


def room_of(embedder: SentenceTransformer) -> int | None:
    """Tokens of a text that one vector sees, without those that the model adds; None where it has no limit."""
    limit, count = embedder.max_seq_length, _counter(embedder)
    if limit is None or limit > _NO_LIMIT or count is None:
        return None
    prompt = (embedder.prompts or {}).get(embedder.default_prompt_name or "") or ""
    return int(limit) - count([prompt], True)[0]


def long_texts(embedder: SentenceTransformer, texts: Sequence[str]) -> list[int]:
    """Positions of texts that one vector cannot see whole."""
    room, count = room_of(embedder), _counter(embedder)
    if room is None or count is None:
        return []
    found = []
    # A token has a byte, and normalising makes at most six bytes of one.
    maybe = [i for i, text in enumerate(texts) if 6 * len(text.encode(errors="replace")) > room]
    for start in range(0, len(maybe), _BLOCK):
        block = maybe[start : start + _BLOCK]
        found += [i for i, n in zip(block, count([texts[i] for i in block], False), strict=True) if n > room]
    return found


def embedding_text(example: Example, of: str = "both") -> str:
    """What is embedded: the last user turn and the last response, on lines of their own, or the response alone."""
    return example.response.strip() if of == "response" else f"{example.prompt}\n{example.response}"


def embed(embedder: SentenceTransformer, texts: Sequence[str]) -> NDArray[np.float32]:
    """Vectors of n texts, float32 [n, d], not yet scaled to unit length. Equal texts get equal vectors.

    A text longer than the model takes is embedded in parts of about equal length, cut at white space where there is
    some; its vector is the mean of theirs, weighted by their tokens. Of an empty text there is none: NaN.
    """
    distinct = list(dict.fromkeys(texts))  # the same text in another batch would differ in the last digit
    parts: dict[str, list[tuple[str, int]]] = {}
    for i in long_texts(embedder, distinct):
        parts[distinct[i]] = _parts(embedder, distinct[i])
    pieces = list(dict.fromkeys(piece for text in distinct for piece, _ in parts.get(text, [(text, 1)])))
    found = embedder.encode(pieces, batch_size=64, show_progress_bar=False, convert_to_numpy=True)
    vectors = dict(zip(pieces, np.asarray(found, dtype=np.float32), strict=True))
    for text, its in parts.items():
        vectors[text] = np.average([vectors[piece] for piece, _ in its], axis=0, weights=[n for _, n in its])
    if "" in vectors:
        vectors[""] = np.full_like(vectors[""], np.nan)
    return np.stack([vectors[text] for text in texts]).astype(np.float32)


def _parts(embedder: SentenceTransformer, text: str) -> list[tuple[str, int]]:
    """A long text in parts that the model sees whole, and their tokens."""
    room, count = room_of(embedder), _counter(embedder)
    if room is None or count is None:
        return [(text, 1)]
    number = -(-count([text], False)[0] // room)
    while True:
        borders = [_at_space(text, len(text) * k // number, len(text) // (4 * number)) for k in range(number + 1)]
        pieces = [one for a, b in pairwise(borders) if (one := text[a:b].strip())]
        sizes = count(pieces, False)
        if max(sizes, default=0) <= room or number >= len(text):
            return [(one, max(n, 1)) for one, n in zip(pieces, sizes, strict=True)] or [(text, 1)]
        number = max(number + 1, -(-number * max(sizes) // room))


def _at_space(text: str, at: int, reach: int) -> int:
    """The beginning of the word at a place in the text, unless it lies farther back than `reach` characters."""
    if not 0 < at < len(text):
        return at
    return next((i for i in range(at, max(at - reach, 0), -1) if text[i - 1].isspace()), at)


def _counter(embedder: SentenceTransformer) -> Callable[[list[str], bool], list[int]] | None:
    """Counts the tokens of texts, with or without what the model adds; None where its first module has no tokenizer."""
    tokenizer = getattr(embedder[0], "tokenizer", None)
    if not callable(tokenizer):
        return None

    def count(texts: list[str], whole: bool) -> list[int]:
        clean = [without_surrogates(text) for text in texts]
        ids = tokenizer(clean, add_special_tokens=whole, truncation=False, verbose=False)["input_ids"] if clean else []
        return [len(one) for one in ids]

    return count
