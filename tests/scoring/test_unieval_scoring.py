"""UniEval's dialogue scores against plain transformers calls, through the public path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pools import alpaca, make_pool
from tiny_judges import make_chat_reward, make_unieval

from im_lightning.data.example import Example, Message
from im_lightning.errors import RequestError
from im_lightning.indicators.base import get_indicator
from im_lightning.models.unieval import load_unieval
from im_lightning.scoring.api import score_examples

NAMES = ["naturalness", "coherence", "understandability"]
TURNS = ("user", "Name a colour."), ("assistant", "Red."), ("user", "Another?"), ("assistant", "Blue, of course.")
DIALOGUE = Example(tuple(Message(role, text) for role, text in TURNS))
POOL = [*make_pool(8), DIALOGUE, alpaca("What ends a text?", "The token </s> ends </s> it.")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_unieval(tmp_path_factory.mktemp("unieval"))


def texts(example: Example) -> list[str]:
    """The input strings, written out."""
    r, h = example.response, "\n".join(turn.content for turn in example.messages[:-1]) + "\n\n"
    return [
        f"question: Is this a natural response in the dialogue? </s> response: {r}",
        "question: Is this a coherent response given the dialogue history? </s> response: "
        f"{r} </s> dialogue history: {h}",
        f"question: Is this an understandable response in the dialogue? </s> response: {r}",
    ]


def reference(model: str, text: str) -> float:
    """`maszhongming/UniEval`, metric/scorer.py, for one text: p(Yes) / (p(Yes) + p(No)), the label making the step."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    source = tokenizer([text], max_length=1024, truncation=True, return_tensors="pt")
    labels = tokenizer(["No"], return_tensors="pt").input_ids[:, :1]
    with torch.no_grad():
        logits = loaded(input_ids=source.input_ids, attention_mask=source.attention_mask, labels=labels).logits[0, 0]
    p = logits.double().softmax(dim=0)
    yes, no = (p[tokenizer(word).input_ids[0]] for word in ("Yes", "No"))
    return float(yes / (yes + no))


def test_equals_the_reference(model: str) -> None:
    """Another string, another decoder step or another piece of Yes is another indicator."""
    table = score_examples(POOL, NAMES, unieval_model=model)
    expected = np.array([[reference(model, text) for text in texts(example)] for example in POOL])
    for column, name in enumerate(NAMES):
        np.testing.assert_allclose(table.values[name], expected[:, column], atol=1e-5)
        assert np.std(expected[:, column]) > 0.01


def test_exact_strings() -> None:
    assert [get_indicator(name).judged(DIALOGUE).text for name in NAMES] == texts(DIALOGUE)
    assert texts(DIALOGUE)[1].endswith("Blue, of course. </s> dialogue history: Name a colour.\nRed.\nAnother?\n\n")


def test_does_not_move_with_batches_or_order(model: str, tmp_path: Path) -> None:
    first = score_examples(POOL, NAMES, unieval_model=model, batch_tokens=1)
    other = score_examples(POOL[::-1], NAMES, unieval_model=model, cache_dir=tmp_path / "other")
    for name in NAMES:
        np.testing.assert_allclose(other.values[name][::-1], first.values[name], atol=1e-5)


