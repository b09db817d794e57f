"""`reward` against plain transformers calls, through the public path, for every kind of reward model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pools import alpaca, make_pool
from tiny_judges import make_chat_reward, make_deberta_reward, make_oasst_reward

from im_lightning.data.example import Example, Message
from im_lightning.errors import RequestError
from im_lightning.models import checkpoint
from im_lightning.models.reward import load_reward_model
from im_lightning.models.scorer import ScorerInput, cut
from im_lightning.scoring.api import score_examples


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("reward")
    made: dict[str, Callable[[Path], str]] = {
        "pair": make_deberta_reward,
        "OpenAssistant": make_oasst_reward,
        "chat": make_chat_reward,
        "chat, padded with its end token": lambda path: make_chat_reward(path, pad=1),
    }
    return {name: make(root / name.split(",")[0] / str(len(name))) for name, make in made.items()}


KINDS = ["pair", "OpenAssistant", "chat", "chat, padded with its end token"]


def dialogue(*texts: str, system: str | None = None) -> Example:
    turns = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    return Example(((Message("system", system),) if system else ()) + tuple(turns))


POOL = [
    *make_pool(10),
    alpaca("Say </s> or <|endoftext|>.", "It is <|endoftext|> here, and </s> there."),
    dialogue("Name a colour.", "Red.", "And one more?", "Blue, and many numbers: 1, 2, 3."),
    dialogue("Hi", "Three tips for staying healthy.", system="Be brief."),
    alpaca("", "A response to nothing, ünïcode included: 你好."),
]


def reference(kind: str, model: str, example: Example) -> float:
    """The row by itself, as the makers of these models document it."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPTNeoXConfig, GPTNeoXModel

    tokenizer = AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        if kind == "OpenAssistant":
            weights = torch.load(Path(model) / "pytorch_model.bin", weights_only=True)
            config = json.loads((Path(model) / "config.json").read_text())
            body = GPTNeoXModel(GPTNeoXConfig(**{k: v for k, v in config.items() if k != "model_type"})).eval()
            prefix = "gpt_neox."
            body.load_state_dict(
                {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}, strict=False
            )
            names = {"user": "<|prompter|>", "assistant": "<|assistant|>", "system": "<|system|>"}
            text = "".join(f"{names[turn.role]}{turn.content}<|endoftext|>" for turn in example.messages)
            state = body(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0, -1]
            return float(state @ weights["out_proj.weight"][0] + weights["out_proj.bias"][0])
        loaded = AutoModelForSequenceClassification.from_pretrained(model).eval()
        if kind == "pair":
            question = "\n".join(turn.content for turn in example.history)
            return float(loaded(**tokenizer(question, example.response, return_tensors="pt")).logits[0, 0])
        turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        return float(loaded(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids).logits[0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_transformers_calls(kind: str, models: dict[str, str]) -> None:
    """A wrong format, pooling or padding gives plausible numbers that mean nothing."""
    table = score_examples(POOL, ["reward"], reward_model=models[kind])
    expected = [reference(kind, models[kind], example) for example in POOL]
    np.testing.assert_allclose(table.values["reward"], expected, atol=2e-6)
    assert np.std(expected) > 1e-3  # the comparison can tell rows apart


@pytest.mark.parametrize("kind", KINDS)
def test_does_not_move_with_batches_or_order(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    first = score_examples(POOL, ["reward"], reward_model=models[kind], batch_tokens=1).values["reward"]
    backwards = POOL[::-1]
    other = score_examples(backwards, ["reward"], reward_model=models[kind], cache_dir=tmp_path / "other")
    np.testing.assert_allclose(other.values["reward"][::-1], first, atol=2e-6)


def test_old_buffers_do_not_hide_missing_weights(tmp_path: Path) -> None:
    """Without this a base model would be scored by a random head."""
    import torch

    model = Path(make_oasst_reward(tmp_path / "headless"))
    weights = torch.load(model / "pytorch_model.bin", weights_only=True)
    del weights["out_proj.bias"]
    torch.save(weights, model / "pytorch_model.bin")
    with pytest.raises(RequestError, match=r"1 weights are missing.*out_proj.bias.*with its head"):
        score_examples(POOL[:1], ["reward"], reward_model=model)


def test_cut_keeps_what_decides() -> None:
    part = np.array([2] + [0] * 100 + [1] * 50 + [2], dtype=np.int8)
    keep, prompt, reply = cut(part, 80)
    assert (
        keep.sum() == 80 and (prompt, reply) == (72, 0) and keep[[0, 100, 101, 150, 151]].all() and not keep[1:73].any()
    )
    keep, prompt, reply = cut(part, 40)  # an eighth remains to the prompt
    assert keep.sum() == 40 and (prompt, reply) == (95, 17) and keep[96:134].all() and keep[-1]
    assert cut(part, 152)[0].all()


def test_long_conversations_lose_the_prompts_beginning_then_the_replys_end(
    models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, reply = "red blue " * 3000, "numbers and ways " * 3000
    rows = [alpaca(prompt, "short"), alpaca("short", reply), alpaca(prompt, reply), alpaca("short", "short")]
    for kind, limit in (("pair", 512), ("OpenAssistant", 2048), ("chat", 2048)):
        model = load_reward_model(models[kind])
        assert model.limit == limit
        inputs = model.encode(rows)
        assert [len(one.ids) for one in inputs[:3]] == [limit] * 3
        expected = ["prompt cut", "response cut", "prompt and response cut", None]
        if kind == "pair":
            assert inputs[0].types is not None and len(inputs[0].types) == limit
        assert [one.note for one in inputs[1:]] == expected[1:] and inputs[0].note == "prompt cut"
        whole = [
            model.encode([alpaca(prompt[9:], "short")])[0].ids,
            model.encode([alpaca("short", reply[:-17])])[0].ids,
        ]
        assert list(inputs[0].ids) == list(whole[0]) and list(inputs[1].ids) == list(whole[1])
    tail = model.tokenizer.decode(inputs[2].ids)[-40:]
    assert tail.endswith("<|im_end|>\n") and model.tokenizer.decode(inputs[2].ids).startswith("<s>")
    table = score_examples(rows, ["reward"], reward_model=models["pair"])
    assert np.isfinite(table.values["reward"]).all()
    assert "prompt cut: 1, response cut: 1, prompt and response cut: 1" in capsys.readouterr().err


def test_text_that_reads_like_a_special_token_is_noted(
    models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends or begins a turn for the model: such rows can be found by the report."""
    score_examples([alpaca("Say <|endoftext|>.", "Done."), alpaca("Say.", "Done.")], ["reward"], None,
                   reward_model=models["OpenAssistant"])  # fmt: skip
    assert "reward: 2 scored; special token in the text: 1;" in capsys.readouterr().err


def test_rows_without_something_to_judge_have_a_reason(models: dict[str, str]) -> None:
    rows = [alpaca("Say.", ""), Example((Message("assistant", "Unasked."),)), POOL[0]]
    table = score_examples(rows, ["reward"], reward_model=models["pair"])
    assert table.reasons["reward"] == ["empty response", "nothing before the response", None]


def test_nan_of_the_model_is_a_reason(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_deberta_reward(tmp_path / "broken")
    weights = load_file(Path(model) / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] * float("nan")
    save_file(weights, Path(model) / "model.safetensors", metadata={"format": "pt"})
    table = score_examples(POOL[:2], ["reward"], reward_model=model)
    assert np.isnan(table.values["reward"]).all()
    assert table.reasons["reward"] == ["the model's logit is not finite"] * 2


def test_a_template_that_refuses_a_row_costs_that_row_only(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = make_chat_reward(tmp_path / "strict")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    )
    tokenizer.save_pretrained(model)
    table = score_examples([POOL[0], dialogue("Hi", "Ho", system="Be brief.")], ["reward"], reward_model=model)
    assert table.reasons["reward"] == [None, "the reward model's chat template cannot render it"]


def test_a_tools_turn_that_the_format_has_no_token_for_costs_that_row_only(models: dict[str, str]) -> None:
    turns = [("user", "17 C in F?"), ("assistant", "Converting."), ("tool", "62.6"), ("assistant", "62.6 F.")]
    with_tool = Example(tuple(Message(*turn) for turn in turns))
    table = score_examples([POOL[0], with_tool, POOL[1]], ["reward"], reward_model=models["OpenAssistant"])
    said = "the reward model's format has no place for a tool's turn"
    assert table.reasons["reward"] == [None, said, None] and np.isnan(table.values["reward"]).tolist() == [0, 1, 0]
    alone = score_examples(POOL[:2], ["reward"], reward_model=models["OpenAssistant"]).values["reward"]
    np.testing.assert_allclose(table.values["reward"][[0, 2]], alone, atol=2e-6)
    table = score_examples([with_tool], ["reward"], reward_model=models["OpenAssistant"])
    assert table.reasons["reward"] == [said]
    assert np.isfinite(score_examples([with_tool], ["reward"], reward_model=models["pair"]).values["reward"]).all()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: make_chat_reward(path, labels=2), r"is no reward model: it gives 2 labels.*one label"),
        (lambda path: make_oasst_reward(path, special=False), r"lacks the tokens <\|prompter\|>, <\|assistant\|>"),
        (lambda path: "/no/such", "/no/such: there is no such folder"),
    ],
)
def test_wrong_models_are_refused(make: Callable[[Path], str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=expected):
        score_examples(POOL[:1], ["reward"], reward_model=make(tmp_path / "wrong"))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["ppl", "reward"], "is no reward model: it gives 2 labels"),
        (["ppl", "coherence"], r"is no sequence-to-sequence model \(llama\)"),
    ],
)
def test_a_wrong_model_is_refused_before_another_begins(
    names: list[str], expected: str, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of perplexities, and then: the base model was named twice."""
    monkeypatch.setattr(checkpoint, "load_causal_lm", None)
    with pytest.raises(RequestError, match=expected):
        score_examples(POOL[:2], names, tiny_llama, reward_model=tiny_llama, unieval_model=tiny_llama)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_half_characters_are_scored(kind: str, models: dict[str, str]) -> None:
    rows = [alpaca(f"Say {c}", f"It is {c}, " + "red blue " * n) for c in ("\ud83d", "\ufffd") for n in (1, 3000)]
    values = score_examples(rows, ["reward"], reward_model=models[kind]).values["reward"]
    np.testing.assert_allclose(values[:2], values[2:], atol=2e-6)


def test_a_tokenizer_larger_than_its_model_is_named(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = make_deberta_reward(tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["atom"])
    tokenizer.save_pretrained(model)
    with pytest.raises(RequestError, match=r"its tokenizer makes token \d+, and the model has \d+"):
        score_examples([alpaca("What?", "An atom.")], ["reward"], reward_model=model)


def test_mean_pooling_and_an_unknown_one(tmp_path: Path) -> None:
    """Checkpoints of either pooling exist; a third kind must not be read as one of them."""
    import torch

    mean = Path(make_oasst_reward(tmp_path / "mean"))
    config = json.loads((mean / "config.json").read_text())
    (mean / "config.json").write_text(json.dumps({**config, "pooling": "mean"}))
    model = load_reward_model(mean)
    inputs = model.encode(POOL[:4])
    with torch.no_grad():
        states = [model.model.gpt_neox(input_ids=torch.tensor([list(one.ids)])).last_hidden_state[0] for one in inputs]
        expected = [float(model.model.out_proj(state.mean(dim=0))) for state in states]
    np.testing.assert_allclose(model.logits(inputs), expected, atol=2e-6)
    (mean / "config.json").write_text(json.dumps({**config, "pooling": "first"}))
    with pytest.raises(RequestError, match=r"pooling 'first' is none of last, mean"):
        load_reward_model(mean)


def test_no_model_named() -> None:
    with pytest.raises(RequestError, match=r"reward: a reward model is needed.*--reward-model \(reward_model=\)"):
        score_examples(POOL, ["reward", "mtld"])


def test_an_interrupt_keeps_what_was_finished(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours on a large pool, and a power cut: only the batch in hand is lost."""
    from im_lightning.models.reward import RewardModel

    logits, calls = RewardModel.logits, []

    def interrupted(self: RewardModel, inputs: Any) -> Any:
        calls.append(len(inputs))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return logits(self, inputs)

    monkeypatch.setattr(RewardModel, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_examples(POOL, ["reward"], reward_model=models["pair"], batch_tokens=1)
    monkeypatch.setattr(RewardModel, "logits", logits)
    table = score_examples(POOL, ["reward"], reward_model=models["pair"])
    assert np.isfinite(table.values["reward"]).all()
    assert f"; {len(POOL) - 4} computed now" in capsys.readouterr().err


def test_short_memory_halves_the_batches_and_changes_no_value(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference implementations stop at the first long batch, or leave with status 0."""
    import torch

    from im_lightning.models.reward import RewardModel

    rows = [*POOL, alpaca("Say.", "red blue " * 200)]
    whole = score_examples(rows, ["reward"], reward_model=models["OpenAssistant"]).values["reward"]
    logits = RewardModel.logits

    def small(self: RewardModel, inputs: Any) -> Any:
        if sum(len(one.ids) for one in inputs) > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(self, inputs)

    monkeypatch.setattr(RewardModel, "logits", small)
    table = score_examples(rows, ["reward"], reward_model=models["OpenAssistant"], cache_dir=tmp_path / "other")
    np.testing.assert_allclose(table.values["reward"][:-1], whole[:-1], atol=2e-6)
    assert table.reasons["reward"][-1] == "out of memory with this row alone"
    assert "going on with" in capsys.readouterr().err


def test_another_model_is_another_key(models: dict[str, str]) -> None:
    """Else stored values of one reward model would be taken for another's."""
    tables: list[Any] = [score_examples(POOL[:2], ["reward"], reward_model=models[k]) for k in ("pair", "chat")]
    keys = [table.keys["reward"] for table in tables]
    assert keys[0]["identity"] != keys[1]["identity"] and keys[0]["numerics"]["precision"] == "fp32"
    assert not np.allclose(tables[0].values["reward"], tables[1].values["reward"])


def test_bf16_is_close(models: dict[str, str], tmp_path: Path) -> None:
    exact = score_examples(POOL, ["reward"], reward_model=models["chat"]).values["reward"]
    rough = score_examples(POOL, ["reward"], reward_model=models["chat"], precision="bf16", cache_dir=tmp_path / "b")
    np.testing.assert_allclose(rough.values["reward"], exact, atol=0.1 * np.abs(exact).max())


def test_batches_side_by_side_do_not_share_a_padding_token(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lanes: a batch padded with one token while the model is told another's would be judged at its padding."""
    judge = load_reward_model(models["chat"])
    size = judge.model.config.vocab_size
    long, short = ScorerInput([3, 5, 7, 9, 11, 13]), ScorerInput([3, 5, 7])  # padded with token 0
    other = ScorerInput([token for token in range(20) if token != 4])  # padded with token 4
    assert size > 20
    alone = judge.logits([short])
    forward, running = judge.model.model.forward, []

    def overtaken(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        if not running:
            running.append(True)
            judge.logits([other, ScorerInput([1, 2])])
        return output

    monkeypatch.setattr(judge.model.model, "forward", overtaken)
    together = judge.logits([long, short])
    assert running and together[1] == pytest.approx(alone[0], rel=1e-5)
