"""Sentence embeddings of instruction and response, by a sentence-transformers model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from im_lightning._utils.optional import require
from im_lightning._utils.progress import without_bars
from im_lightning.data.example import Example
from im_lightning.errors import RequestError, first_line, message
from im_lightning.models.fingerprint import local_folder

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer


def load_embedder(
    model: str | os.PathLike[str], revision: str | None = None, device: str | torch.device = "cpu"
) -> SentenceTransformer:
    """A sentence-transformers model in fp32; code that comes with it is never run.

    Raises:
        RequestError: sentence-transformers is not installed; the folder or the hub's model cannot be loaded as one.
    """
    otherwise = "leave --embedding-model out to use the base model"
    package = require("sentence_transformers", "embeddings", f"--embedding-model {model}", otherwise)
    folder = local_folder(model)
    try:
        with without_bars():
            loaded = package.SentenceTransformer(
                str(folder or model), revision=revision, device=str(device), trust_remote_code=False
            )
        return loaded.eval()
    except Exception as error:  # the package raises OSError, ValueError, KeyError, RuntimeError of many makers
        cause = f"cannot be loaded as an embedding model ({first_line(error)})"
        remedy = f"name a sentence-transformers folder or hub id, or {otherwise}"
        raise RequestError(message(str(model), cause, remedy)) from error


def embedding_text(example: Example) -> str:
    """What is embedded: the last user turn and the last response, on lines of their own."""
    return f"{example.prompt}\n{example.response}"


def embed(embedder: SentenceTransformer, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
    """Vectors of n texts, float32 [n, d], not yet scaled to unit length. Equal texts get equal vectors."""
    distinct = list(dict.fromkeys(texts))  # the same text in another batch would differ in the last digit
    vectors = embedder.encode(distinct, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
    place = {text: i for i, text in enumerate(distinct)}
    return np.asarray(vectors, dtype=np.float32)[[place[text] for text in texts]]
