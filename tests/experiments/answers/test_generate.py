"""`generate`: the model's own answers, the same whatever the batch, and none made twice."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import killed_at, operations, run
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from im_lightning._utils.hashing import digest_json
from im_lightning.cli import main
from im_lightning.data.loading import load_examples, write_rows
from im_lightning.data.settings import Encoding, Reading
from im_lightning.errors import RequestError
from im_lightning.experiments.answers import generation
from im_lightning.experiments.answers.generation import generate_answers, prompted
from im_lightning.experiments.answers.prompts import Generating, answered_row, chat, is_answers, read_prompts
from im_lightning.models.checkpoint import load_causal_lm
from im_lightning.models.generation import generate
from im_lightning.training.run.encoded_pool import coding_of

SETTINGS = Generating(max_new_tokens=6, batch_tokens=250, precision="fp32")


@pytest.fixture
def data(tmp_path: Path) -> str:
    draw = random.Random(1)
    rows = [{"instruction": f"Say {'so ' * draw.randint(0, 9)}{k}.", "output": "No."} for k in range(17)]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain_loop(folder: str, ids: list[int], ends: set[int], most: int) -> list[int]:
    """Token by token, a row alone, without a cache."""
    network, out = load_causal_lm(folder), []
    with torch.no_grad():
        while len(out) < most:
            token = int(network(torch.tensor([ids + out])).logits[0, -1].argmax())
            if token in ends:
                break
            out.append(token)
    return out


def test_answers_are_those_of_a_plain_loop(data: str, tiny_llama: str, tmp_path: Path) -> None:
    """Padding and batches must not reach the answers, and the prompts are those that training sees."""
    out = tmp_path / "answers.jsonl"
    flags = ["--max-new-tokens", "6", "--batch-tokens", "250", "--precision", "fp32", "--out", str(out)]
    assert main(["generate", data, "--model", tiny_llama, *flags]) == 0
    prompts, coding = read_prompts(data, Reading()), coding_of(Encoding(tiny_llama))
    of = prompted(prompts, coding)
    ends = {end[0] for end in of.ends}
    found = load_examples(str(out))
    assert [one.prompt_id for one in found] == [one.prompt_id for one in prompts]
    for one, ids in zip(found, of.prompts, strict=True):
        made = plain_loop(tiny_llama, ids, ends, 6)
        assert one.response == coding.tokenizer.decode(made, skip_special_tokens=True).strip()
    assert {one.source for one in found} == {"eval"} and not list(tmp_path.glob("*.partial.jsonl"))


@pytest.mark.parametrize("length", [1, 2])
def test_an_answer_stops_at_the_end_of_its_turn(length: int, data: str, small_base: str) -> None:
    """One token, or the several that a template writes; other rows go on."""
    coding = coding_of(Encoding(small_base))
    of, network = prompted(read_prompts(data, Reading()), coding), load_causal_lm(small_base)
    free = generate(network, of.prompts[:4], [], 0, 8)
    assert all(one.cut and len(one.tokens) == 8 for one in free)
    end = free[0].tokens[3 : 3 + length]
    stopped = generate(network, of.prompts[:4], [end], 0, 8)
    for before, after in zip(free, stopped, strict=True):
        at = next((k for k in range(9 - length) if before.tokens[k : k + length] == end), None)
        assert (after.tokens, after.cut) == (before.tokens if at is None else before.tokens[:at], at is None)
    assert not stopped[0].cut


@pytest.mark.parametrize("adapter", [False, True])
def test_a_checkpoints_own_settings_do_not_reach_the_answers(adapter: bool, data: str, small_base: str) -> None:
    """Qwen2.5 brings a penalty on repeated tokens: the most likely token is what an answer is made of all the same."""
    of, network = prompted(read_prompts(data, Reading()), coding_of(Encoding(small_base))), load_causal_lm(small_base)
    wanted = generate(network, of.prompts[:4], [], 0, 8)
    avoided = wanted[0].tokens[:1]
    own = network.generation_config = GenerationConfig(repetition_penalty=50.0, suppress_tokens=avoided)
    if adapter:
        network = get_peft_model(network, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert generate(network, of.prompts[:4], [], 0, 8) == wanted
    assert network.generation_config is own


def test_a_prompt_keeps_its_tools_and_calls(tmp_path: Path) -> None:
    """Two prompts of the same words and other tools are two, and what is answered is written with what was asked."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4 degrees", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is 4."},
    ]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    rows = [{"messages": turns, "tools": tools}, {"messages": turns}]
    rows += [{"instruction": "Weather?", "output": "4", "tools": tools}, {"instruction": "Weather?", "output": "4"}]
    path, out = tmp_path / "calls.jsonl", tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(str(path), Reading())
    assert len(prompts) == len({one.prompt_id for one in prompts}) == 4
    assert prompts[3].prompt_id == digest_json([["user", "Weather?"]]), "as ever where there is neither"
    for one in prompts:
        write_rows(out, [answered_row(one, "Cold.", "m-0")])
        (back,) = load_examples(str(out))
        assert (back.history, back.tools, back.response) == (one.history, one.tools, "Cold.")
        assert back.prompt_id == one.prompt_id and is_answers(out)
    for one in prompts[:3]:
        with pytest.raises(RequestError, match=r"the prompt \w{32} \('Weather\?' …\): it has tools or tool calls, and"):
            chat(one)
    assert chat(prompts[3]) == [{"role": "user", "content": "Weather?"}]


