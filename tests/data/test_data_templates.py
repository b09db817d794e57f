"""Encoding: one wrong token at the border, or one wrong mask, and every score and every loss is of something else."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import make_tokenizer

from im_lightning.data.example import Example, Message
from im_lightning.data.formats import convert
from im_lightning.data.tokenization import (
    Encoded,
    encode_examples,
    encode_unconditional,
    resolve_template,
    unconditional_start,
)
from im_lightning.errors import RequestError

PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ROWS = [
    {"instruction": "Give three tips.", "input": "", "output": "Eat a balanced diet; exercise."},
    {"instruction": "What colors are these?", "input": "red, blue\n", "output": " Primary\n\n"},
    {"instruction": "", "input": "", "output": ""},
    {"instruction": "Describe \x00 the é \U0001f600 atom.", "input": " ", "output": "protons </s> neutrons"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def plain_loop(tokenizer, row: dict) -> tuple[list[int], list[bool], list[bool]]:
    """The reference: one row, strings put together by hand, prompt and response tokenised apart."""
    prompt = (WITH_INPUT if row["input"] else PLAIN).format(**row)
    head = [tokenizer.bos_token_id, *ids(tokenizer, prompt)]
    response = ids(tokenizer, row["output"])
    mask = [False] * len(head) + [True] * len(response)
    return [*head, *response, tokenizer.eos_token_id], [*mask, False], [*mask, True]


def test_alpaca_is_the_plain_concatenation(tokenizer):
    """Perplexities are only comparable with others' if the text is exactly Alpaca's."""
    for row, encoded in zip(ROWS, encode_examples(list(map(convert, ROWS)), tokenizer, "auto"), strict=True):
        expected = plain_loop(tokenizer, row)
        assert (encoded.input_ids.tolist(), encoded.response_mask.tolist(), encoded.loss_mask.tolist()) == expected
        joined = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        assert (encoded.length_input, encoded.length_output) == (
            len(ids(tokenizer, joined)),
            len(ids(tokenizer, row["output"])),
        )
        assert (encoded.truncated_prompt, encoded.truncated_response) == (0, 0)
        assert encoded.input_ids.dtype == np.int32
        assert encoded.response_mask.dtype == encoded.loss_mask.dtype == np.bool_


def test_an_empty_response_has_no_scored_token_but_an_end(tokenizer):
    """Its likelihood is missing, yet training may still learn to stop."""
    (encoded,) = encode_examples([convert(ROWS[2])], tokenizer, "alpaca")
    assert not encoded.response_mask.any() and encoded.loss_mask.sum() == 1 and encoded.length_output == 0


def test_order_and_duplicates(tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Rows are matched by position: blocks and shared texts must not change the order."""
    monkeypatch.setattr("im_lightning.data.tokenization._BLOCK", 3)
    rows = [ROWS[i % 4] | {"instruction": f"Number {i % 5}"} for i in range(11)]
    together = encode_examples(list(map(convert, rows)), tokenizer, "alpaca")
    for row, encoded in zip(rows, together, strict=True):
        assert encoded.input_ids.tolist() == plain_loop(tokenizer, row)[0]
    assert encode_examples([], tokenizer, "alpaca") == []


def test_alpaca_multi_turn_and_system(tokenizer):
    """All assistant turns count, each closed by EOS; a system text takes the place of the opening paragraph."""
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2 2")]
    example = Example(tuple(Message(*turn) for turn in turns))
    (encoded,) = encode_examples([example], tokenizer, "alpaca")
    first = [tokenizer.bos_token_id, *ids(tokenizer, "Be brief.\n\n### Instruction:\nOne?\n\n### Response:")]
    second = ids(tokenizer, "\n\n### Instruction:\nTwo?\n\n### Response:")
    one, two, eos = ids(tokenizer, "1"), ids(tokenizer, "2 2"), [tokenizer.eos_token_id]
    assert encoded.input_ids.tolist() == first + one + eos + second + two + eos
    masks = [(first, 0), (one, 2), (eos, 1), (second, 0), (two, 2), (eos, 1)]
    kinds = np.concatenate([np.full(len(part), kind) for part, kind in masks])
    assert np.array_equal(encoded.response_mask, kinds == 2) and np.array_equal(encoded.loss_mask, kinds > 0)
    assert (encoded.length_input, encoded.length_output) == (len(ids(tokenizer, "Two?")), len(two))


