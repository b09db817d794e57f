"""`loss_drop` and `gradient_similarity` through the public path: right values, kept by target set, no leak."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pools import alpaca, make_pool
from tiny import make_tiny_llama

from im_lightning.cli import main
from im_lightning.data.score_table import ScoreTable
from im_lightning.data.tokenization import encode_examples
from im_lightning.errors import RequestError
from im_lightning.models import checkpoint, low_rank, row_gradients
from im_lightning.models.likelihood import collate, summed_nll
from im_lightning.models.row_gradients import RowGradients
from im_lightning.scoring.api import score_examples
from im_lightning.scoring.passes import language_model, targets

BOTH = ["loss_drop", "gradient_similarity"]
TARGETS = [alpaca(f"Name the colour number {i}.", f"Colour {i} is red and blue.") for i in range(5)]
OTHERS = [alpaca(f"Tip {i}?", f"Exercise {i} times.") for i in range(3)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts models loaded, finetunes made, and rows whose gradient was taken."""
    counts = {"models": 0, "finetunes": 0, "gradients": 0}
    load, tune, forward = checkpoint.load_causal_lm, low_rank.finetune, targets.GradientPass.forward

    def count(name: str, real: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        return wrapped

    def gradients(self: Any, side: Any, at: np.ndarray) -> Any:
        counts["gradients"] += len(at)
        return forward(self, side, at)

    monkeypatch.setattr(checkpoint, "load_causal_lm", count("models", load))
    monkeypatch.setattr(targets, "finetune", count("finetunes", tune))
    monkeypatch.setattr(targets.GradientPass, "forward", gradients)
    return counts


def summed_gradients(model: Any, encoded: list[Any], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient of the rows' summed loss by the weights of all linear layers, in one row, times Aᵀ."""
    model.zero_grad()
    for one in encoded:
        summed_nll(model, collate([one], 0, "loss_mask")).sum().backward()
    named = dict(model.named_modules())
    return torch.cat([(named[name].weight.grad @ a.T).flatten() for name, a in weights.items()]).clone()


def test_gradient_similarity_equals_a_plain_loop(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact where nothing is projected: the cosine of the row's gradient with that of the targets' loss."""
    monkeypatch.setattr(row_gradients, "DIMENSIONS", 10**6)
    pool = make_pool(9)
    table = score_examples(pool, ["gradient_similarity"], tiny_llama, targets=TARGETS, precision="fp32")
    probe = RowGradients(checkpoint.load_causal_lm(tiny_llama))
    drawn = {name: layer.a for name, layer in probe.layers.items()}
    model, tokenizer = checkpoint.load_causal_lm(tiny_llama), checkpoint.load_tokenizer(tiny_llama)
    target = summed_gradients(model, encode_examples(TARGETS, tokenizer, "alpaca", 1024), drawn)
    cosines = [
        float(torch.nn.functional.cosine_similarity(summed_gradients(model, [one], drawn), target, dim=0))
        for one in encode_examples(pool, tokenizer, "alpaca", 1024)
    ]
    np.testing.assert_allclose(table.values["gradient_similarity"], cosines, atol=1e-5)
    assert np.std(cosines) > 1e-3


def test_loss_drop_is_the_share_of_the_loss_that_went(tiny_llama: str) -> None:
    pool = make_pool(6)
    names = ["ppl", "ppl_tuned", "loss_drop"]
    table = score_examples([*pool, *OTHERS], names, tiny_llama, targets=TARGETS, precision="fp32")
    before, after = np.log(table.values["ppl"]), np.log(table.values["ppl_tuned"])
    np.testing.assert_allclose(table.values["loss_drop"], (before - after) / before, rtol=1e-12)
    model, tokenizer = checkpoint.load_causal_lm(tiny_llama), checkpoint.load_tokenizer(tiny_llama)
    low_rank.finetune(model, encode_examples(TARGETS, tokenizer, "alpaca", 1024), 0, low_rank.Recipe())
    rows = [collate([one], 0) for one in encode_examples([*pool, *OTHERS], tokenizer, "alpaca", 1024)]
    with torch.no_grad():
        losses = [float(summed_nll(model, row) / row["target_mask"][:, 1:].sum()) for row in rows]
    np.testing.assert_allclose(after, losses, rtol=1e-4)
    alike = score_examples([alpaca("Name a colour.", "Colour 7 is red and blue.")], names, tiny_llama, targets=TARGETS)
    assert alike.values["loss_drop"][0] > table.values["loss_drop"].max()  # what the targets teach


def test_a_second_scoring_loads_nothing_and_other_targets_take_only_their_own_gradients(
    tiny_llama: str, counted: dict[str, int]
) -> None:
    """An hour over a large pool is spent once, whatever it is compared with later."""
    pool = make_pool(12)
    first = score_examples(pool, BOTH, tiny_llama, targets=TARGETS)
    assert counted == {"models": 4, "finetunes": 1, "gradients": 12 + 5}
    again = score_examples(pool[::-1], BOTH, tiny_llama, targets=TARGETS[::-1])
    assert counted == {"models": 4, "finetunes": 1, "gradients": 12 + 5}
    np.testing.assert_array_equal(first.values["loss_drop"], again.values["loss_drop"][::-1])
    other = score_examples(pool, ["gradient_similarity"], tiny_llama, targets=OTHERS)
    assert counted["gradients"] == 12 + 5 + 3 and counted["models"] == 5
    identities = [one.keys["gradient_similarity"]["identity"] for one in (first, other)]
    assert identities[0]["targets"] != identities[1]["targets"]
    assert {**identities[0], "targets": 0} == {**identities[1], "targets": 0}
    assert not np.allclose(first.values["gradient_similarity"], other.values["gradient_similarity"])


def test_rows_scored_later_are_scored_by_the_same_finetune(tiny_llama: str, counted: dict[str, int]) -> None:
    pool = make_pool(8)
    score_examples(pool[:5], ["loss_drop"], tiny_llama, targets=TARGETS)
    more = score_examples(pool, ["loss_drop"], tiny_llama, targets=TARGETS)
    assert counted["finetunes"] == 1 and np.isfinite(more.values["loss_drop"]).all()


def test_targets_in_another_order_give_the_same_finetune(tiny_llama: str, tmp_path: Path) -> None:
    """In the store they are the same targets: two machines gave two values for one thing."""
    from safetensors.torch import load_file

    many = [alpaca(f"Name the colour number {i}.", f"Colour {i} is red and blue.") for i in range(12)]
    for name, rows in (("a", many), ("b", many[::-1])):
        score_examples(make_pool(2), ["ppl_tuned"], tiny_llama, targets=rows, cache_dir=tmp_path / name)
    kept = [path for name in "ab" for path in (tmp_path / name / "tuned").glob("*.safetensors")]
    assert len(kept) == 2 and kept[0].name == kept[1].name
    first, other = map(load_file, kept)
    for name, one in first.items():
        torch.testing.assert_close(other[name], one, rtol=1e-4, atol=1e-6)


def test_a_finetune_that_is_damaged_is_made_anew(tiny_llama: str, counted: dict[str, int], own_cache: Path) -> None:
    """A file cut short ended in a traceback at every scoring towards these targets."""
    pool = make_pool(8)
    first = score_examples(pool[:5], ["ppl_tuned"], tiny_llama, targets=TARGETS)
    [kept] = own_cache.glob("tuned/*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-100])
    more = score_examples(pool, ["ppl_tuned"], tiny_llama, targets=TARGETS)
    assert counted["finetunes"] == 2 and np.isfinite(more.values["ppl_tuned"]).all()
    assert more.values["ppl_tuned"][:5].tolist() == first.values["ppl_tuned"].tolist()
    assert kept.exists() and kept.with_name(f"{kept.name}.rejected").exists()


def test_interrupt_keeps_the_gradients_that_were_finished(
    tiny_llama: str, tmp_path: Path, counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, how = make_pool(30), {"batch_tokens": 200, "targets": TARGETS}
    whole = score_examples(pool, ["gradient_similarity"], tiny_llama, cache_dir=tmp_path / "whole", **how)
    counted["gradients"], counting = 0, targets.GradientPass.forward

    def forward(self: Any, side: Any, at: np.ndarray) -> Any:
        if counted["gradients"] >= 18:
            raise KeyboardInterrupt
        return counting(self, side, at)

    with monkeypatch.context() as patch:
        patch.setattr(targets.GradientPass, "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            score_examples(pool, ["gradient_similarity"], tiny_llama, cache_dir=tmp_path / "c", **how)
    assert 18 <= counted["gradients"] < 35
    resumed = score_examples(pool, ["gradient_similarity"], tiny_llama, cache_dir=tmp_path / "c", **how)
    assert counted["gradients"] == 30 + 5  # exactly the rest
    np.testing.assert_allclose(
        resumed.values["gradient_similarity"], whole.values["gradient_similarity"], rtol=1e-4, atol=1e-6
    )


def test_order_and_batches_do_not_matter(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(20)
    first = score_examples(pool, BOTH, tiny_llama, targets=TARGETS, cache_dir=tmp_path / "a")
    monkeypatch.setattr(language_model, "FIRST_ROWS", 7)
    other = score_examples(pool[::-1], BOTH, tiny_llama, targets=TARGETS, cache_dir=tmp_path / "b", batch_tokens=1)
    for name, tolerance in (("gradient_similarity", 1e-5), ("loss_drop", 1e-4)):
        np.testing.assert_allclose(other.values[name][::-1], first.values[name], atol=tolerance)


def test_rows_without_a_value_say_why(tiny_llama: str) -> None:
    table = score_examples([alpaca("Say nothing.", ""), *make_pool(2)], BOTH, tiny_llama, targets=TARGETS)
    assert table.reasons["loss_drop"][0] == "empty response" and np.isfinite(table.values["loss_drop"][1:]).all()
    assert np.isfinite(table.values["gradient_similarity"][1:]).all()


def test_gradients_that_fit_nowhere_are_a_reason(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row of the pool had one: their width was taken for 0, and the work ended in a traceback."""
    real = targets.GradientPass.forward

    def forward(self: Any, side: Any, at: np.ndarray) -> Any:
        if self.pool is not self.setup.targets:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, side, at)

    monkeypatch.setattr(targets.GradientPass, "forward", forward)
    table = score_examples(make_pool(3), ["gradient_similarity"], tiny_llama, targets=TARGETS)
    assert table.reasons["gradient_similarity"] == ["no gradient of this row"] * 3


def test_a_model_that_gives_nan_is_a_reason(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_tiny_llama(tmp_path / "broken")
    weights = load_file(Path(model) / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * float("nan")
    save_file(weights, Path(model) / "model.safetensors", metadata={"format": "pt"})
    table = score_examples(make_pool(2), ["gradient_similarity"], model, targets=TARGETS)
    assert table.reasons["gradient_similarity"] == ["the targets' mean gradient is zero or not finite"] * 2
    with pytest.raises(Exception, match=r"finetuning on the targets: its loss is not finite at step 1 .*fp32"):
        score_examples(make_pool(2), ["loss_drop"], model, targets=TARGETS)


def written(path: Path, examples: list[Any]) -> str:
    rows = [{"instruction": one.instruction, "input": one.input, "output": one.response} for one in examples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pool = make_pool(14)
    written(tmp_path / "pool.jsonl", pool)
    written(tmp_path / "targets.jsonl", TARGETS)
    written(tmp_path / "eval.jsonl", OTHERS)
    written(tmp_path / "leak.jsonl", [*TARGETS[:2], pool[3]])
    written(tmp_path / "prompt.jsonl", [*OTHERS, replace(TARGETS[1])])
    return tmp_path


def test_the_command_scores_them_and_the_table_keeps_whose_rows_they_were(
    desk: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["score", "pool.jsonl", "--model", tiny_llama, "--targets", "targets.jsonl", "--out", "scores.parquet"]
    assert main([*asked, "--indicators", ",".join(BOTH), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "gradients of the targets: 5 rows to compute" in told and "ppl_tuned: 14 rows to compute" in told
    assert main([*asked, "--eval-data", "eval.jsonl"]) == 0
    table = ScoreTable.read("scores.parquet")
    assert {"mtld", "ppl", *BOTH} <= set(table.indicators) and "ppl_tuned" not in table.indicators
    assert table.meta["targets"] == {"data": "targets.jsonl", "ids": [one.id for one in TARGETS]}
    assert "gradient_similarity: 14 scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--targets", "leak.jsonl"], r"--targets leak.jsonl: it shares a row with pool.jsonl: row 2 is row 3 there "
         r"\(the same content\). Fix: take other rows.*im-lightning check leak.jsonl pool.jsonl"),
        (["--targets", "targets.jsonl", "--eval-data", "eval.jsonl", "prompt.jsonl"],
         r"--targets targets.jsonl: it shares a row with prompt.jsonl: row 1 is row 3 there"),
        ([], r"gradient_similarity: target rows are needed and none were named. Fix: .*--targets"),
        (["--eval-data", "eval.jsonl"], "--eval-data eval.jsonl: is compared with the target rows, and none are named"),
        (["--targets", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_used_are_refused_before_the_work(
    desk: Path, tiny_llama: str, more: list[str], text: str, capsys: pytest.CaptureFixture[str], counted: dict[str, int]
) -> None:
    """A target that is a pool row is like itself; one that is evaluated on makes the evaluation worthless."""
    import re

    asked = ["score", "pool.jsonl", "--model", tiny_llama, "--indicators", "gradient_similarity", "--out", "x.parquet"]
    assert main([*asked, *more]) in (1, 2)
    assert re.search(text, capsys.readouterr().err) and counted["models"] == 0 and not Path("x.parquet").exists()


def test_examples_in_python_are_checked_too(tiny_llama: str) -> None:
    pool = make_pool(4)
    with pytest.raises(RequestError, match=r"the pool: row 0 is row 2 there .*Fix: take other rows as targets\.$"):
        score_examples(pool, BOTH, tiny_llama, targets=[pool[2]])
    with pytest.raises(RequestError, match=r"the target rows: it shares a row with the pool: row 0 is row 2 there"):
        score_examples(pool, BOTH, tiny_llama, targets=[pool[2]])
    with pytest.raises(RequestError, match="the targets: they have no rows"):
        score_examples(pool, BOTH, tiny_llama, targets=[])
    with pytest.raises(RequestError, match="gradient_similarity: a base model is needed"):
        score_examples(pool, BOTH, targets=TARGETS)


def test_targets_and_a_reference_are_read_as_the_pool_is(
    desk: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str], counted: dict[str, int]
) -> None:
    """By the same columns, with bad rows set aside where asked for; what the template refuses is found out early."""

    def named(path: str, examples: list[Any]) -> None:
        rows = [{"q": one.prompt, "a": one.response} for one in examples]
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    named("pool.jsonl", make_pool(6))
    named("targets.jsonl", TARGETS)
    named("near.jsonl", OTHERS)
    asked = ["score", "pool.jsonl", "--model", tiny_llama, "--indicators", "gradient_similarity,knn_1"]
    asked += ["--columns", "prompt=q,response=a", "--out", "s.parquet"]
    more = ["--targets", "targets.jsonl", "--knn-reference", "near.jsonl"]
    assert main([*asked, *more]) == 0
    for path in ("targets.jsonl", "near.jsonl"):
        with Path(path).open("a") as stream:
            stream.write('{"q": "Unanswered?"}\n')
    assert main([*asked, *more]) == 1 and "targets.jsonl:6: no response" in capsys.readouterr().err
    assert main([*asked, *more, "--on-bad-row", "quarantine"]) == 0
    said = capsys.readouterr().err
    assert "targets.jsonl: 1 bad row set aside" in said and "near.jsonl: 1 bad row set aside" in said
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    Path("calls.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "?"}, call]}))
    written(Path("pool.jsonl"), make_pool(3))
    loaded = counted["models"]
    asked = ["score", "pool.jsonl", "--model", tiny_llama, "--indicators", "loss_drop", "--out", "t.parquet"]
    assert main([*asked, "--targets", "calls.jsonl"]) == 1
    assert "calls.jsonl:1: the alpaca template refuses it" in capsys.readouterr().err and counted["models"] == loaded
