"""`turns="each"`: every answer in its own history; several sequences in a step, and the row stays the unit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import trainer
from pools import write_jsonl
from tiny import make_tiny_llama
from torch import Tensor

from im_lightning import (
    InstructMiningCallback,
    InstructMiningDataModule,
    InstructTuningModule,
    RequestError,
    RunLedger,
)
from im_lightning.cli import main
from im_lightning.models.checkpoint import load_causal_lm, load_tokenizer

THINKING = (  # as Qwen3: the last answer gets an empty thought, earlier ones none
    "{% for m in messages %}{{ '[' + m.role + ']' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '[/]\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TALKS = [
    ["Red?", "A color.", "Blue?", "A color, too.", "Air?", "No."],
    ["Name an atom.", "Helium."],
    ["Tips?", "Exercise daily.", "More?", "Eat."],
    ["Healthy?", "Yes, regularly."],
    ["How many?", "Three of them.", "Which?", "The ones listed here."],
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_llama(tmp_path_factory.mktemp("base"), hidden=16, layers=1, chat_template=THINKING)


def write(path: Path, talks: list[list[str]] = TALKS) -> str:
    rows = [{"messages": [turn(["user", "assistant"][i % 2], t) for i, t in enumerate(talk)]} for talk in talks]
    return write_jsonl(path, rows)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def data_of(base: str, folder: Path, talks: list[list[str]] = TALKS, **options: Any) -> InstructMiningDataModule:
    pool, given = write(folder / "pool.jsonl", talks), {"batch_size": 5, "turns": "each", **options}
    return InstructMiningDataModule(pool, model=base, run_dir=str(folder / "run"), **given)


def by_hand(base: str, network: Any, talk: list[str]) -> list[tuple[Tensor, int]]:
    """Sum of nats and number of tokens of each answer."""
    return [(nats.sum(), len(nats)) for nats in token_nats(base, network, talk)]


def token_nats(base: str, network: Any, talk: list[str]) -> list[Tensor]:
    """Nats of the tokens of each answer, by apply_chat_template and a plain call of the model."""
    tokenizer, found = load_tokenizer(base), []
    for k in range(1, len(talk), 2):
        turns = [turn(["user", "assistant"][i % 2], text) for i, text in enumerate(talk[: k + 1])]
        prompt, _, _ = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(talk[k])
        head, tail = tokenizer(prompt)["input_ids"], []
        for part in (talk[k], "[/]"):
            tail += tokenizer(part, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([head + tail])
        logits = network(input_ids=ids).logits[0, len(head) - 1 : -1]
        found.append(torch.nn.functional.cross_entropy(logits, ids[0, len(head) :], reduction="none"))
    return found


@pytest.mark.parametrize("budget", ["auto", 40])
@pytest.mark.parametrize("reduction", ["token", "example"])
def test_loss_and_gradient_are_those_of_all_answers_by_rows(
    base: str, tmp_path: Path, budget: int | str, reduction: str
) -> None:
    """A row's loss is that of all its answers; under "example" a row of three answers counts once, not three times."""
    data = data_of(base, tmp_path)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["input_ids"].shape[0] == 9 and sorted(batch["row"].tolist()) == [0, 1, 2, 3, 4]
    tuner = InstructTuningModule(base, lora_rank=0, reduction=reduction, token_budget=budget)
    tuner.configure_model()
    out = tuner.training_step(batch, 0)
    out["loss"].backward()
    got = {name: p.grad for name, p in tuner.network.named_parameters()}

    network = load_causal_lm(base)
    rows = [by_hand(base, network, TALKS[row]) for row in batch["row"].tolist()]
    sums = [sum(nats for nats, _ in row) for row in rows]
    counts = [sum(tokens for _, tokens in row) for row in rows]
    means = torch.stack([total / n for total, n in zip(sums, counts, strict=True)])
    wanted = sum(sums) / sum(counts) if reduction == "token" else means.mean()
    wanted.backward()
    torch.testing.assert_close(out["example_loss"], means.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["loss"].detach(), wanted.detach(), rtol=1e-5, atol=1e-5)
    for name, p in network.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-6)


