"""Answers that are more than a text: calls and thoughts are what the model is trained to write, so they are scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import make_tiny_llama

from im_lightning.data.example import Example, Message
from im_lightning.data.settings import Encoding
from im_lightning.indicators.base import get_indicators
from im_lightning.indicators.transforms import Transform
from im_lightning.models import checkpoint
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.scoring.api import score_examples
from im_lightning.scoring.plan import ScoringPlan
from im_lightning.scoring.settings import Setup
from im_lightning.training.run.scoring import Scorer

CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + (call.function.arguments | tojson) + '</call>' }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CALLS = '{"tool_calls":[{"function":{"arguments":{"city":"Oslo"},"name":"weather"}}]}'


def answered(prompt: str, text: str, fields: str = "") -> Example:
    return Example((Message("user", prompt), Message("assistant", text, fields=fields)))


CALL, EMPTY, PLAIN = answered("Weather?", "", CALLS), answered("Say nothing.", ""), answered("Hi", "Hello")
THOUGHT = answered("2 + 2?", "4", '{"reasoning_content":"Two and two are four."}')


@pytest.fixture
def model(tmp_path: Path) -> str:
    return make_tiny_llama(tmp_path / "base", hidden=16, layers=1, chat_template=CHAT)


def test_a_call_alone_has_a_perplexity(model: str) -> None:
    """Rows of function calls had none, "empty response", and so were in no design and no draw by a rule."""
    table = score_examples([CALL, EMPTY, PLAIN, THOUGHT], ["ppl", "ppl_unconditional", "ifd"], model)
    assert np.isfinite(table.values["ppl"]).tolist() == [True, False, True, True]
    assert table.reasons["ppl"][1] == table.reasons["ifd"][1] == "empty response"
    assert table.reasons["ifd"][0] == table.reasons["ppl_unconditional"][0] == "no response token to predict"


def test_what_earlier_versions_stored_of_a_call_is_taken_back(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: the value then lies in the store beside the old row. An answer that is empty stays what it was."""
    plan = ScoringPlan([CALL, EMPTY], get_indicators(["ppl"]), Setup(Encoding(model)))
    plan.works["ppl"].store.append([CALL.id, EMPTY.id], np.full(2, np.nan), ["empty response"] * 2)
    first = score_examples([CALL, EMPTY], ["ppl"], model)
    assert np.isfinite(first.values["ppl"][0]) and first.reasons["ppl"] == [None, "empty response"]
    monkeypatch.setattr(checkpoint, "load_causal_lm", None)
    again = score_examples([EMPTY, CALL], ["ppl"], model)
    assert again.values["ppl"][1] == first.values["ppl"][0] and again.reasons["ppl"] == ["empty response", None]


def test_conversations_of_several_answers_are_counted(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Their `ifd` divides the perplexity of all answers by that of the last, be it trained or not."""
    turns = (
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Bye"),
        Message("assistant", "See you"),
    )
    marked = (turns[0], Message("assistant", "Hello", trained=False), *turns[2:])
    first = (*turns[:3], Message("assistant", "See you", trained=False))
    score_examples([Example(turns), Example(marked), Example(first), PLAIN], ["ifd", "ppl_unconditional"], model)
    said = capsys.readouterr().err
    assert "ifd: 4 scored; several answers: 2" in said and "ppl_unconditional: 4 scored; 4 computed" in said


def test_lengths_have_another_identity_only_in_pools_with_calls_or_reasoning(model: str) -> None:
    """Earlier versions counted the text alone: their values are not mixed with these, and all others stay valid."""
    names = ["length_input", "length_output", "ppl"]
    plain = score_examples([PLAIN, EMPTY], names, model)
    assert set(plain.keys["length_output"]["identity"]) == {"indicator", "version", "tokenizer"}
    mixed = score_examples([PLAIN, EMPTY, CALL, THOUGHT], names, model)
    marked = {**plain.keys["length_output"]["identity"], "calls and reasoning": "counted"}
    assert mixed.keys["length_output"]["identity"] == marked
    for name in ("length_input", "ppl"):
        assert mixed.keys[name]["identity"] == plain.keys[name]["identity"]
    assert mixed.values["length_output"][:2].tolist() == plain.values["length_output"].tolist()
    assert (mixed.values["length_output"][2:] > 5).all()


def test_lengths_of_calls_under_a_file_are_keyed_by_what_it_says(model: str, tmp_path: Path) -> None:
    """An edited template writes calls otherwise; their lengths came out of the store as the old one had them."""
    own, pool = tmp_path / "own.jinja", [PLAIN, CALL, THOUGHT]
    own.write_text(CHAT)
    first = score_examples(pool, ["length_input", "length_output"], model, template=str(own))
    own.write_text(CHAT.replace("<call>", "<call> a call of a function with these arguments: "))
    other = score_examples(pool, ["length_input", "length_output"], model, template=str(own))
    longer = other.values["length_output"] > first.values["length_output"]
    assert longer.tolist() == [False, True, False]
    assert other.keys["length_input"] == first.keys["length_input"]
    usual = score_examples(pool, ["length_output"], model)
    assert usual.keys["length_output"]["identity"]["calls and reasoning"] == "counted", "what is stored stays valid"


def test_a_share_of_a_pool_is_stored_under_the_identity_of_the_whole(model: str) -> None:
    scorer = Scorer(("length_output",), Setup(Encoding(model)))
    for each in scorer.measured([PLAIN, CALL]).passes([PLAIN]):
        each.run()
    plan = ScoringPlan([PLAIN, CALL], get_indicators(["length_output"]), scorer.setup)
    assert plan.works["length_output"].missing.tolist() == [False, True]


def test_a_rule_holds_in_pools_with_and_without_calls(model: str) -> None:
    """A row without either has the same length in both."""
    tables = [score_examples(pool, ["length_output"], model) for pool in ([PLAIN, EMPTY], [PLAIN, CALL])]
    transforms = {"length_output": Transform("log1p", 0.0, 10.0)}
    for one, other in (tables, tables[::-1]):
        identities = {"length_output": one.keys["length_output"]["identity"]}
        rule = LinearRule("made", 1.0, np.array([0.1]), ["length_output"], transforms, identities=identities)
        assert rule.check(other) == []
