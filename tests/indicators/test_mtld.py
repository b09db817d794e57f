"""MTLD: the published vectors and parity with lexicalrichness. Tools disagree by whole points on the same text."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lexicalrichness import LexicalRichness

from im_lightning.data.example import Example, Message
from im_lightning.errors import RequestError
from im_lightning.indicators import mtld as mtld_module
from im_lightning.indicators.base import Features, Missing, get_indicator
from im_lightning.indicators.mtld import MODES, mtld, mtld_of_texts, words


def example(response: str) -> Example:
    return Example((Message("user", "?"), Message("assistant", response)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("of the people by the people for the people", 9.0),
        (" ".join("a" * 10), 2.0),
        (" ".join("a" * 100), 2.0),
        ("a b c d e f g h i j j", 22.44),
        (" ".join("abcdefghijklmnopqr" + "abcdefg"), 25.0),
        ("a b c d e f g", 7.0),
    ],
)
def test_known_vectors(text: str, expected: float, mode: str) -> None:
    assert round(mtld(text.split(), mode), 2) == expected


def test_modes_differ_exactly_at_the_threshold() -> None:
    """18 types in 25 tokens is a ratio of exactly 0.72: what comes next shows which side it fell on."""
    tokens = list("abcdefghijklmnopqr" + "abcdefg" + "stuvw")
    assert mtld(tokens, "lexicalrichness") == LexicalRichness(tokens, preprocessor=None, tokenizer=None).mtld(0.72)
    assert mtld(tokens, "strict") > mtld(tokens, "lexicalrichness")


def test_equals_lexicalrichness_on_random_texts() -> None:
    rng = random.Random(0)
    text = "the a of cat dog's well-known it's 3.14 2024 end-of-line naïve — – _x_ foo_bar (yes) no! ÉCOLE straße don’t"
    pieces = [*text.split(), *"abcdefghij", "\n", "\t", "..."]
    compared = 0
    for _ in range(400):
        text = " ".join(rng.choices(pieces, k=rng.randint(1, 300)))
        reference = LexicalRichness(text)
        assert words(text, "lexicalrichness") == reference.wordlist
        if reference.words:
            assert mtld(reference.wordlist, "lexicalrichness") == pytest.approx(reference.mtld(0.72), rel=1e-12)
            value = get_indicator("mtld_lexicalrichness").score(example(text))
            assert value == pytest.approx(reference.mtld(0.72), rel=1e-12)
            compared += 1
    assert compared > 350


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=200))
def test_bounds_and_symmetry(tokens: list[str]) -> None:
    value = mtld(tokens)
    assert 1.0 <= value < float("inf")
    assert value == pytest.approx(mtld(tokens[::-1]))


def test_words_of_the_default_mode() -> None:
    text = "It's the café's 2nd well-known _thing_ — don’t 'quote' rock-'n'-roll"
    expected = "it's the café's 2nd well-known thing don’t quote rock n roll"
    assert words(text) == expected.split()


def test_texts_without_words_have_a_reason_not_a_number() -> None:
    indicator = get_indicator("mtld")
    with pytest.raises(Missing, match="empty response"):
        indicator.score(example(""))
    with pytest.raises(Missing, match="no words in the response"):
        indicator.score(example("?! ..."))


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(RequestError, match=r"mtld mode 'koRpus': is not known.*strict, lexicalrichness"):
        mtld(["a"], "koRpus")


def one_by_one(text: str, mode: str) -> float:
    tokens = words(text, mode)
    return mtld(tokens, mode) if tokens else float("nan")


@pytest.mark.parametrize("mode", MODES)
def test_many_texts_at_once_have_the_values_of_each(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways to one number: the fast one must not be another one, whatever characters come."""
    monkeypatch.setattr(mtld_module, "_TEXTS", 300)
    rng = random.Random(1)
    marks = "a b c d e f g The THE the - ' ’ -' '- — – -- a-b it's o'b-c 3 2024 1st _ _x_ , . ( é É ß ΟΔΟΣ İ ñ 中文"
    pieces = [
        *marks.split(" "),
        "\x1c",
        "\x85",
        "\u3000",
        "\xa0",
        "\ud800",
        "\0",
        "\x01",
        "K",
        "ſ",
        "aΣ",
        "\n",
        "\t",
        "",
    ]
    texts = ["", " ", "'", "-", "a", "'a'", "\0", "a\0a b", "— 3", "x " * 700, "É" * 5]
    for separator in ("", " "):
        for _ in range(300):
            texts.append(separator.join(rng.choices(pieces, k=rng.randint(0, 120))))
    texts += [" ".join(rng.choices("abcdefgh", k=rng.randint(200, 900))) for _ in range(60)]  # ties at 18 of 25
    np.testing.assert_array_equal(mtld_of_texts(texts, mode), [one_by_one(text, mode) for text in texts])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=12), st.sampled_from(MODES))
def test_many_texts_at_once_on_any_unicode(texts: list[str], mode: str) -> None:
    np.testing.assert_array_equal(mtld_of_texts(texts, mode), [one_by_one(text, mode) for text in texts])


def test_a_whole_pool_keeps_its_reasons() -> None:
    assert np.isnan(mtld_of_texts(["\0", "\x01"])).all() and len(mtld_of_texts([])) == 0
    scores = get_indicator("mtld").compute(Features([example("a b"), example(""), example("?!")]))
    assert scores.reasons == [None, "empty response", "no words in the response"]
    assert scores.values[0] == 2.0


CHINESE = "我们今天一起去公园散步看花然后回家吃饭休息看书写字画画唱歌跳舞睡觉"
THAI, JAPANESE = "วันนี้เราไปเดินเล่นที่สวนสาธารณะด้วยกัน", "今日はみんなで公園へ散歩に行きました"


@pytest.mark.parametrize("text", [CHINESE, THAI, JAPANESE, f"Answer: {CHINESE}"])
def test_scripts_without_spaces_have_a_reason_not_a_number(text: str) -> None:
    """Thirty-three different characters without a space are not one word said once."""
    scores = get_indicator("mtld").compute(Features([example(text), example("a b a b")]))
    assert np.isnan(scores.values[0]) and scores.reasons[0] == "written without spaces between words"
    assert scores.reasons[1] is None
    with pytest.raises(Missing, match="written without spaces"):
        get_indicator("mtld").score(example(text))


WITH_SPACES = [
    *("Das Wetter ist schön heute", "오늘 우리는 공원에 갔다", "Сегодня мы гуляли"),
    "The sky (天) is blue, the sun is warm",
]


@pytest.mark.parametrize("text", WITH_SPACES)
def test_scripts_with_spaces_keep_their_value(text: str) -> None:
    """Korean, Cyrillic and a foreign word in an English answer."""
    assert get_indicator("mtld").score(example(text)) == mtld(words(text))
