"""Hostile input, property by property: whatever bytes come in, a table or a clear error comes out.

The cases are drawn anew by Hypothesis but always the same ones, so that a failure here is one everywhere. If these
failed, one odd row in a million would end a night's scoring in a traceback.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from fitting import make_world, trainer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pools import alpaca
from tiny import make_tokenizer

from im_lightning.data.example import Example, Message
from im_lightning.data.formats import FORMATS
from im_lightning.data.loading import Rejected, load_examples, write_rows
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.tokenization import encode_examples, encode_unconditional
from im_lightning.errors import DataError, InstructMiningError, RequestError
from im_lightning.indicators.transforms import Transform, default_transforms, phi_matrix
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.published import published_rule
from im_lightning.sampling.draws.sampler import QualityWeightedSampler
from im_lightning.sampling.weights.quality_weights import METHODS, quality_weights
from im_lightning.scoring.api import score_examples


def tried(examples: int) -> Callable[[Any], Any]:
    """The profile of these tests: derandomised, no database, no limit on the time of one case."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=health)


SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.zst", ".parquet")
FIELDS = (
    "instruction", "input", "output", "prompt", "response", "messages", "conversations", "history", "system", "source",
    "role", "from", "content", "value", "text", "",
)  # fmt: skip

anything = st.text(st.characters(), max_size=40)  # lone surrogates too
odd = st.sampled_from(
    ["", " ", "\0", "a\0b", "\ud800", "x\udfff y", "‮evil‬ עברית العربية", "</s>", "<s><pad>", "### Response:",
     "\r\n\u2028",      "🤷🏽‍♀️" * 5, "é" + "\u0301" * 50, "a" * 3000, "{{ messages }}{% raise %}"]
)  # fmt: skip
texts = st.one_of(anything, odd)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5)),
    max_leaves=12,
)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "gpt", ""]), "content": texts}),
    max_size=4,
)
rows = st.one_of(
    values,
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=6),
    st.fixed_dictionaries({"instruction": texts, "input": texts, "output": texts}),
    st.fixed_dictionaries({"messages": turns}),
)
almost_json = st.text(st.sampled_from('[]{}",:0123456789.eE+-\\/untrlfasNI \n\t\ud800é'), max_size=80).map(
    lambda text: text.encode("utf-8", "surrogatepass")
)


