"""Completion in a real bash: what stands there after the tab key."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from im_lightning import cli

BASH = shutil.which("bash") or ""
PRESS = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_im_lightning "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}" 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script, as the command prints it."""
    path = tmp_path_factory.mktemp("completion") / "im-lightning"
    with pytest.MonkeyPatch.context() as patch:
        written: list[str] = []
        patch.setattr("im_lightning.commands.completion.answer", lambda record, text: written.append(text))
        assert cli.main(["completion", "bash"]) == 0
    path.write_text(written[0])
    return path


@pytest.mark.skipif(not BASH, reason="there is no bash")
@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("sel", {"select"}),
        ("score", {"score", "score-llm"}),
        ("select --budg", {"--budget", "--budget-tokens"}),
        ("select a.parquet b.jsonl --max-s", {"--max-similarity"}),
        ("select --method ran", {"random", "random-balanced", "random-tokens"}),
        ("refit --method rid", {"ridge", "ridge+shares"}),
        ("score --precision bf", {"bf16"}),
        ("runs --js", {"--json"}),
        ("fit --data.weig", {"--data.weighting"}),
        ("fit --model.dtype b", {"bf16"}),
        ("refit --out sc", {"scores.parquet"}),
        ("select --budget sc", {""}),
        ("recipe des", {"designed_run", "designed_v1", "designed_v3"}),
        ("recipe models/", {"models/llama-2-7b", "models/llama-3.1-8b", "models/llama-3.2-1b"}),
        ("completion z", {"zsh"}),
    ],
)
def test_the_tab_key(script: Path, typed: str, wanted: set[str], tmp_path: Path) -> None:
    (tmp_path / "scores.parquet").touch()
    command = [BASH, "-c", PRESS, "bash", str(script), "im-lightning", *typed.split()]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert set(shown.stdout.rstrip("\n").split("\n")) == wanted, shown.stderr


def test_no_command_is_left_out(script: Path) -> None:
    """Nor does completion start Python, let alone torch."""
    text = script.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("_shtab_im_lightning_subparsers=")]
    assert set(line.partition("(")[2].rstrip(")").split()) == set(cli.COMMANDS) and "python" not in text


@pytest.mark.parametrize("shell", ["zsh", "tcsh", "fish"])
def test_other_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shell"] == shell and "max-similarity" in found["script"]


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "elvish"]) == 2
    assert "elvish: there is no completion for this shell. Fix: name one of bash" in capsys.readouterr().err
