"""An exported adapter is whole: tokenizer and template beside it, and the page says how it is merged into its base."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from fitting import trainer, write_pool
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from im_lightning import InstructMiningDataModule, InstructTuningModule

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> str:
    """A base whose output layer is its embedding matrix, as SmolLM2's is."""
    folder = tmp_path_factory.mktemp("tied")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("targets", "gguf"), [("all-linear", False), (["q_proj", "lm_head"], False), ("all-linear", True)]
)
def test_the_lines_of_its_page_merge_it(
    tied_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: str | list[str], gguf: bool
) -> None:
    """Run as they stand in the exported folder: the merged model answers as the trained one did."""
    base = str(write_gguf(tied_base, tmp_path / "tied.gguf", quantised=True)) if gguf else tied_base
    pl.seed_everything(0, verbose=False)
    tuner = InstructTuningModule(base, lora_rank=2, lora_target_modules=targets)
    tuner.configure_model()
    for name, weight in tuner.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    tuner.export_adapter(str(tmp_path / "adapter"))
    monkeypatch.chdir(tmp_path / "adapter")
    page = Path("README.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    exec(compile(code[0], "README.md", "exec"), {})
    ids = torch.tensor([[3, 7, 11, 20]])
    with torch.no_grad():
        wanted = tuner.network.eval()(input_ids=ids).logits
        got = AutoModelForCausalLM.from_pretrained("merged").eval()(input_ids=ids).logits
        plain = tuner.network.get_base_model()
        with tuner.network.disable_adapter():
            assert not torch.allclose(plain(input_ids=ids).logits, wanted, atol=1e-3)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert ("untie them first" in page) == ("lm_head" in targets)
    assert ("is the GGUF file tied.gguf (digest " in page) == gguf


def test_tokenizer_and_template_travel_with_it(tied_base: str, tmp_path: Path) -> None:
    tuner = InstructTuningModule(tied_base, lora_rank=2)
    tuner.configure_model()
    tuner.export_adapter(str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("Red and blue.").input_ids == AutoTokenizer.from_pretrained(tied_base)("Red and blue.").input_ids


def test_a_template_from_a_file_travels_too(small_base: str, tmp_path: Path) -> None:
    """Served in another template than it was trained in, the adapter would be worth little."""
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    pool = write_pool(tmp_path / "pool.jsonl", 6)
    data = InstructMiningDataModule(pool, model=small_base, template=str(tmp_path / "own.jinja"), batch_size=3)
    tuner = InstructTuningModule(small_base, lora_rank=2)
    trainer(tmp_path).fit(tuner, datamodule=data)
    tuner.export_adapter(str(tmp_path / "adapter"))
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template == TEMPLATE


def test_a_base_without_a_tokenizer_loses_nothing(
    small_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoModelForCausalLM.from_pretrained(small_base).save_pretrained(tmp_path / "bare")
    tuner = InstructTuningModule(str(tmp_path / "bare"), lora_rank=2)
    tuner.configure_model()
    tuner.export_adapter(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "no tokenizer was exported: " in capsys.readouterr().err
