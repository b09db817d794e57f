"""On a real LLaMA and a real sentence embedder: the same numbers as plain loops over their libraries, and it learns."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pools import write_jsonl

from im_lightning import (
    InstructMiningCallback,
    InstructMiningDataModule,
    InstructTuningModule,
    load_examples,
    score_examples,
)
from im_lightning.ledger.ledger import RunLedger
from im_lightning.models.checkpoint import load_causal_lm, load_tokenizer
from tests.real.conftest import rows_of

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900)]
ROWS = rows_of(50, seed=1)


def test_it_is_the_model_that_it_is_called(smollm2: str) -> None:
    """Cut and dequantised rightly, it speaks: tokens of blank lines and digits are those it was pretrained on."""
    tokenizer, model = load_tokenizer("smollm2"), load_causal_lm("smollm2")
    assert tokenizer.tokenize("a:\n\n1. x  12") == ["a", ":", "ĊĊ", "1", ".", "Ġx", "ĠĠ", "1", "2"]
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    given = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**given, max_new_tokens=10, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_perplexities_are_those_of_a_plain_loop(smollm2: str) -> None:
    """One row after the other through transformers, in the model's chat template: exp of the mean over the answer."""
    table = score_examples(load_examples(ROWS), ["ppl"], model="smollm2", precision="fp32", device="cpu")
    tokenizer, model = load_tokenizer(smollm2), load_causal_lm(smollm2)
    wanted = []
    for row in ROWS:
        turns = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt + row["output"], add_special_tokens=False, return_tensors="pt").input_ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, start:])
        wanted.append(math.exp(float(nll)))
    np.testing.assert_allclose(table.values["ppl"], wanted, rtol=2e-4)


def test_neighbours_are_those_of_sentence_transformers_and_scikit_learn() -> None:
    from sentence_transformers import SentenceTransformer
    from sklearn.neighbors import NearestNeighbors

    from im_lightning.models.fingerprint import local_folder

    unique = list({row["instruction"]: row for row in ROWS}.values())
    table = score_examples(load_examples(unique), ["knn_6"], embedding_model="minilm", device="cpu")
    embedder = SentenceTransformer(str(local_folder("minilm")), device="cpu")
    vectors = embedder.encode([f"{row['instruction']}\n{row['output']}" for row in unique], normalize_embeddings=True)
    distances, _ = NearestNeighbors(n_neighbors=7, algorithm="brute").fit(vectors).kneighbors(vectors)
    np.testing.assert_allclose(table.values["knn_6"], distances[:, 6], atol=1e-4)


def test_answers_to_one_long_prompt_are_neighbours_and_no_copies() -> None:
    """MiniLM takes 256 tokens; cut there, the three rows were one and the same."""
    from im_lightning import Example, Message

    log = " ".join(f"line {i}: the caretaker checks valve {i} and notes the pressure." for i in range(60))
    answers = ("All valves were fine.", "Valve 7 leaked twice.", "Nothing was noted on Sunday.")
    rows = [Example((Message("user", f"Summarise.\n{log}"), Message("assistant", one))) for one in answers]
    rows.append(Example((Message("user", "Name a river."), Message("assistant", "The Elbe."))))
    nearest = score_examples(rows, ["knn_1"], embedding_model="minilm", device="cpu").values["knn_1"]
    assert (nearest[:3] > 0.02).all() and nearest[3] > 1
    alone = score_examples(rows, ["knn_1"], embedding_model="minilm", device="cpu", embed="response").values["knn_1"]
    assert (alone[:3] > 0.5).all()


def fit(folder: Path, rank: int, rate: float, callbacks: list[Any] | None = None, **more: Any) -> InstructTuningModule:
    """A finetune of SmolLM2 on 32 rows, evaluated on others of their kinds; its run is in `folder`/runs."""
    pl.seed_everything(0, verbose=False)
    data = InstructMiningDataModule(
        write_jsonl(folder / "pool.jsonl", rows_of(32, seed=2)),
        eval_data=write_jsonl(folder / "held_out.jsonl", rows_of(12, seed=3)),
        model="smollm2",
        indicators=["length_output"],
        batch_size=8,
        max_length=256,
    )
    tuner = InstructTuningModule("smollm2", lora_rank=rank, learning_rate=rate, dtype="fp32")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[*(callbacks or []), InstructMiningCallback(ledger=str(folder / "runs"), refit=False)],
    )
    trainer.fit(tuner, datamodule=data, **more)
    return tuner


def losses(folder: Path) -> dict[str, float]:
    """Of the last run, on the rows held out."""
    return RunLedger(folder / "runs").records()[-1].evaluation["held_out"]


def test_a_full_finetune_lowers_the_loss_on_held_out_rows_of_its_kinds(smollm2: str, tmp_path: Path) -> None:
    fit(tmp_path, rank=0, rate=5e-5)
    found = losses(tmp_path)
    assert found["loss"] < 0.9 * found["base_loss"], found


def test_the_lines_of_the_page_train_an_adapter_that_plain_peft_loads(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pasted: MiniLM's neighbours, a designed subset, LoRA, a lower loss on rows held out; template included."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    write_jsonl(tmp_path / "pool.jsonl", rows_of(60, seed=2))
    write_jsonl(tmp_path / "eval.jsonl", rows_of(12, seed=3))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/models.md", "exec"), names)
    (found,) = (r.evaluation["eval"] for r in RunLedger("runs").records())
    assert found["loss"] < 0.9 * found["base_loss"], found
    tokenizer = AutoTokenizer.from_pretrained("adapter")
    assert "SmolLM" in tokenizer.chat_template
    ids = tokenizer("A shop sells apples.", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = names["tuner"].network.eval()(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=wanted.dtype)  # bf16 where the processor has it
        plain = PeftModel.from_pretrained(base, "adapter").eval()
        near = 1e-3 if wanted.dtype == torch.float32 else 0.05
        torch.testing.assert_close(plain(input_ids=ids).logits, wanted, rtol=near, atol=near)


class SaveAndStop(pl.Callback):
    """Leaves a checkpoint after the second of four steps, and ends the fit there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def test_a_run_stopped_in_its_middle_ends_where_it_would_have(smollm2: str, tmp_path: Path) -> None:
    """The same rows in the same order, the same optimiser: the weights of the uninterrupted run."""
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = fit(tmp_path / "whole", 16, 1e-3)
    checkpoint = tmp_path / "half.ckpt"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path / "parts", 16, 1e-3, [SaveAndStop(checkpoint)])
        raise KeyboardInterrupt  # Lightning may end the fit without passing it on
    resumed = fit(tmp_path / "parts", 16, 1e-3, ckpt_path=str(checkpoint), weights_only=True)
    wanted = dict(whole.named_parameters())
    for name, weight in resumed.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight, wanted[name], rtol=1e-4, atol=1e-6)
    assert losses(tmp_path / "parts")["loss"] == pytest.approx(losses(tmp_path / "whole")["loss"], rel=1e-4)
