"""Texts longer than the embedding model takes: the response is seen, they are counted, others keep their values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pools import alpaca, make_pool

from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Encoding
from im_lightning.errors import RequestError
from im_lightning.indicators.base import get_indicators
from im_lightning.indicators.transforms import Transform
from im_lightning.models import embedding
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.scoring.api import score_examples
from im_lightning.scoring.plan import ScoringPlan
from im_lightning.scoring.settings import ScorerModels, Setup

LOG = "\n".join(f"line {i}: red blue atom nucleus air" for i in range(60))
ANSWERS = ("All is well.", "The pumps failed twice.", "tips for healthy colors")
LONG = [alpaca(f"Summarise this log.\n{LOG}", answer) for answer in ANSWERS]
SHORT = [alpaca("Name a river.", "The Elbe."), alpaca("Bake bread.", "Mix, rise, bake.")]


@pytest.fixture(scope="module")
def embedder(embedder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One that takes 64 tokens."""
    return with_limit(embedder, tmp_path_factory.mktemp("short") / "embedder", 64)


def with_limit(embedder: str, folder: Path, tokens: int) -> str:
    shutil.copytree(embedder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": tokens}))
    return str(folder)


def embedding_of(table: ScoreTable) -> dict[str, Any]:
    return table.keys["knn_1"]["identity"]["embedding"]


def test_rows_that_share_a_long_prompt_are_told_apart_by_their_answers(
    embedder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut at 64 tokens they were equal, and counted as copies of one another."""
    table = score_examples([*LONG, *SHORT], ["knn_1"], embedding_model=embedder)
    assert (table.values["knn_1"] > 1e-3).all()
    assert "longer than the embedding model takes, embedded in parts: 3" in capsys.readouterr().err


def test_the_report_counts_the_rows_of_the_pool_alone(embedder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rows scored, "embedded in parts: 3": those were the reference's."""
    for _ in range(2):  # counted, and as the note has it
        score_examples(SHORT, ["knn_1"], embedding_model=embedder, knn_reference=LONG)
        assert "embedded in parts" not in capsys.readouterr().err
    score_examples([*SHORT, LONG[0]], ["knn_1"], embedding_model=embedder, knn_reference=LONG)
    assert "embedded in parts: 1" in capsys.readouterr().err


def test_a_long_text_is_the_mean_of_its_parts_by_tokens(embedder: str) -> None:
    """By hand: two halves, cut at a blank, each through sentence-transformers, weighted by their tokens."""
    model = embedding.load_embedder(embedder)
    text = " ".join(["red", "blue", "nucleus"] * 25)
    half = len(text) // 2
    while not text[half - 1].isspace():
        half -= 1
    halves = [text[:half].strip(), text[half:]]
    sizes = [len(model.tokenizer(one, add_special_tokens=False)["input_ids"]) for one in halves]
    assert sum(sizes) > 64 >= max(sizes), "the case that is tested"
    wanted = (sizes[0] * model.encode(halves[0]) + sizes[1] * model.encode(halves[1])) / sum(sizes)
    np.testing.assert_allclose(embedding.embed(model, ["a", text, text])[1:], [wanted, wanted], atol=1e-6)
    for odd in ("a" * 400, "日本語" * 100, "x " * 300 + "y" * 300, "\ud800" * 200):  # no blank, bytes, half characters
        parts = embedding._parts(model, odd)
        assert "".join("".join(part.split()) for part, _ in parts) == "".join(odd.split())
        clean = [part.encode(errors="replace").decode() for part, _ in parts]
        assert max(len(ids) for ids in model.tokenizer(clean)["input_ids"]) <= 64


def test_the_identity_changes_only_where_a_text_of_the_pool_is_cut(
    embedder: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of pools that no limit touches stay valid; so do those of the base model's states."""
    short = score_examples(SHORT, ["knn_1"], embedding_model=embedder)
    assert set(embedding_of(short)) == {"version", "kind", "model"} and embedding_of(short)["version"] == 1
    both = score_examples([*LONG, *SHORT], ["knn_1"], embedding_model=embedder)
    added = {"long texts": "mean of parts by tokens"}
    assert embedding_of(both) == {**embedding_of(short), **added}
    beside = score_examples(SHORT, ["knn_1"], embedding_model=embedder, knn_reference=LONG)
    assert embedding_of(beside) == {**embedding_of(short), **added}, "the reference is cut"
    monkeypatch.setattr(embedding, "load_embedder", None)  # what was counted is known the next time
    again = score_examples([*LONG, *SHORT], ["knn_1"], embedding_model=embedder)
    assert again.values["knn_1"].tolist() == both.values["knn_1"].tolist()
    score_examples(SHORT, ["knn_1"], embedding_model=embedder, knn_reference=LONG)


def test_a_share_of_a_pool_is_stored_under_the_identity_of_the_whole(embedder: str) -> None:
    """A rank whose rows are all short would otherwise embed for nothing: the table looks elsewhere."""
    from im_lightning.training.run.scoring import Scorer

    scorer = Scorer(("knn_1",), Setup(Encoding(), ScorerModels(embedder)))
    for each in scorer.measured([*LONG, *SHORT]).passes(SHORT):
        each.run()
    plan = ScoringPlan([*LONG, *SHORT], get_indicators(["knn_1"]), scorer.setup)
    assert plan.vectors is not None and plan.vectors.missing.tolist() == [True, True, True, False, False]


def test_a_rule_is_not_refused_before_the_pool_was_looked_at(embedder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit compares identities before any model is loaded; whether a text is too long is not known then."""
    from types import SimpleNamespace

    from im_lightning.training.run.scoring import Scorer

    scorer = Scorer(("knn_1",), Setup(Encoding(), ScorerModels(embedder)))
    for pool in (SHORT, [*LONG, *SHORT]):
        identity = score_examples(pool, ["knn_1"], embedding_model=embedder).keys["knn_1"]["identity"]
        with monkeypatch.context() as patch:
            patch.setattr(embedding, "load_embedder", None)
            preview = scorer.preview(SimpleNamespace(identities={"knn_1": identity}))  # type: ignore[arg-type]
        assert preview.keys["knn_1"]["identity"] == identity


def test_a_rule_from_long_texts_holds_where_there_are_none_and_not_the_other_way(embedder: str) -> None:
    """Embedded in parts or not, a short text has the same vector; a rule that knows of no parts may know cut texts."""
    long, short = (score_examples(pool, ["knn_1"], embedding_model=embedder) for pool in ([*LONG, *SHORT], SHORT))

    def rule_of(table: ScoreTable) -> LinearRule:
        identities = {"knn_1": table.keys["knn_1"]["identity"]}
        transforms = {"knn_1": Transform("identity", 0.0, 2.0)}
        return LinearRule("made", 1.0, np.array([0.1]), ["knn_1"], transforms, identities=identities)

    with pytest.warns(UserWarning, match=r"knn_1: the rule's pool had texts longer than .* this one has none"):
        rule_of(long).check(short)
    with pytest.raises(RequestError, match=r"knn_1 was computed in another way than for the fit \(.*long texts"):
        rule_of(short).check(long)


def test_the_response_alone(embedder: str, tiny_llama: str) -> None:
    """Equal answers to other prompts are neighbours at distance 0; no answer, no vector."""
    from sentence_transformers import SentenceTransformer

    rows = [*LONG, alpaca("Is all well?", ANSWERS[0]), alpaca("Say nothing.", "")]
    table = score_examples(rows, ["knn_1", "knn_2"], embedding_model=embedder, embed="response")
    assert table.values["knn_1"][[0, 3]].tolist() == [0, 0] and table.values["knn_1"][1] > 0
    assert table.reasons["knn_1"][4] == "empty response"
    assert embedding_of(table)["text"] == "response" and "long texts" not in embedding_of(table)
    vectors = SentenceTransformer(embedder, device="cpu").encode(list(ANSWERS), normalize_embeddings=True)
    assert table.values["knn_2"][0] == pytest.approx(np.sort(np.linalg.norm(vectors - vectors[0], axis=1))[1], 1e-4)
    states = score_examples(rows, ["knn_1"], tiny_llama, embed="response")
    assert states.reasons["knn_1"][4] == "empty response" and embedding_of(states)["text"] == "response"
    assert (states.values["knn_1"][:4] != score_examples(rows, ["knn_1"], tiny_llama).values["knn_1"][:4]).all()
    with pytest.raises(RequestError, match=r"embed 'prompt': is not known\. Fix: use one of both, response"):
        score_examples(rows, ["knn_1"], embedding_model=embedder, embed="prompt")


def test_a_causal_lm_named_as_embedder_gives_the_mean_of_its_states(tiny_llama: str) -> None:
    """As the unnamed base does; sentence-transformers itself takes the last token."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_llama), AutoModel.from_pretrained(tiny_llama).eval()
    pool = make_pool(5)
    wanted = []
    for one in pool:
        with torch.no_grad():
            states = model(**tokenizer(f"{one.prompt}\n{one.response}", return_tensors="pt")).last_hidden_state[0]
        wanted.append(states.mean(0).numpy())
    found = embedding.embed(embedding.load_embedder(tiny_llama), [f"{one.prompt}\n{one.response}" for one in pool])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    table = score_examples(pool, ["knn_1"], embedding_model=tiny_llama)
    assert embedding_of(table)["pooling"] == "mean"


def test_a_model_without_room_for_a_text_is_refused(embedder: str, tmp_path: Path) -> None:
    folder = with_limit(embedder, tmp_path / "small", 0)
    with pytest.raises(RequestError, match=r"small: takes 0 tokens, which its own special tokens and prompt fill"):
        score_examples(LONG, ["knn_1"], embedding_model=folder)