def test_evaluation_counts_the_same_answers(base: str, tmp_path: Path) -> None:
    """Nats per token over all answers of the evaluation set, one division at the end, filler rows or not."""
    options = {"eval_data": write(tmp_path / "eval.jsonl", TALKS[::-1]), "eval_batch_tokens": 60}
    data = data_of(base, tmp_path, [*TALKS, ["Hi.", "Hello."]], **options)
    data.setup("fit")
    tuner = InstructTuningModule(base, lora_rank=2)
    tuner.configure_model()
    tuner.eval()
    sums, counts = torch.zeros(5), torch.zeros(5, dtype=torch.int64)
    for rank in (0, 1):
        for batch in data.eval_batches("eval", rank, 2):
            nats, tokens = tuner.response_nll(batch)
            real = batch["row"] >= 0
            assert not tokens[~real].any()
            sums[batch["row"][real]], counts[batch["row"][real]] = nats[real], tokens[real]
    with torch.no_grad():
        rows = [by_hand(base, tuner.network, talk) for talk in TALKS[::-1]]
    assert counts.tolist() == [sum(tokens for _, tokens in row) for row in rows]
    torch.testing.assert_close(sums, torch.stack([sum(n for n, _ in row) for row in rows]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", ["auto", 40])
def test_loss_without_the_first_and_last_token_of_each_answer(base: str, tmp_path: Path, budget: int | str) -> None:
    """What a finetune learns of form is in them; against a plain loop over answers, in record and per-example file."""
    options = {"eval_data": write(tmp_path / "eval.jsonl", TALKS), "eval_batch_tokens": 60}
    data = data_of(base, tmp_path, [["Hi.", "Hello."]], **options)
    tuner = InstructTuningModule(base, lora_rank=2, token_budget=budget, dtype="fp32")
    recording = InstructMiningCallback(ledger=str(tmp_path / "runs"))
    trainer(tmp_path, max_steps=1, callbacks=[recording]).fit(tuner, datamodule=data)
    ledger = RunLedger(tmp_path / "runs")
    (record,) = ledger.records()
    kept = ledger.losses(record.run_id)["eval"]
    nats = []
    with torch.no_grad():
        tuner.eval()
        for talk in TALKS:
            nats.append([one for answer in token_nats(base, tuner.network, talk) for one in (answer[0], answer[-1])])
        inner = [float(v) for talk in TALKS for answer in token_nats(base, tuner.network, talk) for v in answer[1:-1]]
    assert record.evaluation["eval"]["inner_loss"] == pytest.approx(sum(inner) / len(inner), rel=1e-4)
    assert kept.edge_counts.tolist() == [len(edges) for edges in nats]
    assert kept.edge_sums.tolist() == pytest.approx([float(sum(edges)) for edges in nats], rel=1e-4)


def test_a_run_draws_rows_and_counts_all_of_their_tokens(base: str, tmp_path: Path) -> None:
    """The same rows in the same order as with the last answer alone; its regime is another."""
    records, order = {}, {}
    for turns in ("last", "each"):
        folder = tmp_path / turns
        folder.mkdir()
        data = data_of(base, folder, eval_data=write(folder / "eval.jsonl", TALKS[:2]), turns=turns, batch_size=2)
        callback = InstructMiningCallback(ledger=str(folder / "runs"))
        fit = trainer(folder, callbacks=[callback], max_epochs=2)
        fit.fit(InstructTuningModule(base, lora_rank=2), datamodule=data)
        (records[turns],) = RunLedger(folder / "runs").records()
        order[turns] = list(data.sampler)
    assert order["last"] == order["each"]
    network = load_causal_lm(base)
    tokens = [[n for _, n in by_hand(base, network, talk)] for talk in TALKS[2:]]
    assert records["each"].tokens == 2 * sum(map(sum, tokens))  # the other rows are in the evaluation set
    assert records["last"].tokens == 2 * sum(one[-1] for one in tokens)
    assert records["each"].regime["template"] != records["last"].regime["template"]


def test_a_fit_resumes_at_the_next_row_not_at_the_next_sequence(base: str, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch whose rows are one to three sequences, it ends with the same weights."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    def fit(folder: Path, checkpoint: str | None = None) -> dict[str, Tensor]:
        torch.manual_seed(3)
        keep = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        tuner = InstructTuningModule(base, lora_rank=2, learning_rate=1e-2)
        each = trainer(folder, callbacks=[keep], max_epochs=2, enable_checkpointing=True)
        each.fit(tuner, datamodule=data_of(base, tmp_path, batch_size=1), ckpt_path=checkpoint)
        assert each.global_step == 10
        return {name: p.detach().clone() for name, p in tuner.named_parameters() if p.requires_grad}

    whole = fit(tmp_path / "whole")
    resumed = fit(tmp_path / "resumed", str(tmp_path / "whole" / "step=3.ckpt"))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


def test_rows_of_one_answer_are_as_they_were(base: str, tmp_path: Path) -> None:
    """No `owner` where no row has a second sequence; a template without the trouble is not another one for it."""
    from im_lightning import resolve_template

    single = [talk for talk in TALKS if len(talk) == 2]
    data = data_of(base, tmp_path, single)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert set(batch) == {"input_ids", "attention_mask", "target_mask", "row"}
    tokenizer = load_tokenizer(base)
    for name in ("alpaca", "none"):
        assert resolve_template(name, tokenizer, "each").identity == resolve_template(name, tokenizer).identity


def test_what_cannot_be_asked_is_refused(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match=r"turns 'all': is not known\. Fix: use one of last, each"):
        data_of(base, tmp_path, turns="all").setup("fit")
    arguments = ["score", str(tmp_path / "pool.jsonl"), "--model", base, "--turns", "each", "--out", "s.parquet"]
    assert main(arguments) == 2
    assert "--turns each: is for finetuning; where a template changes earlier answers, scores are of the last" in (
        capsys.readouterr().err
    )
