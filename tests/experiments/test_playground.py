"""The playground is what it says: known qualities, sets that do not overlap, a base that has not seen the pool."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from im_lightning.experiments.demo.playground import words
from im_lightning.experiments.demo.playground.base import (
    ASSISTANT,
    EOS,
    USER,
    BaseSettings,
    documents,
    make_base,
    make_tokenizer,
)
from im_lightning.experiments.demo.playground.pool import FLAWS, SOURCES, make_evaluation, make_pool, part_of
from im_lightning.experiments.demo.playground.tasks import BASE_TASKS, POOL_TASKS, Problem

POOL = make_pool(6000, seed=3)


def question(row: dict) -> Problem:
    return Problem(row["task"], row["instruction"], row["input"], row["output"])


def test_a_seed_decides_the_pool() -> None:
    """A demo that cannot be made again shows nothing."""
    assert make_pool(300, seed=3) == make_pool(300, seed=3)
    assert make_pool(300, seed=3) != make_pool(300, seed=4)
    assert make_evaluation("fit", 50, seed=3) == make_evaluation("fit", 50, seed=3)


def test_shares_of_quality_are_as_documented() -> None:
    """The true good share of the comparison table is only as true as this."""
    assert np.mean([row["quality"] for row in POOL]) < 1 / 3
    assert len(SOURCES) >= 6 and all(sum(kinds.values()) == pytest.approx(1.0) for kinds in SOURCES.values())
    assert Counter(row["source"] for row in POOL) == dict.fromkeys(SOURCES, len(POOL) // len(SOURCES))
    for source, kinds in SOURCES.items():
        rows = [row for row in POOL if row["source"] == source]
        for kind, share in kinds.items():
            found = np.mean([row["flaw"] == ("" if kind == "good" else kind) for row in rows])
            assert found == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(rows))), (source, kind)
    assert all(row["quality"] == int(row["flaw"] == "") for row in POOL)
    assert {row["flaw"] for row in POOL} == {*FLAWS, ""}


def check_answer(row: dict) -> bool:
    """Whether the answer is right, worked out anew from the question."""
    given, answer = row["input"].split(), row["output"].split()
    task, end = row["task"], ["."]
    if task == "copy":
        return answer == [*given, "."]
    if task == "reverse":
        return answer == [*reversed(given), "."]
    if task == "sort":
        return answer == [*map(str, sorted(map(int, given))), "."]
    if task == "count":
        return answer == ["the", "list", "has", str(len(given)), "words", *end]
    if task == "arithmetic":
        numbers = [int(word) for word in given if word != "and"]
        return answer == [*" plus ".join(map(str, numbers)).split(), "is", str(sum(numbers)), "."]
    if task == "lookup":
        places = dict(pair.split(" : ") for pair in row["input"].split(" , "))
        (asked,) = [place for place in places if place in row["instruction"].split()]
        return answer == ["the", asked, "holds", "the", places[asked], "."]
    if task == "rewrite":
        name, verb, the, adjective, thing = given
        return answer == [the, adjective, thing, "is", words.VERBS[verb], "by", name, "."]
    left, right = given
    return row["output"] == f"{left} belongs to {words.KIND_OF[left]} and {right} to {words.KIND_OF[right]} ."


def test_good_answers_are_right_and_flawed_ones_are_not() -> None:
    assert {row["task"] for row in POOL} == {task.name for task in POOL_TASKS}
    for row in POOL:
        assert check_answer(row) == bool(row["quality"]), row


def test_pool_and_evaluation_sets_share_no_content() -> None:
    """An evaluation row seen in training would make memorising look like quality; a rule's own set, like foresight."""
    sets = {name: make_evaluation(name, 480, seed=3) for name in ("fit", "report")} | {"pool": POOL}
    asked = {name: {(row["task"], row["input"]) for row in rows} for name, rows in sets.items()}
    assert not asked["fit"] & asked["report"] and not asked["pool"] & (asked["fit"] | asked["report"])
    for name, rows in sets.items():
        assert {part_of(question(row)) for row in rows} == {name}
        prompts = [(row["instruction"], row["input"]) for row in rows]
        assert len(set(prompts)) == len(prompts)
    for name in ("fit", "report"):
        assert all(row["quality"] == 1 for row in sets[name])
        assert set(Counter(row["task"] for row in sets[name]).values()) == {60}


def test_the_base_has_not_seen_the_pool() -> None:
    """A base that knows the pool's tasks would leave the finetunes nothing to teach, and the loss nothing to show."""
    pool, base = ({p for task in tasks for p in task.phrasings} for tasks in (POOL_TASKS, BASE_TASKS))
    assert not pool & base and not {t.name for t in POOL_TASKS} & {t.name for t in BASE_TASKS}
    asked = {f"{USER} {row['instruction']} {row['input']} {ASSISTANT}" for row in POOL}
    answered = {f"{ASSISTANT} {row['output']} {EOS}" for row in POOL if row["quality"]}
    corpus = documents(4000, seed=0)
    talks = [text.removeprefix("<s> ").split(ASSISTANT) for text in corpus if ASSISTANT in text]
    assert len(talks) > 1000
    assert not {prompt + ASSISTANT for prompt, _ in talks} & asked
    assert not {ASSISTANT + answer for _, answer in talks} & answered


def test_every_word_has_its_token() -> None:
    """An unknown word would make different answers look the same to the model."""
    tokenizer = make_tokenizer()
    texts = [f"{row['instruction']} {row['input']} {row['output']}" for row in POOL] + documents(2000, seed=1)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert all(tokenizer.unk_token_id not in row for row in ids)
    assert [len(row) for row in ids] == [len(text.split()) for text in texts]


def test_the_base_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    """Made twice it is the same; it is loaded by the code that loads real ones; training lowers its loss."""
    from im_lightning.models.checkpoint import checkpoint_identity, load_causal_lm, load_tokenizer

    settings = BaseSettings(hidden=32, layers=1, heads=2, steps=30, batch=16, block=32, documents=1000, warmup=5)
    made = make_base(tmp_path / "base", settings, seed=1)
    make_base(tmp_path / "again", settings, seed=1)
    assert checkpoint_identity(tmp_path / "base") == checkpoint_identity(tmp_path / "again")
    model, tokenizer = load_causal_lm(tmp_path / "base"), load_tokenizer(tmp_path / "base")
    assert sum(p.numel() for p in model.parameters()) == made["parameters"] < 1_000_000
    assert made["loss"] < 0.9 * np.log(len(tokenizer))
    assert not list(tmp_path.glob(".*"))