@pytest.mark.parametrize(("bos", "eos"), [(False, True), (True, False), (False, False)])
def test_tokenizers_without_bos_or_eos(bos: bool, eos: bool):
    """Nothing is made up for a tokenizer that lacks them."""
    tokenizer = make_tokenizer(bos=bos, eos=eos)
    (encoded,) = encode_examples([convert(ROWS[0])], tokenizer, "alpaca")
    expected = ids(tokenizer, PLAIN.format(**ROWS[0])) + ids(tokenizer, ROWS[0]["output"])
    expected = [tokenizer.bos_token_id] * bos + expected + [tokenizer.eos_token_id] * eos
    assert encoded.input_ids.tolist() == expected
    assert encoded.loss_mask.sum() - encoded.response_mask.sum() == eos


@pytest.mark.parametrize(("prompt", "response"), [(50, 10), (10, 50), (50, 50), (200, 3), (3, 200), (8, 53), (8, 54)])
@pytest.mark.parametrize("max_length", [8, 64])
def test_truncation_of_one_turn(tokenizer, prompt: int, response: int, max_length: int):
    """The prompt loses its beginning, but keeps BOS and a quarter of the room; then the response loses its end."""
    row = {"instruction": " 1" * prompt, "input": "", "output": "9" * response}
    full = plain_loop(tokenizer, row)[0]
    n_response = len(ids(tokenizer, row["output"]))
    n_prompt = len(full) - n_response - 1
    (encoded,) = encode_examples([convert(row)], tokenizer, "alpaca", max_length)
    assert len(encoded.input_ids) <= max_length < len(full)
    assert (encoded.length_input, encoded.length_output) == (len(ids(tokenizer, row["instruction"])), n_response)
    kept = int(encoded.response_mask.sum())
    head = len(encoded.input_ids) - int(encoded.loss_mask.sum())
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert encoded.input_ids[1:head].tolist() == full[n_prompt - head + 1 : n_prompt]
    assert encoded.input_ids[head : head + kept].tolist() == full[n_prompt : n_prompt + kept]
    assert encoded.truncated_prompt == n_prompt - head and encoded.truncated_response == n_response - kept
    assert head >= min(n_prompt, max_length // 4)
    if encoded.truncated_response:  # only when the prompt could give no more, and then without EOS
        assert head == max_length // 4 and len(encoded.input_ids) == max_length and encoded.response_mask[-1]
        assert encoded.loss_mask.sum() == kept
    if n_response + 1 + max_length // 4 <= max_length:  # it could be kept whole, so it is, with EOS
        assert kept == n_response and encoded.input_ids[-1] == tokenizer.eos_token_id


def test_multi_turn_loses_its_oldest_whole_turns(tokenizer):
    """Half an old question explains nothing."""
    turns = [Message(role, f"{role} {i} 0123456789") for i in range(5) for role in ("user", "assistant")]
    example = Example(tuple(turns))
    (full,) = encode_examples([example], tokenizer, "alpaca", 4096)
    ends = np.flatnonzero(full.input_ids == tokenizer.eos_token_id) + 1
    sizes = np.diff(ends, prepend=1)  # of the five turns, without BOS
    for max_length in range(len(full.input_ids) - 1, int(sizes[-1]), -3):
        (encoded,) = encode_examples([example], tokenizer, "alpaca", max_length)
        kept = int((encoded.input_ids == tokenizer.eos_token_id).sum())
        n = int(sizes[5 - kept :].sum())
        assert encoded.input_ids.tolist() == [tokenizer.bos_token_id, *full.input_ids[-n:]]
        assert encoded.truncated_prompt == sizes[: 5 - kept].sum() and encoded.truncated_response == 0
        assert 1 + n <= max_length < 1 + n + sizes[4 - kept]  # one turn more would not have fitted


def test_lone_surrogates_are_replaced_before_tokenising(tokenizer):
    """Tokenizers written in Rust end the program on them; the id keeps the original."""
    odd, replaced = ({"instruction": "a\ud800b", "input": "", "output": f"c{x}d"} for x in ("\udfff", "\ufffd"))
    replaced["instruction"] = "a\ufffdb"
    first, second = encode_examples([convert(odd), convert(replaced)], tokenizer, "alpaca")
    assert np.array_equal(first.input_ids, second.input_ids)
    assert convert(odd).id != convert(replaced).id


def test_a_very_long_response(tokenizer):
    """A megabyte in one row is truncated, counted, and does not end the run."""
    (encoded,) = encode_examples([convert({**ROWS[0], "output": "lorem ipsum " * 90_000})], tokenizer, "alpaca", 128)
    assert len(encoded.input_ids) == 128 and encoded.response_mask.sum() == 96
    assert encoded.truncated_response == encoded.length_output - 96 > 100_000


def unconditional(tokenizer, response: str) -> Encoded:
    return encode_unconditional([convert({**ROWS[0], "output": response})], tokenizer, 64)[0]


def test_unconditional_is_bos_and_response(tokenizer):
    """`ppl_unconditional` must count the same tokens as `ppl`, with nothing before them."""
    encoded = unconditional(tokenizer, "red, blue")
    response = ids(tokenizer, "red, blue")
    assert encoded.input_ids.tolist() == [tokenizer.bos_token_id, *response]
    assert encoded.response_mask.tolist() == encoded.loss_mask.tolist() == [False] + [True] * len(response)
    assert (encoded.length_input, encoded.length_output) == (0, len(response))
    cut = unconditional(tokenizer, "9 " * 90)
    assert len(cut.input_ids) == 64 and cut.truncated_response == len(ids(tokenizer, "9 " * 90)) - 63
    empty = unconditional(tokenizer, "")
    assert empty.input_ids.tolist() == [tokenizer.bos_token_id] and not empty.response_mask.any()


def test_unconditional_without_bos(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Starts from EOS, or from the second token; which of them is said, once."""
    monkeypatch.setattr("im_lightning.data.tokenization._said", set())
    tokenizer = make_tokenizer(bos=False)
    for _ in range(2):
        encoded = unconditional(tokenizer, "red")
    assert encoded.input_ids[0] == tokenizer.eos_token_id and not encoded.response_mask[0]
    assert capsys.readouterr().err.count("unconditional likelihoods start from EOS") == 1
    tokenizer = make_tokenizer(bos=False, eos=False)
    encoded = unconditional(tokenizer, "red, blue")
    assert encoded.input_ids.tolist() == ids(tokenizer, "red, blue")
    assert not encoded.response_mask[0] and encoded.response_mask[1:].all()
    assert "start from the second token" in capsys.readouterr().err
    assert unconditional_start(tokenizer, resolve_template("auto", tokenizer)) == ([], "second-token")
    assert not unconditional(tokenizer, "").response_mask.any()


def test_identity_is_that_of_the_rendering(tokenizer):
    """Stored scores are found again by it: it must not depend on anything that leaves the text alone."""
    other = make_tokenizer(vocab_size=300, bos=False)
    assert resolve_template("auto", tokenizer).identity == resolve_template("alpaca", other).identity
    assert resolve_template("auto", tokenizer).name == "alpaca"


def test_refusals(tokenizer):
    """A wrong name or length is told before an hour of scoring."""
    with pytest.raises(RequestError, match=r"template 'llama': there is no such template. Fix: use one of auto, al"):
        resolve_template("llama", tokenizer)
    with pytest.raises(RequestError, match=r"template 'chat': the tokenizer .* has no chat template. Fix: use --tem"):
        resolve_template("chat", tokenizer)
    with pytest.raises(RequestError, match=r"max_length 4: is too short to hold a prompt and a response.*at least 8"):
        encode_examples([], tokenizer, "alpaca", 4)
    with pytest.raises(RequestError, match=r"max_length 4"):
        encode_unconditional([], tokenizer, 4)


def test_without_eos_it_is_said_that_nothing_stops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The Alpaca template closes an answer with EOS alone."""
    monkeypatch.setattr("im_lightning.data.tokenization._said", set())
    encode_examples([convert({"instruction": "a", "output": "b"})], make_tokenizer(eos=False), "alpaca")
    assert "the tokenizer has no EOS: nothing teaches the model to stop" in capsys.readouterr().err
