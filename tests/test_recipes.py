"""Every recipe trains, with a tiny LLaMA in place of its model by arguments; every command of their pages is read."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from fitting import write_pool, write_rule, write_scores

from im_lightning import cli
from im_lightning.ledger.ledger import RunLedger

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
DESIGNED = "recipes/02_designed_runs/designed_run.yaml"
WEIGHTED = "recipes/04_weighted_finetune/weighted_finetune.yaml"
MODELS = sorted(p.stem for p in (RECIPES / "models").glob("*.yaml"))
HARDWARE = sorted(p.stem for p in (RECIPES / "hardware").glob("*.yaml"))
SWEEPS = sorted(str(p.relative_to(ROOT)) for p in RECIPES.glob("0*/sweep_*.yaml"))
PAGES = sorted(RECIPES.rglob("README.md"))
SMALL = [
    "--data.model=model", "--data.scores=scores.parquet", "--model.dtype=fp32", "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu", "--trainer.logger=false",
]  # fmt: skip


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the recipes name: pool (sources a and b), evaluation set, rule; and a model."""
    from tiny import make_tiny_llama

    monkeypatch.chdir(tmp_path)
    shutil.copytree(RECIPES, tmp_path / "recipes")
    make_tiny_llama(tmp_path / "model", hidden=16, layers=1)
    write_pool(tmp_path / "pool.jsonl", n=80)
    write_pool(tmp_path / "eval.jsonl", n=7, seed=9, tag="e")
    scores = write_scores(tmp_path / "scores.parquet", "pool.jsonl")
    (tmp_path / "runs").mkdir()
    write_rule(tmp_path / "runs" / "rule.json", scores)
    return tmp_path


def read(capfd: Any, *arguments: str) -> dict[str, Any]:
    """What `im-lightning fit` makes of arguments, without running it."""
    with pytest.raises(SystemExit):
        cli.main(["fit", *arguments, "--print_config"])
    return yaml.safe_load(capfd.readouterr().out)


# what is put together


