"""If these failed, rows would be trained on that give away the evaluation, or clean rows would be lost."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from im_lightning.data.example import Example
from im_lightning.data.loading import LoadedRow, iter_rows, load_examples
from im_lightning.data.overlap.keys import EXCLUSIONS, REASONS, left_out, normalised, turns_of
from im_lightning.data.overlap.near import NearRows
from im_lightning.data.overlap.search import find_overlaps
from im_lightning.errors import RequestError


def row(prompt: str, response: str) -> dict[str, str]:
    return {"prompt": prompt, "response": response}


@pytest.mark.parametrize(
    "other",
    [" Add 2.5 and 3. ", "ADD 2.5 AND 3", "Add 2.5, and 3?", "add\n2.5  and 3", "“Add” 2.5 and 3",
     "Ａｄｄ ２．５ and 3"],
)  # fmt: skip
def test_what_does_not_change_the_meaning_does_not_make_another_text(other: str) -> None:
    assert normalised(other) == normalised("Add 2.5 and 3.")


def test_a_mark_that_stands_alone_leaves_nothing() -> None:
    """French sets a space before it: the prompt of an evaluation row was found in no row that leaves it out."""
    found = {normalised(text) for text in ("Traduis ceci\u202f!", "Traduis ceci !!!", "traduis ceci")}
    assert found == {"traduis ceci"}
    assert normalised("Wow ! Great") == normalised("wow great") and normalised("!") == ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2 + 3", "2 - 3"), ("2.5", "25"), ("1,5", "15"), ("x != y", "x = y"), ("f'(x)", "f(x)"), ("5!", "5"),
        ("x²", "x2"), ("a[1:]", "a[1]"), ("is it so", "it is so"), ("can", "can't"), ("über", "uber"), ("猫", "犬"),
    ],
)  # fmt: skip
def test_what_may_change_the_meaning_does(one: str, other: str) -> None:
    """A clean row that is lost is training data gone for nothing."""
    assert normalised(one) != normalised(other)


def test_each_exclusion_takes_in_those_before_it() -> None:
    evaluation = load_examples([row("Name a color.", "Red."), row("Say hi.", "Hi")])
    pool = load_examples(
        [
            row("Name a color.", "Red."),
            row("name a color", "red"),
            row("Name a color", "Blue"),
            row("Name two.", "Red."),
        ]
    )
    expected = {"exact": [0], "normalised": [0, 1], "prompt": [0, 1, 2]}
    for exclude in EXCLUSIONS:
        masks = left_out(pool, evaluation, exclude)
        assert np.flatnonzero(np.any(list(masks.values()), axis=0)).tolist() == expected[exclude]
    assert [int(mask.argmax()) for mask in left_out(pool, evaluation).values()] == [0, 1, 2], "each by its first reason"
    assert left_out(pool, [], "exact")[REASONS["exact"]].tolist() == [False] * 4
    with pytest.raises(RequestError, match=r"there is no 'all'\. Fix: use one of exact, normalised, prompt"):
        left_out(pool, evaluation, "all")


def test_the_same_text_in_another_format_is_found() -> None:
    """Alpaca's border between instruction and input, a system turn: another id, the same row."""
    evaluation = load_examples([{"instruction": "Add.", "input": "2 and 2", "output": "4"}])
    turns = [{"role": "user", "content": "Add.\n2 and 2"}, {"role": "assistant", "content": "4"}]
    pool = load_examples([{"messages": turns}, {"messages": [{"role": "system", "content": "Be brief."}, *turns]}])
    assert left_out(pool, evaluation)[REASONS["normalised"]].all()


def test_a_prompt_is_all_that_precedes_the_answer() -> None:
    """ "Continue" and an empty prompt are no contamination; an evaluated prompt early in a conversation is."""

    def chat(*texts: str) -> dict[str, Any]:
        roles = ("user", "assistant")
        return {"messages": [{"role": roles[k % 2], "content": text} for k, text in enumerate(texts)]}

    evaluation = load_examples(
        [chat("Tell a story", "Once", "Go on", "there was"), chat("Add 2 and 2", "4"), chat("", "x")]
    )
    pool = load_examples(
        [
            chat("Sing", "La", "Go on", "la"),
            chat("Tell a story", "No"),
            chat("", "y"),
            chat("Add 2 and 2", "5", "Sure?", "4"),
        ]
    )
    assert left_out(pool, evaluation)[REASONS["prompt"]].tolist() == [False, False, False, True]


WORDS = [f"w{k}" for k in range(400)]


def texts(seed: int, n: int) -> list[Example]:
    draw = random.Random(seed)
    lengths = [draw.choice([3, 10, 40, 90]) for _ in range(n)]
    return load_examples([row(" ".join(draw.choices(WORDS, k=k)), "yes") for k in lengths])