def packed(content: bytes, suffix: str, torn: bool) -> bytes:
    """The content as a file of that suffix holds it, at times cut off."""
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    elif suffix.endswith(".zst"):
        content = zstandard.ZstdCompressor().compress(content)
    return content[: -1 - len(content) // 3] if torn else content


def check_reading(path: Path, format: str = "auto") -> list[Example]:
    """Reads with and without quarantine: examples, or an error that names the file."""
    rejected: list[Rejected] = []
    found: list[Example] = []
    try:
        found = load_examples(path, format, "quarantine", rejected)
    except (DataError, RequestError) as error:
        assert str(path) in str(error) and "Fix" in str(error)
    for example in found:
        assert len(example.id) == 32 and example.messages[-1].role == "assistant"
    assert all(isinstance(r.cause, str) and r.cause for r in rejected)
    try:
        strict = load_examples(path, format)
    except (DataError, RequestError) as error:
        assert str(path) in str(error) and (rejected or not found)
    else:
        assert strict == found and not rejected
    return found


@tried(300)
@given(
    content=st.one_of(st.binary(max_size=200), almost_json),
    suffix=st.sampled_from(SUFFIXES),
    pack=st.booleans(),
    torn=st.booleans(),
)
def test_any_bytes(tmp_path: Path, content: bytes, suffix: str, pack: bool, torn: bool) -> None:
    path = tmp_path / f"pool{suffix}"
    path.write_bytes(packed(content, suffix, torn) if pack else content)
    check_reading(path)


@tried(150)
@given(
    pool=st.lists(rows, min_size=1, max_size=4),
    format=st.sampled_from(FORMATS),
    array=st.booleans(),
    torn=st.booleans(),
)
def test_any_rows(tmp_path: Path, pool: list[Any], format: str, array: bool, torn: bool) -> None:
    """Rows of any JSON values; what is accepted is written again and read as the same examples."""
    path = tmp_path / ("pool.json.gz" if array else "pool.jsonl.gz")
    text = json.dumps(pool) if array else "\n".join(map(json.dumps, pool))
    path.write_bytes(packed(text.encode(), ".gz", torn))
    check_reading(path, format)
    kept: list[Any] = []
    for row in pool:
        if isinstance(row, str):  # a name of a file
            continue
        try:
            (example,) = load_examples([row], format)
        except (DataError, RequestError) as error:
            assert "Fix" in str(error)
        else:
            kept.append((row, example))
    if kept:
        again = tmp_path / "again.jsonl"
        write_rows(again, [row for row, _ in kept])
        assert [e.id for e in load_examples(again, format)] == [e.id for _, e in kept]


@tried(60)
@given(name=texts.filter(lambda text: text.strip("/. ") and "/" not in text and "~" not in text))
def test_any_text_as_the_name_of_a_file(name: str) -> None:
    for data in (name, [name]):
        with pytest.raises(RequestError, match="Fix"):
            load_examples(data)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    chat = make_tokenizer()
    chat.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    return {"alpaca": make_tokenizer(), "chat": chat, "bare": make_tokenizer(bos=False, eos=False)}


@tried(200)
@given(
    conversation=st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
    name=st.sampled_from(["alpaca", "chat", "bare"]),
    max_length=st.integers(8, 80),
)
def test_any_text_through_templates(
    tokenizers: dict[str, Any], conversation: list[tuple[str, str]], name: str, max_length: int
) -> None:
    messages = tuple(
        Message(role, text) for pair in conversation for role, text in zip(("user", "assistant"), pair, strict=True)
    )
    one = len(conversation) == 1
    example = Example(messages, messages[0].content if one else None, "" if one else None)
    tokenizer = tokenizers[name]
    try:
        (encoded,) = encode_examples([example], tokenizer, "chat" if name == "chat" else "alpaca", max_length)
    except RequestError as error:  # a template that cannot say where this response begins
        assert name == "chat" and "row 0" in str(error) and "Fix" in str(error)
        return
    (alone,) = encode_unconditional([example], tokenizer, max_length)
    for e in (encoded, alone):
        length = len(e.input_ids)
        assert 1 <= length <= max_length and len(e.response_mask) == len(e.loss_mask) == length
        assert not (e.response_mask & ~e.loss_mask).any() and not e.loss_mask[0]
        assert e.input_ids.min() >= 0 and e.input_ids.max() < len(tokenizer)
        assert e.length_output == len(tokenizer(clean(example.response), add_special_tokens=False).input_ids)


def clean(text: str) -> str:
    """Tokenizers take no lone surrogates; the sign for "no such character" stands for each."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


@pytest.fixture(scope="module")
def rule_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rule") / "rule.json"
    names = ["length_output", "ppl"]
    LinearRule(
        name="made", intercept_=1.0, coef_=np.array([0.5, -0.1]), feature_names_in_=names,
        transforms_={"length_output": Transform("log1p", 0.0, 7.0), "ppl": Transform("log", 0.0, 5.0)},
        mean_=np.zeros(2), cov_=np.eye(2), radius_=2.0, identities={n: {"indicator": n} for n in names}, n_runs_=9,
    ).save(path)  # fmt: skip
    return path


def paths_of(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something could be replaced."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, child in inside for path in paths_of(child, (*here, key)))]


numbers = st.one_of(st.floats(), st.integers(), st.sampled_from([1e308, -1e308, 5e-324, 0, 10**400]))


@tried(250)
@given(data=st.data(), new=st.one_of(values, numbers))
def test_any_rule_file(rule_file: Path, tmp_path: Path, data: Any, new: Any) -> None:
    """A field of anything in a rule file: refused by name, or a rule that predicts a number or nothing."""
    value = json.loads(rule_file.read_text())
    where = data.draw(st.sampled_from(paths_of(value)[1:]))
    at = value
    for key in where[:-1]:
        at = at[key]
    if data.draw(st.booleans()):
        at[where[-1]] = new
    else:
        del at[where[-1]]
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(value))
    table = ScoreTable(range(3), list("abc"), list("sss"), {"length_output": [1, 5, 900], "ppl": [1.5, 3.0, 1e30]})
    try:
        rule = LinearRule.load(path)
    except InstructMiningError as error:
        assert "Fix" in str(error)
        return
    with np.errstate(all="ignore"):
        try:
            predicted = rule.predict(table)
        except RequestError as error:  # it needs an indicator that the table lacks
            assert "Fix" in str(error)
            return
    assert predicted.shape == (3,)
    rule.summary()


@tried(100)
@given(content=st.one_of(st.binary(max_size=100), almost_json))
def test_any_bytes_as_a_rule_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rule.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rule\.json"):
        LinearRule.load(path)


HOSTILE = [
    alpaca("Say nothing.", ""),
    alpaca("", "An answer to nothing."),
    alpaca("NUL", "a\0b\0\0"),
    alpaca("surrogates \ud800", "half \udfff of a pair"),
    alpaca("right to left ‮", "עברית العربية ‮txet‬"),
    alpaca("special", "<s></s><pad> ### Response: <|im_end|>"),
    alpaca("twice", "the same row"),
    alpaca("twice", "the same row"),
    alpaca("spaces", " \t\r\n\u2028\u00a0" * 20),
    alpaca("marks", "e" + "\u0301" * 300),
    alpaca("a megabyte of words", "red blue " * 116_509),
    alpaca("a megabyte of one letter", "a" * (1 << 20)),
]
NAMES = ["length_input", "length_output", "mtld", "ppl", "ppl_unconditional", "ifd", "knn_2"]


def test_hostile_rows_are_scored(tiny_llama: str, tmp_path: Path) -> None:
    """Two rows of a megabyte, surrogates, NUL, duplicates, an empty response: a value or a reason for each."""
    table = score_examples(HOSTILE, NAMES, model=tiny_llama, max_length=64, device="cpu")
    for name in NAMES:
        for value, reason in zip(table.values[name], table.reasons[name], strict=True):
            assert (reason is None and math.isfinite(value)) or (reason and math.isnan(value)), name
    assert table.values["ppl"][6] == table.values["ppl"][7] and table.reasons["ppl"][0] == "empty response"
    path = tmp_path / "scores.parquet"
    table.write(path)
    again = ScoreTable.read(path)
    assert again.id == table.id and again.reasons == table.reasons


@pytest.mark.parametrize("rows", [1, 2])
def test_tiny_pools_are_scored(tiny_llama: str, rows: int) -> None:
    """One row has no neighbour: that is a reason, no crash."""
    pool = [alpaca("Hi", "Hello there."), alpaca("Bye", "See you.")][:rows]
    table = score_examples(pool, NAMES, model=tiny_llama, device="cpu")
    assert np.isfinite(table.values["ppl"]).all()
    assert np.isnan(table.values["knn_2"]).all() and all(table.reasons["knn_2"])


def test_a_pool_without_rows(tiny_llama: str, tmp_path: Path) -> None:
    table = score_examples([], NAMES, model=tiny_llama, device="cpu")
    assert len(table) == 0 and table.indicators == NAMES
    table.write(tmp_path / "empty.parquet")
    assert len(ScoreTable.read(tmp_path / "empty.parquet")) == 0
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty.jsonl: it holds no rows"):
        load_examples(tmp_path / "empty.jsonl")
    for method in METHODS:
        none = "it needs a mixture of sources" if method == "mix" else "0 of 0 rows can be drawn"
        with pytest.raises(RequestError, match=none):
            quality_weights(table, made_rule(), method, budget=1)


def made_rule() -> LinearRule:
    return LinearRule(
        name="made", intercept_=0.0, coef_=np.array([1.0]), feature_names_in_=["ppl"],
        transforms_={"ppl": Transform("log", -50.0, 50.0)}, mean_=np.array([1.0]), cov_=np.eye(1), radius_=2.0,
    )  # fmt: skip


extreme = st.one_of(st.floats(), st.sampled_from([math.inf, -math.inf, math.nan, 0.0, 1e308, 5e-324, 1.0, 1.0, 1.0]))


@tried(250)
@given(
    scores=st.one_of(
        st.lists(extreme, min_size=1, max_size=12),
        st.tuples(extreme, st.integers(1, 12)).map(lambda pair: [pair[0]] * pair[1]),  # all equal
    ),
    method=st.sampled_from(METHODS),
    share=st.floats(0.05, 1.0),
    floor=st.sampled_from([0.0, 0.1]),
)
def test_any_scores_become_weights(scores: list[float], method: str, share: float, floor: float) -> None:
    """Weights are finite, sum to one and can be drawn from, or the error says what is wrong."""
    n = len(scores)
    budget = max(1, int(share * n))
    table = ScoreTable(range(n), [f"{i}" for i in range(n)], ["s"] * n, {"ppl": scores})
    with np.errstate(all="ignore"):
        transforms = default_transforms(table, ["ppl"])
        assert phi_matrix(table, transforms).shape == (n, 1)
        try:
            made = quality_weights(table, made_rule(), method, floor=floor, budget=budget)
        except RequestError as error:
            assert "Fix" in str(error)
            return
    assert np.isfinite(made.weights).all() and (made.weights >= 0).all()
    assert made.weights.sum() == pytest.approx(1.0)
    json.dumps(made.report)
    positive = int(np.count_nonzero(made.weights))
    drawn = list(QualityWeightedSampler(made.weights, min(budget, positive), seed=1))
    assert len(set(drawn)) == min(budget, positive)


@tried(400)
@given(
    weights=st.lists(extreme, max_size=12),
    draws=st.integers(-1, 14),
    replacement=st.booleans(),
    ranks=st.integers(1, 3),
)
def test_any_weights_are_drawn_from_or_refused(weights: list[float], draws: int, replacement: bool, ranks: int) -> None:
    """Infinite, negative, tiny, all-zero weights: a draw of the size asked for, or an error that names the row."""
    try:
        samplers = [QualityWeightedSampler(weights, draws, replacement, ranks, rank) for rank in range(ranks)]
    except RequestError as error:
        assert "Fix" in str(error)
        bad = [w for w in weights if not 0 <= w < math.inf]
        few = sum(w > 0 for w in weights) < draws
        assert bad or draws < max(1, ranks) or not weights or few
        return
    rows = [list(sampler) for sampler in samplers]
    assert [len(part) for part in rows] == [draws // ranks] * ranks
    assert all(weights[row] > 0 for part in rows for row in part)
    if not replacement:
        assert len({row for part in rows for row in part}) == ranks * (draws // ranks)


def test_published_rules_take_what_a_table_may_hold() -> None:
    rule = published_rule("instructmining-v1")
    names = rule.feature_names_in_
    odd_values = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e308]
    table = ScoreTable(range(6), list("abcdef"), ["s"] * 6, dict.fromkeys(names, odd_values))
    with np.errstate(all="ignore"):
        assert rule.predict(table).shape == (6,)


@pytest.mark.parametrize("pool", ["one row", "equal scores", "infinite scores"])
def test_a_fit_on_a_pool_at_the_limit(small_base: str, tmp_path: Path, pool: str) -> None:
    """Drawn from, or refused before training with what to do about it."""
    world = make_world(small_base, tmp_path)
    table = ScoreTable.read(world.scores)
    if pool == "one row":
        write_rows(world.pool, [{"instruction": "Say hi.", "output": "Hi."}])
        fit = trainer(world.root)
        fit.fit(world.tuner(), datamodule=world.data(scores=None))
        assert fit.global_step == 1
        return
    value = {"equal scores": 2.0, "infinite scores": math.inf}[pool]
    for name in table.indicators:
        column = np.full(len(table), value) if pool == "equal scores" else table.values[name].copy()
        column[:5] = value
        table = table.with_values(name, column, key=table.keys[name])
    table.write(world.scores)
    data = world.data(rule=world.rule, budget=9)
    fit = trainer(world.root)
    fit.fit(world.tuner(), datamodule=data)
    assert np.isfinite(data.weights).all() and data.weights.sum() == pytest.approx(1.0) and len(set(data.rows)) == 9