def test_one_load_for_three_indicators(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from im_lightning.models import unieval

    loads: list[str] = []
    load = unieval.load_unieval
    monkeypatch.setattr(unieval, "load_unieval", lambda name, *rest: loads.append(name) or load(name, *rest))
    score_examples(POOL[:2], NAMES, unieval_model=model)
    assert loads == [model]
    score_examples(POOL[:3], NAMES[:2], unieval_model=model)
    assert len(loads) == 2
    score_examples(POOL[:3], NAMES[:2], unieval_model=model)
    assert len(loads) == 2  # the store had everything


def test_what_was_cut_is_reported(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The response precedes the history: a long one leaves nothing of what it answers."""
    judge = load_unieval(model)
    coherence = get_indicator("coherence")
    # exact at the border: with this many tokens asked, the history keeps a token, or loses the last
    word = " red"

    def length(text: str) -> int:
        return len(judge.tokenizer(text, add_special_tokens=False)["input_ids"])

    assert length(word * 50) == 50
    asked = length(coherence.judged(alpaca("H", "x")).text.removesuffix(" H\n\n"))
    fill = judge.limit - 1 - asked  # words after which nothing of the history is left
    rows = {
        "whole": alpaca("H", "x" + word * (fill - 9)),
        "history cut": alpaca("H" + word * 400, "x" + word * (fill - 2)),
        "history cut away entirely": alpaca("H" + word * 400, "x" + word * fill),
        "history cut away entirely, response cut": alpaca("H", "x" + word * 1200),
    }
    notes = [one.note for one in judge.encode([coherence.judged(row) for row in rows.values()])]
    assert notes == [None, *list(rows)[1:]]
    for row, note in zip(rows.values(), notes, strict=True):
        ids = judge.encode([coherence.judged(row)])[0].ids
        assert len(ids) <= judge.limit and ids[-1] == judge.tokenizer.eos_token_id
        shown = judge.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        after = shown.partition("dialogue history:")[2].replace("</s>", "").strip()
        assert bool(after) == (note in (None, "history cut")), shown[-60:]

    table = score_examples(list(rows.values()), NAMES, unieval_model=model)
    said = capsys.readouterr().err
    assert "naturalness: 4 scored; response cut: 1;" in said
    assert "history cut: 1, history cut away entirely: 1, history cut away entirely, response cut: 1" in said
    expected = reference(model, coherence.judged(list(rows.values())[2]).text)
    np.testing.assert_allclose(table.values["coherence"][2], expected, atol=1e-5)


def test_literal_end_tokens_are_noted(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    score_examples(POOL[-2:], NAMES[:1], unieval_model=model)
    assert "naturalness: 2 scored; special token in the text: 1;" in capsys.readouterr().err


def test_rows_without_something_to_judge_have_a_reason(model: str) -> None:
    rows = [alpaca("Say.", ""), Example((Message("assistant", "Unasked."),)), POOL[0]]
    table = score_examples(rows, NAMES, unieval_model=model)
    assert table.reasons["coherence"] == ["empty response", "nothing before the response", None]
    assert table.reasons["naturalness"] == ["empty response", None, None]


def test_extreme_logits_stay_numbers_and_nan_is_a_reason() -> None:
    """p(Yes) + p(No) is 0 in half precision where another token takes it all; the difference of logits is not."""
    from im_lightning.indicators.base import Answers, Features

    logits = np.array([-800.0, 0.0, 800.0, np.nan, np.inf])
    scores = get_indicator("coherence").compute(Features([DIALOGUE] * 5, answers=Answers(logits, [None] * 5)))
    np.testing.assert_allclose(scores.values[:3], [0.0, 0.5, 1.0], atol=1e-300)
    assert np.isnan(scores.values[3:]).all() and scores.reasons == [None] * 3 + ["the model's logit is not finite"] * 2


def test_half_characters_are_scored(model: str) -> None:
    """JSON carries lone surrogates; one such row must not end a scoring of a million."""
    row = alpaca("Say \ud83d", "It is \ud83d.")
    table = score_examples([row], NAMES, unieval_model=model)
    np.testing.assert_allclose(
        table.values["coherence"], reference(model, texts(alpaca("Say \ufffd", "It is \ufffd."))[1]), atol=1e-5
    )


def test_wrong_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"coherence: a UniEval model is needed.*--unieval-model \(unieval_model=\)"):
        score_examples(POOL, ["coherence"])
    decoder = make_chat_reward(tmp_path / "decoder")
    with pytest.raises(RequestError, match=r"is no sequence-to-sequence model \(llama\).*MingZhong/unieval-dialog"):
        score_examples(POOL, ["coherence"], unieval_model=decoder)
