"""A finetuned model stops: generation ends at what closes an answer, and says nothing after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
from fitting import trainer
from tiny import CHATML, make_tiny_llama, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from im_lightning import Example, InstructMiningDataModule, InstructTuningModule, Message, encode_examples
from im_lightning.data import tokenization

GLM = (  # as GLM: nothing closes an answer but the token of the next speaker
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"  # nothing at all: EOS is appended
ANSWERS = {"Red?": "A color.", "Helium?": "An atom.", "Tips?": "Exercise regularly.", "Air?": "Reduce it."}
MOST = 24


def base_with(folder: Path, template: str | None) -> str:
    """A tiny LLaMA whose tokenizer and embeddings know the tokens of the templates."""
    make_tiny_llama(folder, hidden=48, layers=1)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"], special_tokens=True)
    tokenizer.chat_template = template
    model.resize_token_embeddings(len(tokenizer))
    for one in (tokenizer, model):
        one.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("template", "named", "closing"),
    [(CHATML, "chat", "<|im_end|>"), (GLM, "chat", "<|user|>"), (BARE, "chat", "</s>"), (None, "none", "</s>")],
)
def test_generation_ends_where_the_answer_does(tmp_path: Path, template: str | None, named: str, closing: str) -> None:
    """The model as it is exported, told the closing token alone: the answer, that token, nothing else. Before training
    it goes on to the end of its budget."""
    base = base_with(tmp_path / "base", template)
    rows = [{"prompt": asked, "completion": answer} for asked, answer in ANSWERS.items()]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pl.seed_everything(0, verbose=False)
    data = InstructMiningDataModule(str(tmp_path / "pool.jsonl"), model=base, template=named, batch_size=4)
    tuner = InstructTuningModule(base, lora_rank=0, learning_rate=1e-2)
    trainer(tmp_path, max_epochs=60).fit(tuner, datamodule=data)
    tuner.export_adapter(str(tmp_path / "tuned"))
    stopped = {name: generated(name, base, named, closing) for name in (base, str(tmp_path / "tuned"))}
    assert stopped[str(tmp_path / "tuned")] == [f"{answer}{closing}" for answer in ANSWERS.values()]
    assert not any(text.endswith(closing) for text in stopped[base])


def generated(folder: str, base: str, template: str, closing: str) -> list[str]:
    """What a model goes on with after each prompt, as it is encoded."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for asked in ANSWERS:
        example = Example((Message("user", asked), Message("assistant", "")))
        (one,) = encode_examples([example], tokenizer, template)
        prompt = one.input_ids[~one.loss_mask].tolist()
        settings = {"max_new_tokens": MOST, "do_sample": False, "pad_token_id": 0}
        from torch import ones_like, tensor

        ids, stop = tensor([prompt]), tokenizer.convert_tokens_to_ids(closing)
        out = model.generate(ids, attention_mask=ones_like(ids), eos_token_id=stop, **settings)
        found.append(tokenizer.decode(out[0, len(prompt) :]))
    return found


def test_an_end_in_plain_text_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`[/]` is text like any other: a server that waits for a token would let the model go on."""
    monkeypatch.setattr(tokenization, "_said", set())
    example = Example((Message("user", "Hi"), Message("assistant", "Hello")))
    for end, said in (("[/]", True), ("[/]</s>", False)):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '" + end + "' }}{% endfor %}"
        encode_examples([example], tokenizer, "chat")
        text = (
            "closes answers with the text '[/]', which is no special token: what generates must be told to stop there"
        )
        assert (text in capsys.readouterr().err) is said
