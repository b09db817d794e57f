"""The playground's judges tell good from bad on what they were not shown, through the code that loads real judges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from im_lightning.data.loading import load_examples
from im_lightning.experiments.demo.playground.base import BaseSettings, make_base
from im_lightning.experiments.demo.playground.corruptions import ANSWERS, answer_pairs, judged_rows
from im_lightning.experiments.demo.playground.judges import (
    QUESTIONS,
    JudgeSettings,
    make_reward,
    make_unieval,
    make_unieval_tokenizer,
    questions,
)
from im_lightning.experiments.demo.playground.pool import FLAWS, make_pool
from im_lightning.models.checkpoint import checkpoint_identity
from im_lightning.scoring.api import score_examples

BASE = BaseSettings(hidden=48, layers=1, heads=2, steps=60, batch=32, block=32, documents=2000, warmup=5)
SETTINGS = JudgeSettings(pairs=1600, reward_steps=50, rows=1600, unieval_steps=160)
SHORT = JudgeSettings(pairs=64, reward_steps=2, rows=64, hidden=32, layers=1, unieval_steps=3)
UNSEEN = 99  # a seed that no training uses


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges")
    make_base(folder / "base", BASE, seed=0)
    make_reward(folder / "reward", folder / "base", SETTINGS, seed=0)
    make_unieval(folder / "unieval", SETTINGS, seed=0)
    return folder


def test_the_reward_model_prefers_right_answers(judges: Path, tmp_path: Path) -> None:
    """A reward that does not know right from wrong would only add noise to the rule."""
    pairs = answer_pairs(200, np.random.default_rng(UNSEEN))
    rows = [dict(pair[side]) for side in (0, 1) for pair in pairs]
    table = score_examples(load_examples(rows), ["reward"], reward_model=judges / "reward", cache_dir=tmp_path)
    right, wrong = table.values["reward"].reshape(2, -1)
    assert np.mean(right > wrong) >= 0.7


@pytest.mark.parametrize("indicator", QUESTIONS)
def test_unieval_separates_good_from_bad(judges: Path, tmp_path: Path, indicator: str) -> None:
    """The same for the three answers of the T5, each by its own kinds of bad."""
    rows = judged_rows(indicator, 300, np.random.default_rng(UNSEEN))
    examples = load_examples([dict(row) for row, _ in rows])
    table = score_examples(examples, [indicator], unieval_model=judges / "unieval", cache_dir=tmp_path)
    assert roc_auc_score([good for _, good in rows], table.values[indicator]) >= 0.7
    assert 0 <= table.values[indicator].min() < table.values[indicator].max() <= 1


def test_a_seed_decides_the_judges(judges: Path, tmp_path: Path) -> None:
    """Judges that come out otherwise each time would make a demo that cannot be made again."""
    for name in ("one", "two"):
        make_reward(tmp_path / f"reward-{name}", judges / "base", SHORT, seed=1)
        make_unieval(tmp_path / f"unieval-{name}", SHORT, seed=1)
    for kind in ("reward", "unieval"):
        assert checkpoint_identity(tmp_path / f"{kind}-one") == checkpoint_identity(tmp_path / f"{kind}-two")
    make_unieval(tmp_path / "other", SHORT, seed=2)
    assert checkpoint_identity(tmp_path / "other") != checkpoint_identity(tmp_path / "unieval-one")
    assert not list(tmp_path.glob(".*"))


def test_every_word_of_a_question_has_its_token() -> None:
    """A marker that became an unknown word would hide the response, or the dialogue, from the T5."""
    tokenizer = make_unieval_tokenizer()
    pool = make_pool(600, seed=3)
    for indicator in QUESTIONS:
        for question in questions(indicator, pool):
            ids = tokenizer(question.text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.convert_ids_to_tokens(ids) == [*question.text.split(), "</s>"]
    assert [len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in ("Yes", "No")] == [1, 1]


def test_judges_have_not_seen_the_pool() -> None:
    """Judges trained on the pool's questions or flaws would know what no judge of real data can know."""
    pool = make_pool(6000, seed=3)
    asked = {(row["instruction"], row["input"]) for row in pool}
    good = {row["output"] for row in pool if row["quality"]}
    rng = np.random.default_rng(0)
    rows = [row for pair in answer_pairs(2000, rng) for row in pair]
    rows += [row for indicator in QUESTIONS for row, _ in judged_rows(indicator, 2000, rng)]
    assert not asked & {(row["instruction"], row["input"]) for row in rows}
    assert not good & {row["output"] for row in rows}
    assert not set(ANSWERS) & set(FLAWS)
