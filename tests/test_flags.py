"""What users typed stays valid: every flag and its default, every command line of the pages, every key of the recipes.

`old_files/` holds what an earlier build offered and showed: `flags.json`, `command_lines.txt`, `recipes/`. A later
build may offer more. Nothing is run: commands are caught where they would begin, fits where they print their arguments.
 `python tests/old_files/make.py flags` writes the three anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from im_lightning.cli import main

ROOT = Path(__file__).resolve().parents[1]
OLD = Path(__file__).resolve().parent / "old_files"
OURS = ("data", "model", "mining", "export", "seed_everything", "ckpt_path")
"""Arguments of a fit that are this package's; those of the Trainer are Lightning's, and change with it."""
REQUIRED = {
    "demo": "--out o", "score": "d --out o.parquet", "design": "s d --runs 9 --subset-size 9 --out o",
    "select": "s d --rule r --budget 9 --out o", "sweep": "f", "runs": "l", "refit": "l --out o", "report": "--out o",
    "search": "d --eval-data e --report-data p --model m --rule r --scores s --low 1 --high 9 --out o",
    "compare": "d --eval-data e --model m --scores s --tokens 9 --steps 9 --out o",
}  # fmt: skip
"""Command → the least that it takes."""
FIT = ["--data.data=d", "--data.model=m"]


# what the current build offers


def printed(arguments: list[str]) -> str:
    """What a command says before it exits of its own accord."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), mock.patch.dict(os.environ, COLUMNS="1000"), pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code, arguments
    return out.getvalue()


def config(arguments: list[str]) -> dict[str, Any]:
    """What a fit makes of its arguments."""
    return yaml.safe_load(printed(["fit", *arguments, "--print_config"]))


def caught(command: str, arguments: list[str]) -> dict[str, Any]:
    """What a command other than fit would be called with."""
    module = importlib.import_module(f"im_lightning.commands.{command}")
    calls: list[dict[str, Any]] = []

    @functools.wraps(module.run)
    def run(**given: Any) -> int:
        calls.append(given)
        return 0

    with mock.patch.object(module, "run", run):
        assert main([command, *arguments]) == 0
    return fielded(calls[0])


def fielded(given: dict[str, Any]) -> dict[str, Any]:
    """Settings in dataclasses as the flags that they come from."""
    out: dict[str, Any] = {}
    for name, value in given.items():
        out |= dataclasses.asdict(value) if dataclasses.is_dataclass(value) else {name: value}
    return out


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"data": {"seed": 0}} as {"data.seed": 0}."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, one in value.items() for k, v in flat(one, f"{name}.{key}" if name else key).items()}


def flags_in_help(command: str) -> dict[str, dict[str, str]]:
    """Flag → what its help says it takes: name and number of values, whether it must be given, type and default."""
    out = {}
    text = re.sub(r"\n {10,}", "  ", printed([command, "--help"]))
    for flag, takes, rest in re.findall(r"^  (--[\w.-]+)((?: \S+)*)  +(.*)$", text, flags=re.MULTILINE):
        note = re.findall(r"\(((?:required|type|default).*?)\)$", rest)
        out[flag] = {"takes": takes.strip(), "note": note[-1] if note else ""}
    return out


def offered(command: str) -> dict[str, Any]:
    """Flags, and defaults as the command gets them."""
    if command == "fit":
        made = config(FIT)
        return {"defaults": flat({k: v for k, v in made.items() if k in OURS})}
    return {"flags": flags_in_help(command), "defaults": caught(command, REQUIRED[command].split())}


def read(line: str) -> dict[str, Any]:
    """What a command line asks for."""
    _, command, *words = shlex.split(line.replace("$k", "7"), comments=True)
    return flat(config(words)) if command == "fit" else caught(command, words)


def whole(line: str) -> bool:
    """Whether a line is one to type as it stands; a text may name a command without all that it needs."""
    try:
        return bool(read(line))
    except (SystemExit, Exception):
        return False


