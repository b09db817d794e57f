"""Answers that are more than a text: calls and thoughts are what the model is trained to write, so they are scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import make_tiny_llama

from im_lightning.data.example import Example, Message
from im_lightning.data.settings import Encoding
from im_lightning.indicators.base import get_indicators
from im_lightning.models import checkpoint
from im_lightning.scoring.api import score_examples
from im_lightning.scoring.plan import ScoringPlan
from im_lightning.scoring.settings import Setup

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
    """Their `ifd` divides the perplexity of all answers by that of the last."""
    turns = (
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Bye"),
        Message("assistant", "See you"),
    )
    marked = (turns[0], Message("assistant", "Hello", trained=False), *turns[2:])
    score_examples([Example(turns), Example(marked), PLAIN], ["ifd"], model)
    assert "ifd: 3 scored; several answers: 1" in capsys.readouterr().err
