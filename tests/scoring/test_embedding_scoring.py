"""knn_<i> with a sentence-transformers model, against sentence-transformers and scikit-learn used by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from pools import make_pool
from sklearn.neighbors import NearestNeighbors

from im_lightning.data.example import Example
from im_lightning.data.settings import Encoding
from im_lightning.errors import RequestError
from im_lightning.indicators import knn
from im_lightning.indicators.base import get_indicators
from im_lightning.models import checkpoint, embedding
from im_lightning.scoring.api import score_examples
from im_lightning.scoring.passes.base import EmbeddingPass
from im_lightning.scoring.plan import ScoringPlan, execute
from im_lightning.scoring.settings import ScorerModels, Setup


def by_hand(embedder: str, pool: list[Example], rank: int) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(embedder, device="cpu")
    texts = [f"{e.prompt}\n{e.response}" for e in pool]
    vectors = np.stack([model.encode(text, normalize_embeddings=True) for text in texts]).astype(np.float64)
    return NearestNeighbors(algorithm="brute").fit(vectors).kneighbors(n_neighbors=rank)[0][:, -1]


def test_equals_sentence_transformers_and_scikit_learn(embedder: str) -> None:
    pool = make_pool(30)
    table = score_examples(pool, ["knn_6", "knn_2", "mtld"], embedding_model=embedder)
    np.testing.assert_allclose(table.values["knn_6"], by_hand(embedder, pool, 6), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(table.values["knn_2"], by_hand(embedder, pool, 2), rtol=1e-3, atol=1e-5)
    assert table.keys["knn_6"]["identity"]["embedding"]["kind"] == "sentence-transformers"
    assert "sentence-transformers" in table.keys["knn_6"]["numerics"]


def test_what_a_large_pool_lacks_is_told_before_any_work(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of embeddings, and then: faiss is not installed."""
    monkeypatch.setitem(knn.EXACT_ROWS, "cpu", 6)
    monkeypatch.setitem(sys.modules, "faiss", None)
    pool = make_pool(8)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_causal_lm", None)
        with pytest.raises(RequestError, match=r"neighbours among 8 examples: it needs faiss.*im-lightning\[ann\]"):
            score_examples(pool, ["ppl", "knn_2"], tiny_llama, device="cpu")
    among = score_examples(pool, ["knn_2"], tiny_llama, device="cpu", knn_reference=pool[:6])
    assert np.isfinite(among.values["knn_2"]).all(), "those are few enough"


def test_what_embedding_costs_is_counted(embedder: str) -> None:
    """Tokens as the model gets them, special ones included and padding left out; parameters without the tables."""
    from sentence_transformers import SentenceTransformer

    pool, setup = make_pool(30), Setup(Encoding(), ScorerModels(embedding_model=embedder))
    _, coverage = execute(ScoringPlan(pool, get_indicators(["knn_2"]), setup))
    step = next(step for step in coverage.steps if step.label == "embeddings")
    model = SentenceTransformer(embedder, device="cpu")
    texts = {f"{e.prompt}\n{e.response}" for e in pool}
    tokens = sum(len(model.tokenizer(text)["input_ids"]) for text in texts)
    layer = 4 * 16 * 16 + 2 * 16 * 32
    assert step.tokens == tokens and step.flops == 2 * tokens * (layer + 16 * 16)  # and BERT's pooler


