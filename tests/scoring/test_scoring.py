"""`score_examples` end to end on a tiny LLaMA: right values, nothing computed twice, nothing lost, nothing invented."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pools import alpaca, make_pool
from tiny import CHATML, make_tiny_llama

from im_lightning.data import prompt_templates
from im_lightning.data.example import Example
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.settings import Encoding
from im_lightning.data.tokenization import encode_examples, encode_unconditional
from im_lightning.errors import RequestError
from im_lightning.indicators import base
from im_lightning.indicators.base import Indicator, register_indicator
from im_lightning.models import checkpoint
from im_lightning.scoring.api import default_indicators, score_examples
from im_lightning.scoring.passes import language_model
from im_lightning.scoring.settings import ScorerModels, Setup

ALL = ["length_input", "length_output", "mtld", "ppl", "ppl_unconditional", "ifd", "knn_6", "knn_1"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts model loads, tokenizer loads and rows sent through the model."""
    counts = {"models": 0, "tokenizers": 0, "rows": 0}

    def count(name: str, real: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(checkpoint, "load_causal_lm", count("models", checkpoint.load_causal_lm))
    monkeypatch.setattr(checkpoint, "load_tokenizer", count("tokenizers", checkpoint.load_tokenizer))
    real = language_model.LanguageModelPass.forward

    def forward(self: Any, side: Any, at: np.ndarray) -> Any:
        counts["rows"] += len(at)
        return real(self, side, at)

    monkeypatch.setattr(language_model.LanguageModelPass, "forward", forward)
    return counts


def same(a: ScoreTable, b: ScoreTable, rtol: float = 0.0) -> None:
    assert a.id == b.id and a.indicators == b.indicators and a.reasons == b.reasons
    for name in a.values:
        np.testing.assert_allclose(a.values[name], b.values[name], rtol=rtol, atol=0)


def plain_ppl(model: Any, encoded: Any) -> float:
    """exp of the mean NLL of one row's response tokens from full logits, alone in its batch."""
    ids = torch.tensor(encoded.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    at = [t for t in range(1, len(encoded.input_ids)) if encoded.response_mask[t]]
    return float(np.exp(-np.mean([float(log_probs[t - 1, ids[0, t]]) for t in at])))


def test_values_equal_a_plain_loop(tiny_llama: str) -> None:
    """The first promise: the numbers are what a person would compute by hand, one row at a time."""
    pool = [*make_pool(), alpaca("a" * 300, "b c " * 200)]
    table = score_examples(pool, ["ppl", "ppl_unconditional", "ifd", "length_output"], tiny_llama, max_length=128)
    model, tokenizer = checkpoint.load_causal_lm(tiny_llama), checkpoint.load_tokenizer(tiny_llama)
    given = [plain_ppl(model, e) for e in encode_examples(pool, tokenizer, "alpaca", 128)]
    alone = [plain_ppl(model, e) for e in encode_unconditional(pool, tokenizer, 128)]
    np.testing.assert_allclose(table.values["ppl"], given, rtol=1e-4)
    np.testing.assert_allclose(table.values["ppl_unconditional"], alone, rtol=1e-4)
    np.testing.assert_allclose(table.values["ifd"], np.array(given) / alone, rtol=2e-4)
    assert table.values["length_output"].tolist() == [
        len(tokenizer(e.response, add_special_tokens=False).input_ids) for e in pool
    ]


def test_order_and_batching_do_not_matter(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    whole = score_examples(pool, ALL, tiny_llama, cache_dir=tmp_path / "a")
    monkeypatch.setattr(language_model, "PART_ROWS", 5)
    backwards = score_examples(pool[::-1], ALL, tiny_llama, cache_dir=tmp_path / "b", batch_tokens=1)
    same(whole, ScoreTable.take(backwards, np.arange(len(pool))[::-1]), rtol=1e-4)


def test_second_scoring_loads_nothing(tiny_llama: str, counted: dict[str, int], capsys: Any) -> None:
    pool = make_pool()
    first = score_examples(pool, ALL, tiny_llama)
    assert counted == {"models": 1, "tokenizers": counted["tokenizers"], "rows": 2 * len(pool)}
    counted.update(models=0, tokenizers=0, rows=0)
    capsys.readouterr()
    second = score_examples(pool, ALL, tiny_llama)
    assert counted == {"models": 0, "tokenizers": 0, "rows": 0}
    assert "everything was in the store; no model was loaded" in capsys.readouterr().err
    same(first, second)
    assert first.keys == second.keys
    shuffled = score_examples(pool[::-1], ALL, tiny_llama)  # the pool is the same whatever its order
    assert counted["models"] == 0
    same(first, shuffled.take(np.arange(len(pool))[::-1]))


def test_interrupt_keeps_what_was_finished(
    tiny_llama: str, tmp_path: Path, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after hours must not cost the hours."""
    pool = make_pool()
    whole = score_examples(pool, ["ppl", "ifd", "knn_6"], tiny_llama, cache_dir=tmp_path / "whole")
    counting = language_model.LanguageModelPass.forward
    counted["rows"] = 0

    def forward(self: Any, side: Any, at: np.ndarray) -> Any:
        if counted["rows"] >= 30:
            raise KeyboardInterrupt
        return counting(self, side, at)

    with monkeypatch.context() as patch:
        patch.setattr(language_model.LanguageModelPass, "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            score_examples(pool, ["ppl", "ifd", "knn_6"], tiny_llama, cache_dir=tmp_path / "c", batch_tokens=200)
    done = counted["rows"]
    assert 30 <= done < 48
    resumed = score_examples(pool, ["ppl", "ifd", "knn_6"], tiny_llama, cache_dir=tmp_path / "c", batch_tokens=200)
    assert counted["rows"] == 2 * len(pool)  # exactly the rest
    same(whole, resumed, rtol=1e-4)


def test_only_new_rows_and_new_indicators_are_computed(tiny_llama: str, counted: dict[str, int]) -> None:
    pool = make_pool(20)
    score_examples(pool[:12], ["ppl"], tiny_llama)
    counted.update(rows=0)
    score_examples(pool, ["ppl"], tiny_llama)
    assert counted["rows"] == 8
    counted.update(rows=0)
    score_examples(pool, ["ppl", "ppl_unconditional"], tiny_llama)
    assert counted["rows"] == 20  # the responses alone; ppl is known
    counted.update(models=0, rows=0)
    score_examples(pool, ["ppl", "length_input", "mtld"], tiny_llama)
    assert counted["models"] == 0  # lengths need the tokenizer only


def test_duplicates_are_scored_once_and_are_neighbours_at_zero(tiny_llama: str, counted: dict[str, int]) -> None:
    pool = make_pool(10)
    twins = [*pool, Example(pool[3].messages, pool[3].instruction, pool[3].input, source="elsewhere")]
    table = score_examples(twins, ["ppl", "knn_1"], tiny_llama)
    assert counted["rows"] == 10
    assert table.values["ppl"][3] == table.values["ppl"][10]
    assert table.values["knn_1"][3] == table.values["knn_1"][10] == 0.0
    assert (np.delete(table.values["knn_1"], [3, 10]) > 0).all()
    assert table.source[10] == "elsewhere" and table.row.tolist() == list(range(11))


def test_missing_values_have_reasons(tiny_llama: str, tmp_path: Path) -> None:
    pool = [*make_pool(3), alpaca("say nothing", ""), alpaca("wink", ";-) !")]
    table = score_examples(pool, ALL, tiny_llama)
    for name in ("mtld", "ppl", "ppl_unconditional", "ifd"):
        assert table.reasons[name][3] == "empty response" and np.isnan(table.values[name][3])
    assert table.values["length_output"][3] == 0 and table.values["length_input"][3] > 0
    assert table.reasons["mtld"][4] == "no words in the response" and table.values["ppl"][4] > 0
    assert set(table.reasons["knn_6"]) == {"the pool has fewer than 6 other examples"}
    again = score_examples(pool, ALL, tiny_llama)  # NaN with a reason is a result: stored, not tried again
    same(table, again)
    broken = tmp_path / "broken"
    model = checkpoint.load_causal_lm(tiny_llama)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    shutil.copytree(tiny_llama, broken)
    model.save_pretrained(broken)
    table = score_examples(pool, ["ppl"], str(broken))
    assert table.reasons["ppl"] == [*["the model's loss is not finite"] * 3, "empty response", table.reasons["ppl"][0]]


def test_truncation_is_counted_each_time(tiny_llama: str, capsys: Any) -> None:
    pool = [*(alpaca("add", f"{i}") for i in range(4)), alpaca("a b " * 200, "c d " * 200)]
    for _ in range(2):  # the second time from the store
        score_examples(pool, ["ppl", "ppl_unconditional"], tiny_llama, max_length=200)
        said = capsys.readouterr().err
        assert "coverage of 5 rows" in said and "prompt and response cut: 1" in said


def test_other_numerics_are_used_with_a_warning_other_identities_never(
    tiny_llama: str, counted: dict[str, int], capsys: Any
) -> None:
    pool = make_pool(6)
    half = score_examples(pool, ["ppl"], tiny_llama, precision="bf16")
    counted.update(rows=0)
    capsys.readouterr()
    full = score_examples(pool, ["ppl"], tiny_llama)  # auto: fp32 for so narrow a model
    assert counted["rows"] == 0
    same(half, full)
    said = capsys.readouterr().err
    assert "6 of 6 stored values were computed with other numerics (precision bf16, now fp32)" in said
    assert full.keys["ppl"]["numerics"]["precision"] == "bf16"  # what they are, not what was asked for
    score_examples(pool, ["ppl"], tiny_llama, max_length=512)
    assert counted["rows"] == 6


def test_values_in_bf16_are_no_answer_to_a_request_for_fp32(
    tiny_llama: str, counted: dict[str, int], tmp_path: Path, capsys: Any
) -> None:
    """Who asks for fp32 is promised values equal to the plain loop's to 1e-4; `auto` takes what is there."""
    names = ["ppl", "ifd", "knn_2", "length_output", "mtld"]
    pool = make_pool(6)
    plain = score_examples(pool, names, tiny_llama, precision="fp32", cache_dir=tmp_path / "other")
    half = score_examples(pool, names, tiny_llama, precision="bf16")
    counted.update(rows=0)
    capsys.readouterr()
    full = score_examples(pool, names, tiny_llama, precision="fp32")
    said = capsys.readouterr().err
    assert counted["rows"] == 12, "both passes again: with the prompt and without it"
    assert "ppl: stored values of another precision than fp32 are left aside" in said
    assert "length_output: stored" not in said and "used as they are" not in said
    same(plain, full)
    assert (half.values["ppl"] != full.values["ppl"]).all() and (half.values["knn_2"] != full.values["knn_2"]).any()
    assert {full.keys[name]["numerics"]["precision"] for name in ("ppl", "ifd", "knn_2")} == {"fp32"}
    counted.update(rows=0)
    for precision in ("fp32", "auto"):
        same(full, score_examples(pool, names, tiny_llama, precision=precision))
    same(half, score_examples(pool, names, tiny_llama, precision="bf16"))
    assert counted["rows"] == 0, "both are kept"


def test_changed_weights_are_another_model(tiny_llama: str, tmp_path: Path) -> None:
    pool, folder = make_pool(4), tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    before = score_examples(pool, ["ppl", "length_input"], folder)
    model = checkpoint.load_causal_lm(folder)
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    model.save_pretrained(folder)
    after = score_examples(pool, ["ppl", "length_input"], folder)
    assert (before.values["ppl"] != after.values["ppl"]).all()
    assert before.keys["ppl"]["identity"] != after.keys["ppl"]["identity"]
    assert before.keys["length_input"] == after.keys["length_input"]  # the tokenizer is the same


def test_knn_follows_the_pool_and_embeddings_are_kept(tiny_llama: str, counted: dict[str, int]) -> None:
    pool = make_pool(20)
    small = score_examples(pool[:10], ["knn_2"], tiny_llama)
    counted.update(rows=0)
    large = score_examples(pool, ["knn_2", "knn_5"], tiny_llama)
    assert counted["rows"] == 10  # the other ten only
    assert (large.values["knn_2"][:10] <= small.values["knn_2"]).all()
    assert (large.values["knn_2"][:10] < small.values["knn_2"]).any()
    assert small.keys["knn_2"]["identity"] == large.keys["knn_2"]["identity"]
    assert small.keys["knn_2"]["pool"] != large.keys["knn_2"]["pool"]


@pytest.mark.usefixtures("forget_registrations")
def test_custom_indicators_of_text_and_of_likelihoods() -> None:
    @register_indicator("question_marks")
    class QuestionMarks(Indicator):
        def score(self, example: Example) -> float:
            return float(example.response.count("?"))

    table = score_examples([alpaca("hm", "what? why?")], ["question_marks"])
    assert table.values["question_marks"].tolist() == [2.0]

    class Raised(QuestionMarks):
        version = 2

        def score(self, example: Example) -> float:
            return -1.0

    base._registered["question_marks"] = Raised
    assert score_examples([alpaca("hm", "what? why?")], ["question_marks"]).values["question_marks"].tolist() == [-1.0]


def test_what_a_template_comes_down_to_is_remembered_until_its_code_changes(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an update that renders otherwise would take stored values for its own, or every scoring load a tokenizer."""
    encoding = Encoding(tiny_llama, cache_dir=str(tmp_path))
    known = Setup(encoding).template
    [note] = tmp_path.glob("templates/*.json")
    note.write_text(note.read_text().replace(known, "as remembered"))
    assert Setup(encoding).template == "as remembered"
    other = tmp_path / "prompt_templates.py"
    other.write_text("# renders otherwise")
    monkeypatch.setattr(prompt_templates, "__file__", str(other))
    assert Setup(encoding).template == known


def test_requests_that_cannot_be_met_say_what_to_do(tiny_llama: str) -> None:
    pool = make_pool(2)
    with pytest.raises(RequestError, match=r"ppl, length_input: a base model is needed.*--model"):
        score_examples(pool, ["ppl", "mtld", "length_input"])
    with pytest.raises(RequestError, match=r"knn_6: an embedding model or base model is needed.*--embedding-model"):
        score_examples(pool, ["knn_6"])
    with pytest.raises(RequestError, match=r"template 'chatml': there is no such template.*auto, alpaca, chat"):
        score_examples(pool, ["mtld"], template="chatml")
    with pytest.raises(RequestError, match=r"precision 'fp8': is not known.*bf16"):
        score_examples(pool, ["mtld"], precision="fp8")
    with pytest.raises(RequestError, match="batch_tokens 0: is less than one token"):
        score_examples(pool, ["mtld"], batch_tokens=0)
    with pytest.raises(RequestError, match=r"max_length 3: is too short.*8"):
        score_examples(pool, ["mtld"], max_length=3)
    with pytest.raises(RequestError, match=r"device 'warp': cannot be used here.*name cpu"):
        score_examples(pool, ["ppl"], tiny_llama, device="warp")
    with pytest.raises(RequestError, match=r"4096 positions, fewer than max_length 5000.*--max-length 4096"):
        score_examples(pool, ["ppl"], tiny_llama, max_length=5000)
    assert default_indicators(Setup(Encoding("m"))) == [
        "length_input",
        "length_output",
        "mtld",
        "ppl",
        "ppl_unconditional",
        "ifd",
        "knn_6",
    ]
    assert default_indicators(Setup(models=ScorerModels("e"))) == ["mtld", "knn_6"]


def with_marker(folder: Path, marker_is_bos: bool) -> str:
    """A checkpoint whose BOS opens the turns of its chat template, or does not."""
    model = make_tiny_llama(folder, chat_template=CHATML)
    tokenizer = checkpoint.load_tokenizer(model)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    if marker_is_bos:
        tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    network = checkpoint.load_causal_lm(model)
    network.resize_token_embeddings(len(tokenizer))
    network.save_pretrained(model)
    tokenizer.save_pretrained(model)
    return model


def test_only_where_bos_opens_turns_the_identity_says_the_start(tmp_path: Path, tiny_llama: str) -> None:
    """Rules fitted on LLaMA's values stay usable; those of ChatML tokenizers were of another quantity."""
    pool = make_pool(4)
    usual = score_examples(pool, ["ifd"], tiny_llama)
    parts = usual.keys["ifd"]["identity"]["from"]
    assert set(parts["ppl_unconditional"]) == {"indicator", "version", "model", "max_length"}
    plain = score_examples(pool, ["ifd"], with_marker(tmp_path / "plain", marker_is_bos=False))
    assert "start" not in plain.keys["ifd"]["identity"]["from"]["ppl_unconditional"]

    model = with_marker(tmp_path / "marker", marker_is_bos=True)
    table = score_examples(pool, ["ppl", "ppl_unconditional", "ifd"], model)
    parts = table.keys["ifd"]["identity"]["from"]
    assert "start" in parts["ppl_unconditional"] and "start" not in parts["ppl"]
    network, tokenizer = checkpoint.load_causal_lm(model), checkpoint.load_tokenizer(model)
    alone = [plain_ppl(network, e) for e in encode_unconditional(pool, tokenizer, 1024)]
    np.testing.assert_allclose(table.values["ppl_unconditional"], alone, rtol=1e-4)
    other = score_examples(pool, ["ppl_unconditional"], model, template="alpaca")
    assert other.keys["ppl_unconditional"]["identity"]["start"] == "eos"


def test_a_token_without_an_embedding_is_said_in_one_sentence(tmp_path: Path) -> None:
    """A tokenizer to which tokens were added, saved beside the old model: torch would say 'index out of range'."""
    model = make_tiny_llama(tmp_path / "base")
    tokenizer = checkpoint.load_tokenizer(model)
    tokenizer.add_tokens(["<scratch>"])
    tokenizer.save_pretrained(model)
    pool = [alpaca("Name a lake.", "Como"), alpaca("Think first.", "<scratch> 12 apples")]
    with pytest.raises(RequestError) as told:
        score_examples(pool, ["ppl"], model)
    rows = checkpoint.vocabulary(model)
    assert f"the tokenizer has {rows + 1:,} tokens and the model embeddings for {rows:,}" in str(told.value)
    assert f"there is none for '<scratch>' in the example {pool[1].id}" in str(told.value)
    assert "Fix: use the tokenizer that belongs to the model" in str(told.value)
    assert not np.isnan(score_examples(pool[:1], ["ppl"], model).values["ppl"]).any(), "rows without it are scored"


def test_values_that_the_definition_left_out_later_are_taken_back(tmp_path: Path, monkeypatch: Any) -> None:
    """A store filled before MTLD knew of scripts without spaces must not go on telling their 1.0."""
    from im_lightning.indicators.mtld import MTLD

    pool = [alpaca("Describe.", "天空是蓝色的因为空气散射蓝光更多"), alpaca("Describe.", "a blue sky")]
    with monkeypatch.context() as patch:
        patch.setattr(MTLD, "refuse", lambda self, example: None)
        before = score_examples(pool, ["mtld"], cache_dir=tmp_path)
    assert before.values["mtld"].tolist() == [1.0, 3.0]
    after = score_examples(pool, ["mtld"], cache_dir=tmp_path)
    assert np.isnan(after.values["mtld"][0]) and after.values["mtld"][1] == 3.0
    assert after.reasons["mtld"][0] == "written without spaces between words"
    assert after.keys == before.keys, "other values, and the rules fitted on them, stay"


def test_what_is_computed_is_written_soon_and_then_at_doubling_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill after seconds loses seconds, and a long work does not write a file every second."""
    from im_lightning.scoring import columns

    now = 0.0
    monkeypatch.setattr(columns.time, "monotonic", lambda: now)
    clock, written = columns.Clock(), []
    for tick in range(1, 4000):
        now = tick / 10
        if clock.due():
            written.append(now)
    assert written[:5] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert max(np.diff(written)) <= columns.FLUSH_SECONDS + 0.1 and len(written) < 20
