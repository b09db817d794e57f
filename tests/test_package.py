"""What is installed: the base holds what its commands import and no more, and works from a wheel in an empty folder."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {"pytorch-lightning": "pytorch_lightning"}
"""Distribution → module, where the names differ by more than a dash."""
OF_OTHERS = {
    "docstring-parser": "jsonargparse reads the help of settings with it",
    "protobuf": "transformers reads SentencePiece tokenizers of LLaMA with it",
    "sentencepiece": "transformers reads SentencePiece tokenizers of LLaMA with it",
}
"""Dependencies that another one imports, for what our commands ask of it."""


def imported() -> set[str]:
    """Top-level modules that the package imports anywhere."""
    names: set[str] = set()
    for path in (ROOT / "im_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Constant) and node.value in ("pytorch_lightning", "lightning.pytorch"):
                names.add("pytorch_lightning")  # `_lightning.py` imports one of the two by name
    return names


def test_the_base_installs_nothing_that_no_command_imports() -> None:
    """Each package that nobody uses is minutes and megabytes of a newcomer's time."""
    base = [re.split(r"[\[><=~! ]", line)[0] for line in PROJECT["dependencies"]]
    modules = {name: MODULES.get(name, name.replace("-", "_")) for name in base if name not in OF_OTHERS}
    assert set(modules.values()) <= imported()


def test_the_commands_are_at_hand_as_a_module() -> None:
    shown = subprocess.run([sys.executable, "-m", "im_lightning", "--version"], capture_output=True, text=True)
    assert shown.stdout.strip() == f"im-lightning {PROJECT['version']}"


@pytest.mark.slow
def test_the_source_archive_holds_pages_and_changes(tmp_path: Path) -> None:
    """Who packages it for a distribution has nothing but this file."""
    for words in (["venv", tmp_path], ["pip", "install", "-q", "build"], ["build", "-s", "-o", tmp_path, ROOT]):
        python = sys.executable if words[0] == "venv" else tmp_path / "bin" / "python"
        subprocess.run([python, "-m", *words], check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    assert {"CHANGELOG.md", "LICENSE", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))} <= names


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_alone_ends_in_the_demos_report(tmp_path: Path) -> None:
    """What a newcomer does: a clean environment, the base and no extra, an empty folder."""
    python = tmp_path / "venv" / "bin" / "python"
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command: object) -> str:
        done = subprocess.run([str(part) for part in command], cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", ROOT / "constraints.txt"]
    run(*install, "torch")
    run(*install, *tmp_path.glob("*.whl"))
    for package in ("faiss", "sentence_transformers", "sklearn", "ray", "gguf"):
        assert run(python, "-c", f"from importlib.util import find_spec; print(find_spec('{package}'))") == "None\n"
    run(python, "-m", "im_lightning", "recipe", "--out", "recipes")
    assert (tmp_path / "recipes" / "README.md").read_bytes() == (ROOT / "recipes" / "README.md").read_bytes()
    run(tmp_path / "venv" / "bin" / "im-lightning", "demo", "--fast", "--out", "demo")
    assert "</html>" in (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