def edited(examples: list[Example], seed: int) -> list[Example]:
    """Each with some words exchanged."""
    draw, out = random.Random(seed), []
    for example in examples:
        words = example.prompt.split()
        for _ in range(draw.randrange(0, 5)):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        out.append(row(" ".join(words), "yes"))
    return load_examples(out)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 1.0])
def test_no_near_pair_is_missed_and_none_invented(threshold: float) -> None:
    """Against all pairs, with sets of Python."""

    def grams(example: Example) -> set[str]:
        text = f"{normalised(example.prompt)}\n{normalised(example.response)}"
        return {text[k : k + 5] for k in range(len(text) - 4)}

    evaluation = texts(0, 60)
    pool = [*texts(1, 40), *edited(evaluation, 2), *load_examples([row("", "a"), row("ok", "")])]
    found = NearRows(list(map(turns_of, evaluation)), threshold).search(list(map(turns_of, pool)))
    theirs = [grams(example) for example in evaluation]
    for at, example in enumerate(pool):
        mine = grams(example)
        values = [len(mine & other) / len(mine | other) if mine | other else 0.0 for other in theirs]
        best = max(values)
        assert (found.row[at] >= 0) == (best >= threshold), (at, best)
        if best >= threshold:
            assert values[found.row[at]] == pytest.approx(best) == found.similarity[at]
    assert (found.row >= 0).sum() >= 5, "there is something to find"


def test_near_rows_of_texts_without_a_shingle() -> None:
    short = list(map(turns_of, load_examples([row("ab", ""), row("", ""), row("abc", "d")])))
    found = NearRows(short, 0.9).search(short)
    assert found.row.tolist() == [0, -1, 2] and found.similarity.tolist() == [1, 0, 1]
    assert NearRows([], 0.9).search(short).row.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("arguments", [{"near": 0.0}, {"near": 1.2}, {"embed": len, "semantic": 0.0}])
def test_similarities_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"at 1 at most\. Fix: give such as"):
        list(find_overlaps([], [], **arguments))


def test_the_strongest_kind_counts_and_the_places_are_told() -> None:
    evaluation = [row("Name a color of the rainbow.", "Red."), row("What is the capital of France?", "It is Paris.")]
    pool = [
        row("Add.", "4"), row("Name a color of the rainbow.", "Blue"), evaluation[0],
        row("What is the capital of France then?", "It is Paris."), row("What town governs France?", "Paris"),
    ]  # fmt: skip
    vectors = {"What town governs France?": [1.0, 0.1], "What is the capital of France?": [1.0, 0.0]}

    def embed(examples: Any) -> Any:
        array = np.array([vectors.get(example.prompt, [0.0, 1.0]) for example in examples], dtype=np.float32)
        return array / np.linalg.norm(array, axis=1, keepdims=True)

    found = list(find_overlaps(iter_rows(pool), list(iter_rows(evaluation)), 0.6, embed, 0.95))
    told = [(one.kind, one.row, one.evaluation_row, one.place) for one in found if one.row]
    assert told == [
        ("prompt", 1, 0, "rows:2"), ("exact", 2, 0, "rows:3"), ("near", 3, 1, "rows:4"), ("semantic", 4, 1, "rows:5")
    ]  # fmt: skip
    assert found[-1].similarity == pytest.approx(1 / np.hypot(1, 0.1)) and found[-1].text.endswith("\nParis")


def test_an_evaluation_row_without_a_vector_hides_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    """An embedder that knows none of a text's words gives no direction, and the greatest cosine was then NaN."""

    def embed(examples: Any) -> Any:
        return np.array([[np.nan, np.nan] if e.prompt == "∅" else [1.0, 0.0] for e in examples], dtype=np.float32)

    evaluation, pool = [row("∅", "?"), row("What is a town?", "A place.")], [row("Tell of towns.", "They are old.")]
    found = list(find_overlaps(iter_rows(pool), list(iter_rows(evaluation)), None, embed, 0.9))
    assert [(one.kind, one.evaluation_row) for one in found] == [("semantic", 1)]
    assert "1 of 2 evaluation rows have no vector" in capsys.readouterr().err


def test_findings_do_not_depend_on_the_parts_in_which_the_pool_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import im_lightning.data.overlap.search as module

    evaluation = texts(0, 30)
    pool = [*texts(1, 20), *edited(evaluation, 2)]
    rows, asked = ([LoadedRow({}, one, f"f:{k}") for k, one in enumerate(some)] for some in (pool, evaluation))
    whole = list(find_overlaps(rows, asked))
    monkeypatch.setattr(module, "CHUNK", 7)
    assert list(find_overlaps(rows, asked)) == whole and whole