def test_the_end_of_a_chat_turn_is_known(small_base: str, data: str) -> None:
    from im_lightning.data.tokenization import resolve_template

    coding = coding_of(Encoding(small_base))
    tokenizer = copy.deepcopy(coding.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end of turn>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = coding._replace(tokenizer=tokenizer, template=resolve_template("chat", tokenizer))
    of = prompted(read_prompts(data, Reading()), chat)
    end = tokenizer("<end of turn>", add_special_tokens=False)["input_ids"]
    assert end in of.ends or any(tokenizer.decode(one) == "<end of turn>" for one in of.ends)
    assert tokenizer.decode(of.prompts[0]).endswith("<assistant>")


def test_drawn_answers_are_the_seeds(data: str, small_base: str, tmp_path: Path) -> None:
    def made(seed: int) -> list[str]:
        out = tmp_path / f"a{seed}.jsonl"
        settings = Generating(6, temperature=1.0, seed=seed, batch_tokens=250)
        generate_answers(read_prompts(data, Reading()), Encoding(small_base), None, settings, out)
        return [one.response for one in load_examples(str(out))]

    first = made(1)
    (tmp_path / "a1.jsonl").unlink()
    assert made(1) == first != made(2)


def test_killed_at_every_file_operation_it_goes_on(data: str, small_base: str, tmp_path: Path) -> None:
    """Answers that were kept are not made again, and the file is that of an undisturbed run."""
    prompts = read_prompts(data, Reading())[:12]
    cache = str(tmp_path / "cache")

    def work(folder: Path) -> None:
        generate_answers(prompts, Encoding(small_base, cache_dir=cache), None, SETTINGS, folder / "a.jsonl")

    whole, report = tmp_path / "whole", tmp_path / "report"
    whole.mkdir()
    count = operations(whole, lambda: work(whole), report)
    assert count > 6
    for at in range(2, count + 1, 2):
        folder = tmp_path / f"at{at}"
        folder.mkdir()
        assert killed_at(at, folder, lambda f=folder: work(f), report)
        run(lambda f=folder: work(f), report)
        assert (folder / "a.jsonl").read_bytes() == (whole / "a.jsonl").read_bytes()
        assert [path.name for path in folder.glob("[!.]*")] == ["a.jsonl"]


def test_kept_answers_are_not_made_again(
    data: str, small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out, batches = read_prompts(data, Reading()), tmp_path / "a.jsonl", []
    answer_with = generation.answer_with

    def breaks(*given: Any) -> Any:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(given[-1])
        return answer_with(*given)

    monkeypatch.setattr(generation, "answer_with", breaks)
    with pytest.raises(KeyboardInterrupt):
        generate_answers(prompts, Encoding(small_base), None, SETTINGS, out)
    kept, rest = list(batches), []
    monkeypatch.setattr(generation, "answer_with", lambda *given: rest.append(given[-1]) or answer_with(*given))
    with (tmp_path / "a.jsonl.partial.jsonl").open("a") as stream:
        stream.write('{"row": 3, "ans')
    generate_answers(prompts, Encoding(small_base), None, SETTINGS, out)
    assert sorted(row for rows in kept + rest for row in rows) == list(range(17))
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(generation, "answer_with", breaks)
        generate_answers(prompts, Encoding(small_base), None, SETTINGS, out)
    monkeypatch.setattr(generation, "answer_with", answer_with)
    generate_answers(prompts, Encoding(small_base), None, Generating(5, batch_tokens=250), out)
    assert "answers of another model, set or setting; it is begun anew" in capsys.readouterr().err


def test_an_adapter_is_put_on_top(data: str, small_base: str, tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    network = get_peft_model(load_causal_lm(small_base), config).eval()
    network.save_pretrained(tmp_path / "adapter")
    flags = ["--max-new-tokens", "6", "--precision", "fp32", "--model", small_base]
    out = str(tmp_path / "a.jsonl")
    assert main(["generate", data, *flags, "--adapter", str(tmp_path / "adapter"), "--out", out]) == 0
    coding = coding_of(Encoding(small_base))
    of = prompted(read_prompts(data, Reading()), coding)
    made = generate(network, of.prompts, of.ends, 0, 6)
    wanted = [coding.tokenizer.decode(one.tokens, skip_special_tokens=True).strip() for one in made]
    assert [one.response for one in load_examples(out)] == wanted
    assert main(["generate", data, *flags, "--adapter", str(tmp_path), "--out", out]) == 2
    assert (
        "it has no adapter_config.json. Fix: name a folder that fit --export adapter wrote" in capsys.readouterr().err
    )
    broken = tmp_path / "adapter" / "adapter_config.json"
    broken.write_text(broken.read_text().replace('"r": 4', '"r": 5'))
    assert main(["generate", data, *flags, "--adapter", str(tmp_path / "adapter"), "--out", out]) == 2
    assert "it does not go on top of" in capsys.readouterr().err


def test_positions_that_do_not_suffice_are_named(data: str, small_base: str, tmp_path: Path, capsys: Any) -> None:
    out = str(tmp_path / "a.jsonl")
    assert main(["generate", data, "--model", small_base, "--max-new-tokens", "99999", "--out", out]) == 2
    assert "positions. Fix: lower --max-new-tokens or --max-length" in capsys.readouterr().err
