"""Fixtures that several rooms share. Everything runs on the CPU and without a network."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from speed import slowness

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A limit says when a test hangs: it grows with how slow the machine is when the test begins."""
    marker = item.get_closest_marker("timeout")
    limit = marker.args[0] if marker is not None else item.config.getoption("timeout", None)
    if limit:
        item.add_marker(pytest.mark.timeout(math.ceil(limit * slowness())), append=False)
    return (yield)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random LLaMA with a tokenizer that has BOS, EOS and a padding token."""
    from tiny import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A one-layer LLaMA of width 16 with its tokenizer: a fit takes a fraction of a second."""
    from tiny import make_tiny_llama

    return make_tiny_llama(tmp_path_factory.mktemp("small_base"), hidden=16, layers=1)


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


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a score store of its own, so none sees what another computed."""
    monkeypatch.setenv("IM_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def two_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forget_registrations() -> Iterator[None]:
    """Indicators that the test registers are gone after it."""
    from im_lightning.indicators import base

    before = set(base._registered)
    yield
    for name in set(base._registered) - before - set(base.BUILT_IN):
        del base._registered[name]