def shown() -> list[str]:
    """The command lines of README, pages, recipes and helps, each once, with continuations joined."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").rglob("*.*"))]
    texts = [p.read_text(encoding="utf-8") for p in pages] + [printed([c, "--help"]) for c in [*REQUIRED, "fit"]]
    lines = [line for text in texts for line in re.sub(r"\\\n#?\s*", "", text).splitlines()]
    found = [m[1] for line in lines if (m := re.match(r"(?:#|example:)?\s*(im-lightning [a-z]+ .*)$", line))]
    found += [m for text in texts for m in re.findall(r"example: (im-lightning .*)$", text, flags=re.MULTILINE)]
    named = [m for text in texts for m in re.findall(r"`(im-lightning [a-z]+ [^`\n]*)`", text)]
    found += [line for line in named if "--help" not in line and whole(line)]
    return list(dict.fromkeys(" ".join(line.split()) for line in found))


def freeze() -> None:
    """Writes what the current build offers and shows. For `old_files/make.py`."""
    offers = {command: offered(command) for command in [*REQUIRED, "fit"]}
    (OLD / "flags.json").write_text(json.dumps(offers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (OLD / "command_lines.txt").write_text("\n".join(shown()) + "\n", encoding="utf-8")
    shutil.rmtree(OLD / "recipes", ignore_errors=True)
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        copy = OLD / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


# the promises

LINES = [line for path in OLD.glob("command_lines.txt") for line in path.read_text(encoding="utf-8").splitlines()]
RECIPES = sorted(p for p in (OLD / "recipes").rglob("*.yaml"))
SWEEPS = [p for p in RECIPES if p.name.startswith("sweep")]


@pytest.fixture(autouse=True)
def beside_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    shutil.copytree(OLD / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    yield


@pytest.mark.parametrize("command", [*REQUIRED, "fit"])
def test_every_flag_is_there_with_its_default(command: str) -> None:
    then, now = json.loads((OLD / "flags.json").read_text(encoding="utf-8"))[command], offered(command)
    for kind in then:
        assert len(then[kind]) > 1 or command == "runs"
        assert {name: now[kind].get(name) for name in then[kind]} == then[kind]
        assert set(then[kind]) <= set(now[kind])


def test_all_commands_are_there() -> None:
    then = json.loads((OLD / "flags.json").read_text(encoding="utf-8"))
    assert set(then) == {*REQUIRED, "fit"}
    overview = io.StringIO()
    with contextlib.redirect_stdout(overview):
        assert main(["--help"]) == 0
    assert set(then) <= set(re.findall(r"^  ([a-z]+)  ", overview.getvalue(), flags=re.MULTILINE))


def test_every_command_line_is_read() -> None:
    """What stands in a page was copied into somebody's script."""
    assert len(LINES) > 40
    for line in LINES:
        made = read(line)
        said = [w[2:].split("=")[0] for w in shlex.split(line, comments=True) if re.match(r"--\w+\.?\w*=", w)]
        assert all(name.replace("-", "_") in made for name in said), line


@pytest.mark.parametrize("path", [p for p in RECIPES if p not in SWEEPS], ids=lambda p: p.stem)
def test_every_key_of_a_recipe_is_read(path: Path) -> None:
    said = flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    made = flat(config([*FIT, f"--config={path}"]))
    for key, value in said.items():
        if not key.startswith("trainer.strategy."):  # Lightning fills in the strategy's own
            assert key in made and made[key] == value, key


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_sweep_reaches_its_first_fit(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Which then says that there is no pool here: the file, its draw and the arguments of the fit have been read."""
    model = f"--arguments=--data.model={OLD / 'desk' / 'model'}"
    assert main(["sweep", f"recipes/{path.parent.name}/{path.name}", "--count=1", "--max-failures=1", model]) == 1
    assert "failed: pool.jsonl: there is no such file" in capfd.readouterr().err