def test_embeddings_are_made_once_and_pooling_is_part_of_the_identity(
    embedder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CLS pooling of the same weights is another embedding: its distances must not be mixed with these."""
    import json
    import shutil

    pool = make_pool(12)
    first = score_examples(pool, ["knn_3"], embedding_model=embedder)
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "load_embedder", None)
        again = score_examples(pool, ["knn_3", "knn_4"], embedding_model=embedder)  # from the stored vectors
    assert again.values["knn_3"].tolist() == first.values["knn_3"].tolist()

    other = tmp_path / "cls"
    shutil.copytree(embedder, other)
    (config,) = other.glob("*_Pooling/config.json")
    settings = json.loads(config.read_text())
    settings["pooling_mode"] = "cls"
    config.write_text(json.dumps(settings))
    changed = score_examples(pool, ["knn_3"], embedding_model=other)
    assert changed.keys["knn_3"]["identity"] != first.keys["knn_3"]["identity"]
    assert (changed.values["knn_3"] != first.values["knn_3"]).any()


def test_embedding_model_and_base_model_each_serve_their_own(embedder: str, tiny_llama: str) -> None:
    pool = make_pool(12)
    table = score_examples(pool, ["ppl", "knn_2"], tiny_llama, embedding_model=embedder)
    pooled = score_examples(pool, ["knn_2"], tiny_llama)
    np.testing.assert_allclose(table.values["knn_2"], by_hand(embedder, pool, 2), rtol=1e-3, atol=1e-5)
    assert np.abs(table.values["knn_2"] - pooled.values["knn_2"]).max() > 1e-3


def test_estimate_times_each_kind_of_pass_and_stores_nothing(embedder: str, tiny_llama: str, own_cache: Path) -> None:
    """A dry run that filled the store would not be one."""
    from im_lightning.data.settings import Encoding
    from im_lightning.indicators.base import get_indicators
    from im_lightning.scoring.estimate import describe, estimate
    from im_lightning.scoring.plan import ScoringPlan
    from im_lightning.scoring.settings import Numerics, ScorerModels, Setup

    pool = make_pool(20)
    setup = Setup(Encoding(tiny_llama), ScorerModels(embedder), Numerics(device="cpu"))
    plan = ScoringPlan([*pool, pool[0]], get_indicators(["mtld", "length_input", "knn_2"]), setup)
    estimates, memory = estimate(plan)
    assert [(e.label, e.rows) for e in estimates] == [("mtld", 20), ("length_input", 20), ("embeddings", 20)]
    assert all(e.seconds > 0 for e in estimates) and memory > 2**20
    lines = describe(plan, estimates, memory)
    assert lines[0] == "21 rows, 20 distinct" and lines[-1].startswith("in all about")
    assert not list(own_cache.rglob("*.parquet"))


def test_what_is_no_embedding_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"/no/such: there is no such folder"):
        score_examples(make_pool(2), ["knn_1"], embedding_model="/no/such")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RequestError, match="has no weights"):
        score_examples(make_pool(2), ["knn_1"], embedding_model=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(RequestError, match=r"cannot be loaded as an embedding model.*leave --embedding-model out"):
        score_examples(make_pool(2), ["knn_1"], embedding_model=tmp_path)


def test_a_reference_that_holds_rows_of_the_pool_makes_their_vectors_once(
    embedder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = EmbeddingPass.embed

    def counting(self: EmbeddingPass, rows: np.ndarray) -> np.ndarray:
        made.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(EmbeddingPass, "embed", counting)
    pool, others = make_pool(12), make_pool(5, seed=5)
    for reference, expected in (([*pool[:9], *others], [12, 5]), (pool[::-1], [12])):
        made.clear()
        folder = tmp_path / str(len(reference))
        found = score_examples(pool, ["knn_3"], embedding_model=embedder, knn_reference=reference, cache_dir=folder)
        assert made == expected
        by_itself = [by_hand(embedder, [*[e for e in reference if e.id != row.id], row], 3)[-1] for row in pool]
        np.testing.assert_allclose(found.values["knn_3"], by_itself, rtol=1e-3, atol=1e-5)


def test_a_reference_frees_the_values_from_the_pool(
    embedder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores of pools scored apart are comparable only against the same reference, and are kept when the pool grows."""
    from im_lightning.data.loading import write_rows
    from im_lightning.scoring import plan as engine

    pool, reference = make_pool(30), [*make_pool(12), *make_pool(20, seed=5)]
    table = score_examples(pool, ["knn_3"], embedding_model=embedder, knn_reference=reference)
    expected = [by_hand(embedder, [*[e for e in reference if e.id != row.id], row], 3)[-1] for row in pool]
    np.testing.assert_allclose(table.values["knn_3"], expected, rtol=1e-3, atol=1e-5)
    identity = table.keys["knn_3"]["identity"]
    assert len(identity["reference"]) == 32 and "pool" not in table.keys["knn_3"]
    rows = [{"instruction": e.instruction, "input": e.input, "output": e.response} for e in reference]
    write_rows(tmp_path / "reference.jsonl", rows)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "Reference", None)  # nothing may be searched again
        part = score_examples(
            pool[5:9], ["knn_3"], embedding_model=embedder, knn_reference=tmp_path / "reference.jsonl"
        )
    assert "everything was in the store" in capsys.readouterr().err
    assert part.values["knn_3"].tolist() == table.values["knn_3"][5:9].tolist()
    assert part.keys["knn_3"]["identity"] == identity

    alone = score_examples(pool, ["knn_3"], embedding_model=embedder)
    itself = score_examples(pool, ["knn_3"], embedding_model=embedder, knn_reference=pool)
    assert alone.values["knn_3"].tolist() == itself.values["knn_3"].tolist()
    assert alone.keys["knn_3"]["identity"] != itself.keys["knn_3"]["identity"]


def test_a_reference_of_pooled_states(tiny_llama: str) -> None:
    pool = make_pool(12)
    alone = score_examples(pool, ["knn_2"], tiny_llama)
    itself = score_examples(pool, ["knn_2", "ppl"], tiny_llama, knn_reference=pool)
    np.testing.assert_allclose(itself.values["knn_2"], alone.values["knn_2"], rtol=1e-5)


def test_an_empty_reference_is_refused(embedder: str) -> None:
    with pytest.raises(RequestError, match=r"the reference of knn: it has no rows.*--knn-reference"):
        score_examples(make_pool(3), ["knn_1"], embedding_model=embedder, knn_reference=[])
