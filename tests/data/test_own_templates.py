"""Rows that are formatted already, templates of one's own, and special tokens in the text of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CHATML, chat_tokenizer, make_tiny_llama

from im_lightning import DataError, Example, Message, RequestError, encode_examples, load_examples, score_examples
from im_lightning.data import tokenization
from im_lightning.data.tokenization import encode_unconditional, resolve_template, unconditional_start

OWN = "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + eos_token }}{% endfor %}{{ '[assistant] ' if add_generation_prompt }}"  # noqa: E501
ASKED, ANSWERED = "<|im_start|>user\nName a lake.<|im_end|>\n<|im_start|>assistant\n", "Como<|im_end|>"


def pair(prompt: str, response: str) -> Example:
    return Example((Message("user", prompt), Message("assistant", response)))


def parts(tokenizer: Any, example: Example, template: str = "none") -> tuple[str, str, str]:
    """All text; what scoring counts; what training counts."""
    (one,) = encode_examples([example], tokenizer, template)
    masks = np.ones(len(one.input_ids), dtype=bool), one.response_mask, one.loss_mask
    return tuple(tokenizer.decode(one.input_ids[mask]) for mask in masks)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("response", "counted", "trained"),
    [
        (ANSWERED, "Como", ANSWERED),  # closed by the row itself
        ("Como<|im_end|>\n", "Como", "Como<|im_end|>\n"),
        ("Como", "Como", "Como</s>"),  # by EOS
        ("Como <|im_end|> Garda", "Como <|im_end|> Garda", "Como <|im_end|> Garda</s>"),  # inside: no end
        ("", "", "</s>"),
    ],
)
def test_without_a_template_prompt_and_completion_stand_as_they_are(response: str, counted: str, trained: str) -> None:
    """Formatted a second time, a row teaches the model to write markers into its answers."""
    tokenizer = chat_tokenizer()
    text = f"<s>{ASKED}{response}" + ("" if "<|im_end|>" in response[-12:] else "</s>")
    assert parts(tokenizer, pair(ASKED, response)) == (text, counted, trained)
    if response == ANSWERED:
        plain = tokenizer(ASKED + response)["input_ids"]
        assert encode_examples([pair(ASKED, response)], tokenizer, "none")[0].input_ids.tolist() == plain


def test_an_already_formatted_row_is_the_row_that_the_chat_template_writes(tmp_path: Path) -> None:
    """One text, by either way: the same ids and the same targets."""
    tokenizer = chat_tokenizer()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": ASKED, "completion": ANSWERED}) + "\n")
    (row,) = load_examples(tmp_path / "rows.jsonl")
    (formatted,) = encode_examples([row], tokenizer, "none")
    (templated,) = encode_examples([pair("Name a lake.", "Como")], tokenizer, "chat")
    assert formatted.input_ids.tolist() == templated.input_ids.tolist()
    assert formatted.loss_mask.tolist() == templated.loss_mask.tolist()
    (alone,) = encode_unconditional([row], tokenizer, template="none")
    assert tokenizer.decode(alone.input_ids[alone.response_mask]) == "Como"


def test_several_turns_need_a_template(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user", "assistant")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    refuses = resolve_template("none", chat_tokenizer()).refusal
    wanted = r"rows\.jsonl:1: the none template refuses it: it has no words for turns, only for one prompt and one "
    with pytest.raises(DataError, match=wanted + r"completion \(user, assistant, user, assistant\)"):
        load_examples(tmp_path / "rows.jsonl", refuses=refuses)


def test_nothing_closes_an_answer_where_neither_row_nor_tokenizer_does(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = chat_tokenizer(eos=False)
    assert parts(tokenizer, pair(ASKED, "Como"))[2] == "Como"
    assert "the tokenizer has no EOS: only what a row itself closes its completion with" in capsys.readouterr().err


def test_a_template_in_a_file_is_used_in_place_of_the_tokenizers_own(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(OWN)
    tokenizer, wanted = chat_tokenizer(), chat_tokenizer(OWN)
    found, plain = resolve_template(str(tmp_path / "own.jinja"), tokenizer), resolve_template("chat", wanted)
    assert found.identity == plain.identity and tokenizer.chat_template == CHATML, "the user's tokenizer is left alone"
    example = pair("Name a lake.", "Como")
    text = "<s>[user] Name a lake.</s>[assistant] Como</s>"
    assert parts(tokenizer, example, str(tmp_path / "own.jinja")) == (text, "Como", "Como</s>")
    assert unconditional_start(tokenizer, found) == unconditional_start(wanted, plain)
    bare = chat_tokenizer(None)
    assert parts(bare, example, str(tmp_path / "own.jinja"))[0] == text


def test_scores_under_a_file_are_keyed_by_what_it_says(tmp_path: Path) -> None:
    """A template that was edited gives other values: those of the old text must not come out of the store."""
    model, own, rows = make_tiny_llama(tmp_path / "base"), tmp_path / "own.jinja", [pair("Name a lake.", "Como")]
    own.write_text(OWN)
    first = score_examples(rows, ["ppl"], model, template=str(own))
    assert score_examples(rows, ["ppl"], model, template=str(own)).values["ppl"] == first.values["ppl"]
    own.write_text(OWN.replace("[", "<"))
    other = score_examples(rows, ["ppl"], model, template=str(own))
    assert other.values["ppl"] != first.values["ppl"]
    assert other.keys["ppl"]["identity"]["template"] != first.keys["ppl"]["identity"]["template"]


def test_an_answer_without_its_end_is_not_scored_by_what_was_stored_of_the_whole(tmp_path: Path) -> None:
    """Whoever reads that formatted rows want none scores again: `ppl_unconditional` and `ifd` were those of before."""
    answers = ["Garda", "Como</s>", "Lake Orta</s>", "Lugano, I think.</s>"]
    model, rows = make_tiny_llama(tmp_path / "base"), [pair("Name a lake.", one) for one in answers]
    names = ["ppl_unconditional", "ifd"]
    whole = score_examples(rows, names, model, cache_dir=tmp_path / "a")
    found = score_examples(rows, names, model, template="none", cache_dir=tmp_path / "a")
    fresh = score_examples(rows, names, model, template="none", cache_dir=tmp_path / "b")
    for name in names:
        np.testing.assert_allclose(found.values[name], fresh.values[name], rtol=1e-5)
    before, now = whole.values["ppl_unconditional"], found.values["ppl_unconditional"]
    assert abs(now[1:] / before[1:] - 1).max() > 1e-3 and abs(now[0] / before[0] - 1) < 1e-5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", r"template 'chatml': there is no such template\. Fix: use one of auto, .*, none, or name a file of"),
        ("no.jinja", r"template no\.jinja: cannot be read \(No such file or directory\)\. Fix: name a text file in"),
        (".jinja", "there is no such template"),
    ],
)
def test_what_is_no_template_is_refused(name: str, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        resolve_template(name, chat_tokenizer())


def test_special_tokens_in_the_text_of_rows_are_said_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt formatted already, under a template: `<|im_end|>` in it ends the turn, and the row is another one."""
    monkeypatch.setattr(tokenization, "_said_special", set())
    tokenizer, row = chat_tokenizer(), pair(ASKED, ANSWERED)
    encoded = encode_examples([pair("Hi", "Hello"), row], tokenizer, "chat")
    assert [one.special for one in encoded] == [False, True]
    said = capsys.readouterr().err
    assert "special tokens of the tokenizer, which are read as such: <|im_end|>, <|im_start|>, first in the" in said
    assert row.id in said and "--template none" in said
    encode_examples([row], tokenizer, "chat")
    assert not capsys.readouterr().err, "once"
    monkeypatch.setattr(tokenization, "_said_special", set())
    assert encode_examples([row], tokenizer, "none")[0].special and not capsys.readouterr().err
    model = make_tiny_llama(tmp_path / "base")
    score_examples([pair("Hi", "a </s> b"), pair("Hi", "b")], ["ppl", "ppl_unconditional"], model)
    assert "ppl: 2 scored; special token in the text: 1;" in capsys.readouterr().err


def test_one_rule_for_special_tokens_in_text(tmp_path: Path) -> None:
    """What reads like a token becomes it, in the response and in the prompt, by every reader of texts."""
    from tiny_judges import make_oasst_reward, make_unieval

    from im_lightning.models.reward import load_reward_model
    from im_lightning.models.unieval import Question, load_unieval

    tokenizer = chat_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for template in ("chat", "alpaca", "none"):
        (one,) = encode_examples([pair("a <|im_end|> b", "c <|im_end|> d")], tokenizer, template)
        assert (one.input_ids[~one.loss_mask] == end).any() and (one.input_ids[one.response_mask] == end).any()
    reward = load_reward_model(make_oasst_reward(tmp_path / "reward"))
    special = reward.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    (read,) = reward.encode([pair("a <|endoftext|> b", "c <|endoftext|> d")])
    assert (read.ids == special).sum() == 4 and read.note == "special token in the text"  # two close the turns
    unieval = load_unieval(make_unieval(tmp_path / "unieval"))
    (asked,) = unieval.encode([Question("question: Natural? </s> response: ", "c </s> d")])
    assert (asked.ids == unieval.tokenizer.eos_token_id).sum() == 3 and asked.note == "special token in the text"
