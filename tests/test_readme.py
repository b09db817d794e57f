"""README and the pages out of it tell the truth: commands and code run as they stand, with a tiny model in place."""

from __future__ import annotations

import functools
import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest

import im_lightning
from im_lightning import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("your_data", "questions", "claims", "extend", "demo", "surprises", "index")
}
"""What a newcomer reads after the README."""
TEXT = "\n".join([README, *PAGES.values()])
MODEL = "meta-llama/Llama-3.2-1B"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def block_with(language: str, text: str) -> str:
    found = [block for block in blocks(language) if text in block]
    assert len(found) == 1, f"{len(found)} {language} blocks of the pages hold {text!r}"
    return found[0]


def commands(block: str) -> list[list[str]]:
    """The `im-lightning` commands of a shell block."""
    lines = (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines())
    return [words[1:] for words in lines if words[:1] == ["im-lightning"]]


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

    for name, rows in (("pool", 150), ("eval", 8), ("search", 8), ("report", 8)):
        lines = [{**row(), "source": f"s{k % 3}"} for k in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for recipe in (tmp_path / "recipes").rglob("*.yaml"):
        recipe.write_text(recipe.read_text(encoding="utf-8").replace(MODEL, tiny_llama), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = {
    "--runs": "10", "--subset-size": "40", "--budget": "40", "--low": "20", "--high": "60", "--budget-trials": "3",
    "--tokens": "300", "--steps": "3",
}  # fmt: skip
"""The README's sizes, at that of a test: enough for five regressors, and for nothing to be learnt."""


def small(command: list[str], model: str) -> list[str]:
    """A README command at the size of a test, on the CPU."""
    words = [word.replace(MODEL, model).replace("budget=2000", "budget=40") for word in command]
    for place, word in enumerate(words[:-1]):
        if word in SMALL:
            words[place + 1] = SMALL[word]
    cpu = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
    more = {
        "fit": cpu,
        "sweep": [f"--arguments={' '.join(cpu)}"],
        "search": ["--device", "cpu", "--grid", "30", "--seeds", "2"],
        "compare": ["--device", "cpu", "--seeds", "2", "--arms", "random,weighted"],
    }
    return words + more.get(words[0], [])


def run_block(text: str, model: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Runs the commands of the block that holds `text`; of ten tiny runs the rule is no better than the mean, and
    refused as that, so it is forced. What `refit` wrote stays, byte for byte. Returns their names."""
    written = None
    done = commands(block_with("bash", text))
    for command in done:
        arguments = small(command, model)
        if command[0] in ("fit", "select", "search", "compare"):
            arguments.append("--data.force=true" if command[0] == "fit" else "--force")
        status = cli.main(arguments)
        shown = capsys.readouterr()
        assert status == 0, f"{command}: {shown.err}"
        rule = Path("runs/rule.json")
        written = rule.read_bytes() if command[0] == "refit" else written
        assert written is None or rule.read_bytes() == written, f"{command} has changed the rule"
    return [command[0] for command in done]


@pytest.mark.timeout(600)
def test_the_shell_commands_run_in_their_order(desk: Path, tiny_llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From a pool to a rule, a page, an adapter, a subset, a search and a comparison, as docs/your_data.md says."""
    done = run_block("im-lightning score", tiny_llama, capsys)
    assert done == ["score", "design", "sweep", "runs", "refit", "report", "fit", "select", "explain"]
    assert (desk / "adapter" / "adapter_model.safetensors").exists()
    assert len((desk / "subset.jsonl").read_text().splitlines()) == 40
    assert "<html" in (desk / "report.html").read_text(encoding="utf-8")
    assert run_block("im-lightning compare", tiny_llama, capsys) == ["search", "compare", "report"]
    assert (desk / "compare" / "compare.json").exists() and (desk / "search").is_dir()


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len(README) <= 9000


def test_the_first_code_runs_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: str) -> None:
    """In an empty folder; on SmolLM2 itself it runs in tests/real/test_first_code.py."""
    monkeypatch.chdir(tmp_path)
    code = block_with("python", "to_json(").replace('"smollm2"', repr(tiny_llama))
    exec(compile(code, "README.md", "exec"), {})
    (record,) = [json.loads(path.read_text()) for path in Path("runs").glob("*[!s].json")]  # not *.statistics
    assert record["status"] == "complete" and record["subset"]["size"] == 32
    assert Path("adapter/adapter_model.safetensors").exists()


def test_hours_of_a_pool_are_those_of_the_formula() -> None:
    """The README's rows are the first and the second of the page's, without one column."""
    from benchmarks.finetune_estimate import pool_table

    assert pool_table() in PAGES["questions"]
    for line in pool_table().splitlines()[2:4]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert f"| {' | '.join([*cells[:3], cells[4]])} |" in README


def test_what_surprised_us_names_every_script() -> None:
    scripts = {path.name for path in (ROOT / "findings").glob("*.sh")}
    assert set(re.findall(r"\(\.\./findings/(\w+\.sh)\)", PAGES["surprises"])) == scripts


def test_whether_a_rule_is_good_is_read_off_lines_that_are_printed() -> None:
    """One link from the README, one command, one table, whose every word stands in what the command prints."""
    from pool_ledger import pool_ledger

    from im_lightning import fit_rule

    assert "docs/statistics.md#is-this-rule-any-good" in README and "statistics.md#is-this-rule" in PAGES["your_data"]
    page = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    section = page.partition("## Is this rule any good?\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) == 7
    good, noise = (
        " ".join(fit_rule(pool_ledger(36, noise=noise, sources=True, repeats=repeats)[0], "auto").summary(400).split())
        for noise, repeats in ((0.005, 6), (2.0, 0))
    )
    for printed, well, badly in rows:
        for words in re.findall("`([^`]+)`", printed):
            assert words in good, words
        for words in re.findall("`([^`]+)`", well):
            assert words in good and words not in noise, words
        for words in (one for one in re.findall("`([^`]+)`", badly) if not one.startswith(("select", "not given"))):
            assert words in noise and words not in good, words
    assert "cannot be expected above" in good and "Cook's distance" in good


@pytest.mark.parametrize("name", PAGES)
def test_a_command_that_no_wheel_has_is_called_one_of_a_clone(name: str) -> None:
    """Who installed a wheel has neither scripts/ nor benchmarks/."""
    needs = re.search(r"`[^`\n]*(scripts/|benchmarks)", PAGES[name])
    assert needs is None or "clone" in PAGES[name], needs


def test_every_page_stands_in_the_index() -> None:
    """A page that no path leads to is not found."""
    linked = set(re.findall(r"\]\((\w+\.(?:md|ipynb))\)", PAGES["index"]))
    pages = {path.name for kind in ("md", "ipynb") for path in (ROOT / "docs").glob(f"*.{kind}")}
    assert linked == pages - {"index.md"}


def test_one_file_is_cut_by_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row lands in one of the parts, and two answers to a prompt in the same one."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Task {k % 500}.", "output": f"answer {k}"} for k in range(600)]
    Path("all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exec(compile(block_with("python", "all.jsonl"), "questions.md", "exec"), {})
    parts = [
        [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
        for name in ("eval", "report", "pool")
    ]
    assert sorted(row["output"] for part in parts for row in part) == sorted(row["output"] for row in rows)
    prompts = [{row["instruction"] for row in part} for part in parts]
    assert [len(part) for part in prompts] == [200, 200, 100] and len(set.union(*prompts)) == 500
    assert cli.main(["check", "pool.jsonl", "eval.jsonl", "report.jsonl"]) == 0


def test_the_python_of_a_user_runs(desk: Path, tiny_llama: str) -> None:
    """The lines of a finetune on weights, in a folder where no rule has been fitted yet."""
    code = block_with("python", "max_epochs=3).fit(").replace(MODEL, tiny_llama).replace("budget=2000", "budget=16")
    code = re.sub(r'(scores|rule)=".*\n', "\n", code).replace("max_epochs=3", "max_epochs=1, accelerator='cpu'")
    exec(compile(code, "README.md", "exec"), {})
    records = [json.loads(path.read_text()) for path in (desk / "runs").glob("*[!s].json")]  # not *.statistics
    assert [record["status"] for record in records] == ["complete"]


@pytest.mark.parametrize("page", ["README.md", "docs", "recipes"])
def test_no_code_of_the_pages_needs_an_inner_path(page: str) -> None:
    """What the pages show is public: everything is imported from the top level."""
    pages = [ROOT / page] if page.endswith(".md") else sorted((ROOT / page).rglob("*.md"))
    assert pages
    for one in pages:
        code = "\n".join(re.findall(r"^```\w*\n(.*?)^```", one.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
        inner = re.findall(r"^.*\b(?:from|import) im_lightning\..*$", code, re.MULTILINE)
        assert not inner, f"{one.relative_to(ROOT)}: {inner}"
        names = re.findall(r"^from im_lightning import (.*)$", code, re.MULTILINE)
        unknown = {name for line in names for name in line.split(", ")} - set(im_lightning.__all__)
        assert not unknown, f"{one.relative_to(ROOT)}: {unknown}"


@pytest.mark.parametrize("path", [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))])
def test_a_refit_in_the_text_names_its_file(path: Path) -> None:
    """Without --out the command is refused; one that is cut short ends in an ellipsis."""
    refits = re.findall(r"`(im-lightning refit\s[^`…]*)`", path.read_text(encoding="utf-8"))
    assert all("--out" in refit for refit in refits), refits


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"\b((?:recipes|docs|scripts|tests|findings)/[\w./-]*\w)", TEXT)
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"the pages name {missing}"


def test_the_command_of_the_whole_loop_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run, on data of a test's size, in tests/experiments/test_loop.py; on SmolLM2 it takes an hour."""
    from im_lightning.commands import run as command

    calls: list[dict[str, object]] = []
    original = command.run

    @functools.wraps(original)
    def caught(**given: object) -> int:
        calls.append(given)
        return 0

    monkeypatch.setattr(command, "run", caught)
    (line,) = commands(block_with("bash", "im-lightning run pool"))
    assert cli.main(line) == 0
    (given,) = calls
    assert given["encoding"].model == "smollm2" and given["embedding_model"] == "minilm"  # type: ignore[attr-defined]
    assert given["budget_minutes"] == 60 and given["tuning"].learning_rate == 1e-3  # type: ignore[attr-defined]
