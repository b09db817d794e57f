"""The README tells the truth: its commands and code run as they stand, with a tiny model in place of the named one."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest

from im_lightning import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "meta-llama/Llama-3.2-1B"
RUNS = 9  # enough for five regressors; the README says more, which is better advice and a slower test


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def block_with(language: str, text: str) -> str:
    found = [block for block in blocks(language) if text in block]
    assert len(found) == 1, f"{len(found)} {language} blocks of the README hold {text!r}"
    return found[0]


def commands(block: str) -> list[list[str]]:
    """The `im-lightning` commands of a shell block, its loop over $k unrolled for the first RUNS values."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["im-lightning"]:
            continue
        looped = any("$k" in word for word in words)
        for k in range(RUNS if looped else 1):
            found.append([word.replace("$k", str(k)) for word in words[1:]])
    return found


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: str) -> Path:
    """A folder such as a user has: a pool, an evaluation set, the recipes."""
    draw = random.Random(0)
    words = ["red", "blue", "atom", "cell", "tree", "river", "stone", "cloud", "light", "heavy", "quick", "slow"]

    def row() -> dict[str, str]:
        return {
            "instruction": f"Say {' '.join(draw.choices(words, k=draw.randint(2, 9)))}.",
            "input": "",
            "output": " ".join(draw.choices(words, k=draw.randint(2, 20))),
        }

    (tmp_path / "alpaca.json").write_text(json.dumps([row() for _ in range(150)]))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(8)))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(word: str, model: str) -> str:
    """A README argument at the size of a test."""
    for old, new in (
        (MODEL, model),
        ("subset_size=1000", "subset_size=40"),
        ("budget=2000", "budget=40"),
    ):
        word = word.replace(old, new)
    return "40" if word == "2000" else word


def test_the_shell_commands_run_in_their_order(desk: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From a scored pool to an exported adapter and a chosen subset, exactly as the README says."""
    done = commands(block_with("bash", "im-lightning score"))
    assert [command[0] for command in done] == ["score", *["fit"] * RUNS, "runs", "refit", "fit", "select"]
    for command in done:
        arguments = [small(word, tiny_llama) for word in command]
        if arguments[0] == "fit":
            arguments += ["--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
        if (desk / "runs" / "rule.json").exists():  # of nine tiny runs: no better than the mean, and refused as that
            arguments += {"fit": ["--data.force=true"], "select": ["--force"]}.get(arguments[0], [])
        status = cli.main(arguments)
        shown = capsys.readouterr()
        assert status == 0, f"{command}: {shown.err}"
    assert (desk / "adapter" / "adapter_model.safetensors").exists()
    assert len((desk / "subset.jsonl").read_text().splitlines()) == 40


def test_the_python_of_a_user_runs(desk: Path, tiny_llama: str) -> None:
    """The lines at the top, in a folder where no rule has been fitted yet."""
    code = block_with("python", "pl.Trainer(").replace(MODEL, tiny_llama).replace("budget=2000", "budget=16")
    code = code.replace('rule="runs/rule.json", ', "").replace("max_epochs=3", "max_epochs=1, accelerator='cpu'")
    exec(compile(code, "README.md", "exec"), {})
    records = [json.loads(path.read_text()) for path in (desk / "runs").glob("*[!s].json")]  # not *.statistics
    assert [record["status"] for record in records] == ["complete"]


def test_the_custom_indicator_scores(desk: Path) -> None:
    from im_lightning import load_examples, score_examples

    exec(compile(block_with("python", "@register_indicator"), "README.md", "exec"), {})
    table = score_examples(load_examples("alpaca.json"), indicators=["questions"])
    assert table.values["questions"].tolist() == [0.0] * 150


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"\b((?:recipes|docs|scripts|tests)/[\w./-]*\w)", README)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"the README names {missing}"