@pytest.mark.parametrize("hardware", HARDWARE)
def test_every_model_goes_with_every_hardware(hardware: str, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt key in a file that only a cluster reads would cost a day in its queue."""
    monkeypatch.chdir(ROOT)
    wanted = yaml.safe_load((RECIPES / "hardware" / f"{hardware}.yaml").read_text())
    for model, recipe in zip(MODELS, (DESIGNED, WEIGHTED, WEIGHTED), strict=True):
        named = yaml.safe_load((RECIPES / "models" / f"{model}.yaml").read_text())
        files = [recipe, f"recipes/models/{model}.yaml", f"recipes/hardware/{hardware}.yaml"]
        made = read(capfd, *(f"--config={file}" for file in files))
        assert made["data"]["model"] == named["data"]["model"]
        assert made["data"]["batch_size"] == named["data"]["batch_size"]
        for group, values in wanted.items():
            for key, value in values.items():
                if key != "strategy" or isinstance(value, str):
                    assert made[group][key] == value
    assert "/" not in hardware and (made["trainer"]["devices"] == 8) == hardware.startswith(("eight", "cluster"))


def test_the_fsdp_strategy_is_made_and_refuses_a_cpu(desk: Path, capfd: Any) -> None:
    """As far as it goes without a GPU: LLaMA's layers are what is sharded."""
    from jsonargparse import ArgumentParser
    from pytorch_lightning.strategies import FSDPStrategy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    given = yaml.safe_load((RECIPES / "hardware/eight_gpus_fsdp.yaml").read_text())["trainer"]["strategy"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FSDPStrategy, "strategy")
    strategy = parser.instantiate_classes(parser.parse_object({"strategy": given})).strategy
    assert strategy.kwargs["auto_wrap_policy"]._module_classes == {LlamaDecoderLayer}
    status = cli.main(["fit", f"--config={DESIGNED}", "--config=recipes/hardware/eight_gpus_fsdp.yaml", *SMALL])
    assert status == 2 and "requires a GPU accelerator" in capfd.readouterr().err


def test_the_4_bit_recipe_says_what_it_lacks(desk: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from im_lightning.training import adapters as quantization

    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    status = cli.main(["fit", f"--config={WEIGHTED}", "--config=recipes/hardware/one_gpu_4bit.yaml", *SMALL])
    assert status == 2 and "nf4 needs bitsandbytes, which is not installed" in capfd.readouterr().err


# what trains


@pytest.mark.parametrize("model", MODELS)
def test_a_designed_run_and_a_weighted_finetune_on_one_gpu(desk: Path, capfd: Any, model: str) -> None:
    """On a CPU in place of the GPU; LoRA, gradient checkpointing and accumulation as the files say."""
    overlays = [f"--config=recipes/models/{model}.yaml", "--config=recipes/hardware/one_gpu.yaml", *SMALL]
    template = ["--data.template=alpaca"]
    assert cli.main(["fit", f"--config={DESIGNED}", *overlays, *template, "--data.subset_size=24"]) == 0
    assert cli.main(["fit", f"--config={WEIGHTED}", *overlays, *template, "--data.budget=24"]) == 0
    designed, weighted = RunLedger("runs").records()
    assert (designed.purpose, weighted.purpose) == ("designed", "weighted")
    assert designed.status == weighted.status == "complete"
    assert designed.regime["method"].startswith("lora r=16")


@pytest.mark.parametrize("hardware", ["eight_gpus_ddp", "cluster"])
def test_several_ranks(desk: Path, hardware: str) -> None:
    """Two processes in place of the eight GPUs and of the machines."""
    words = ["--trainer.strategy=ddp_fork", "--trainer.devices=2", "--trainer.num_nodes=1", "--data.subset_size=24"]
    assert cli.main(["fit", f"--config={DESIGNED}", f"--config=recipes/hardware/{hardware}.yaml", *SMALL, *words]) == 0
    (record,) = RunLedger("runs").records()
    assert record.status == "complete" and record.regime["rows_per_step"] == 16
    assert record.subset["exposures"] == 24, "every row once, over both ranks"


@pytest.mark.parametrize("file", SWEEPS)
def test_the_first_trial_of_every_sweep(desk: Path, file: str) -> None:
    words = shlex.join([*SMALL, "--trainer.devices=1", "--trainer.enable_checkpointing=false"])
    if "02_" in file:
        words += " --data.subset_size=24"
    if "05_" in file:  # sizes for a pool of 80 rows; the file's own are for real ones
        text = Path(file).read_text().replace("512, 1024, 2048, 4096, 8192", "16, 24")
        Path(file).write_text(text.replace("min: 512", "min: 16").replace("max: 10000", "max: 32"))
    else:
        words += "" if "02_" in file else " --data.budget=24"
    assert cli.main(["sweep", file, "--count=1", f"--arguments={words}"]) == 0
    (record,) = RunLedger("runs").records()
    purposes = {"02": "designed", "04": ("search", "compare"), "05": "search", "06": "compare"}
    assert record.status == "complete" and record.purpose in purposes[Path(file).parent.name[:2]]
    if "mixtures" in file:
        shares = record.subset["source_shares"]
        assert set(shares) == {"a", "b"} and shares["a"] != shares["b"]


def test_a_repeat_needs_another_order(desk: Path) -> None:
    """Under full finetuning the training seed decides nothing: repeats by it alone would show a noise of zero, and a
    ceiling of 1 for every rule. So the random sweeps draw `data.seed` too."""
    words = [f"--config={DESIGNED}", *SMALL, "--model.lora_rank=0", "--data.subset_size=24", "--mining.refit=false"]
    for seeds in ((0, 0), (1, 0), (0, 1)):
        assert cli.main(["fit", *words, f"--seed_everything={seeds[0]}", f"--data.seed={seeds[1]}"]) == 0
    first, same, other = (r.loss("eval") for r in RunLedger("runs").records())
    assert first == same and first != other
    drawn = [
        yaml.safe_load((RECIPES / "02_designed_runs" / f"sweep_{n}.yaml").read_text()) for n in ("random", "mixtures")
    ]
    assert "data.seed" in drawn[0]["parameters"] and "seed" in drawn[1]["parameters"]["data"]["parameters"]


# what the pages say


def commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["im-lightning"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.parent.name)
def test_every_command_of_a_page_is_one(page: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read as it stands, by the command's own parser; the files that it takes from here exist."""
    monkeypatch.chdir(ROOT)
    found = commands(page)
    assert found, "a recipe shows its command"
    for name, *rest in found:
        if name == "fit":
            assert read(capfd, *rest)["data"]["model"]
            continue
        made = cli._parse(name, import_module(f"im_lightning.commands.{name.replace('-', '_')}"), rest)
        if name == "sweep" and made["file"].startswith("recipes/"):
            assert Path(made["file"]).exists()
            words = shlex.split(made["arguments"] or "")
            assert all(Path(word).exists() for word in words if word.startswith("recipes/"))


def test_every_file_that_a_page_names_exists() -> None:
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
        missing = [link for link in links if not (page.parent / link).exists()]
        assert not missing, f"{page} names {missing}"


def test_the_estimates_are_the_formulas() -> None:
    """The table in the recipes' page is what the estimator prints."""
    from benchmarks.finetune_estimate import table

    assert table() in (RECIPES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["designed_v1.yaml", "designed_v3.yaml"])
def test_what_is_unknown_of_the_paper_is_marked(file: str) -> None:
    """Who reads the recipe must see what is the paper's and what is ours."""
    text = (RECIPES / "07_paper_protocol" / file).read_text(encoding="utf-8")
    lines = {line.strip().partition(":")[0]: line for line in text.splitlines()}
    for key in ("template", "max_length", "batch_size", "learning_rate", "accumulate_grad_batches", "sources"):
        assert "unknown" in lines[key], key


def test_the_papers_protocol_runs_small(desk: Path, capfd: Any) -> None:
    """The overlay takes the place of sources and model; LLaMA again is one override. Rows keep their source."""
    folder = "recipes/07_paper_protocol"
    small = [f"--config={folder}/designed_v1.yaml", f"--config={folder}/small.yaml"]
    assert set(read(capfd, *small)["data"]["sources"].values()) == {30.0}
    again = read(capfd, *small, "--config=recipes/models/llama-2-7b.yaml")
    assert again["data"]["model"] == "meta-llama/Llama-2-7b-hf"
    for name in ("d1.jsonl", "d2.jsonl"):
        write_pool(desk / name, n=30, seed=len(name), tag=name)
    text = Path(folder, "small.yaml").read_text()
    before = text[text.index("    alpaca@") : text.index("  model:")]
    Path(folder, "small.yaml").write_text(
        text.replace(before, "    alpaca@d1.jsonl: 20\n    self-instruct@d2.jsonl: 20\n")
    )
    words = ["--data.model=model", "--model.dtype=fp32", "--data.indicators=[length_output, ppl]"]
    assert cli.main(["fit", *small, *words]) == 0
    (record,) = RunLedger("runs").records()
    assert record.purpose == "designed" and set(record.subset["source_shares"]) == {"alpaca", "self-instruct"}
