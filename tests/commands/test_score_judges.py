"""`im-lightning score` with reward and UniEval models: the paper's nine indicators and both published rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_judges import make_chat_reward, make_deberta_reward, make_oasst_reward, make_unieval

from im_lightning.cli import main
from im_lightning.data.score_table import ScoreTable
from im_lightning.rule import published

NINE = [
    "length_input", "length_output", "ppl", "mtld", "knn_6", "reward", "naturalness", "coherence", "understandability",
]  # fmt: skip
JUDGED = NINE[5:]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("judges")
    rows = [{"instruction": f"Give {i} tips", "output": "Eat, sleep and exercise. " * (i % 4 + 1)} for i in range(9)]
    (root / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "output": ""}]))
    return {
        "pool": str(root / "pool.jsonl"),
        "reward": make_oasst_reward(root / "oasst"),
        "unieval": make_unieval(root / "t5"),
    }


@pytest.fixture(autouse=True)
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "_warned", set())


def score(*arguments: object) -> int:
    return main(["score", *map(str, arguments)])


@pytest.mark.filterwarnings("ignore:THE RULE")
def test_nine_indicators_and_both_published_rules(
    world: dict[str, str], tiny_llama: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "s.parquet"
    models = ["--model", tiny_llama, "--reward-model", world["reward"], "--unieval-model", world["unieval"]]
    assert score(world["pool"], *models, "--out", out) == 0
    table = ScoreTable.read(out)
    assert set(NINE) < set(table.indicators) and np.isfinite(table.matrix(NINE)[:9]).all()
    assert [table.reasons[name][9] for name in JUDGED] == ["empty response"] * 4
    v = table.values
    predictions = {
        "instructmining-v1": 1.0694 - 0.1498 * v["reward"] + 8.257e-5 * v["length_output"] - 0.9350 * v["knn_6"],
        "instructmining-v3": 0.0274 - 0.0078 * v["reward"] + 0.4421 * v["understandability"]
        - 0.3212 * v["naturalness"] - 0.1520 * v["coherence"],
    }  # fmt: skip
    for rule, expected in predictions.items():
        capsys.readouterr()
        assert score(world["pool"], *models, "--rule", rule, "--out", out) == 0
        predicted = ScoreTable.read(out).values["predicted_log_loss"]
        np.testing.assert_allclose(predicted, expected)
        assert np.isfinite(predicted[:9]).all() and np.isnan(predicted[9])
        assert "no model was loaded" in capsys.readouterr().err  # the first scoring had computed everything


def test_a_named_model_brings_its_indicators(world: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "s.parquet"
    assert score(world["pool"], "--reward-model", world["reward"], "--out", out) == 0
    assert ScoreTable.read(out).indicators == ["mtld", "reward"]
    assert score(world["pool"], "--unieval-model", world["unieval"], "--out", out) == 0
    assert ScoreTable.read(out).indicators == ["mtld", "naturalness", "coherence", "understandability"]
    capsys.readouterr()


def test_dry_run_shows_the_judges_some_rows_and_keeps_nothing(
    world: dict[str, str], tmp_path: Path, own_cache: Path, capsys: Any
) -> None:
    models = ["--reward-model", world["reward"], "--unieval-model", world["unieval"]]
    assert score(world["pool"], *models, "--out", tmp_path / "s.parquet", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "reward: 10 rows to compute, about" in said
    assert "naturalness, coherence, understandability: 10 rows to compute" in said and "batches timed" in said
    assert not list(own_cache.rglob("*.parquet"))


@pytest.mark.filterwarnings("ignore:THE RULE")
def test_what_is_said_without_a_model(world: dict[str, str], tiny_llama: str, tmp_path: Path, capsys: Any) -> None:
    """A rule of one's own belongs to its own models: none is guessed."""
    out = tmp_path / "s.parquet"
    assert score(world["pool"], "--indicators", "coherence,naturalness", "--out", out) == 2
    said = capsys.readouterr().err
    assert "coherence, naturalness: a UniEval model is needed" in said and "--unieval-model (unieval_model=)" in said
    published.published_rule("instructmining-v1").save(tmp_path / "mine.json")
    assert score(world["pool"], "--model", tiny_llama, "--rule", tmp_path / "mine.json", "--out", out) == 2
    assert "reward: a reward model is needed" in capsys.readouterr().err
    # a published rule takes the paper's model, which this test cannot reach
    assert score(world["pool"], "--model", tiny_llama, "--rule", "instructmining-v1", "--out", out) == 2
    said = capsys.readouterr().err
    assert "reward_model is OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5, the paper's" in said
    assert "the hub cannot be reached" in said and "unieval" not in said


@pytest.mark.filterwarnings("ignore:THE RULE")
def test_published_rule_takes_the_papers_models_from_the_hubs_cache(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The loading of hub names, on a cache laid out as the hub's client does it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    for argument, folder in (("reward_model", world["reward"]), ("unieval_model", world["unieval"])):
        name = published.PAPER_MODELS[argument]
        cached = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        (cached / "snapshots").mkdir()
        (cached / "snapshots" / commit).symlink_to(folder)
    out = tmp_path / "s.parquet"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert score(world["pool"], "--rule", "instructmining-v3", "--out", out) == 0
    assert "unieval_model is MingZhong/unieval-dialog, the paper's" in capsys.readouterr().err
    table = ScoreTable.read(out)
    assert np.isfinite(table.values["predicted_log_loss"][:9]).all()
    name = published.PAPER_MODELS["reward_model"]
    assert table.keys["reward"]["identity"]["reward_model"] == {"name": name, "revision": commit}


def test_chat_and_pair_reward_models_from_the_command(world: dict[str, str], tmp_path: Path) -> None:
    found = []
    for make in (make_deberta_reward, make_chat_reward):
        out = tmp_path / f"{make.__name__}.parquet"
        model = make(tmp_path / make.__name__)
        assert score(world["pool"], "--indicators", "reward", "--reward-model", model, "--out", out) == 0
        found.append(ScoreTable.read(out).values["reward"][:9])
    assert np.isfinite(found).all() and not np.allclose(*found)
