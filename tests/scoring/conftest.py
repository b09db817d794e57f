"""Makes the helpers of this folder importable; fixtures that several of its files share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT with mean pooling, saved the way sentence-transformers saves them."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from tiny import make_tokenizer
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = make_tokenizer(bos=False, eos=False)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = Transformer(str(folder), max_seq_length=256)
    saved = tmp_path_factory.mktemp("embedder")
    SentenceTransformer(modules=[words, Pooling(16, pooling_mode="mean")], device="cpu").save(str(saved))
    return str(saved)
