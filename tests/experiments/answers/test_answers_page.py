"""docs/answers.md: every command on it is one that the build takes, and every flag that it names is there."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from im_lightning.cli import main

PAGE = (Path(__file__).parents[3] / "docs" / "answers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(block.replace("\\\n", " "))[1:] for block in BLOCKS]
ASKING = ["make-eval", "judge", "score-llm", "compare"]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda words: words[0])
def test_a_command_of_the_page_is_taken(arguments: list[str]) -> None:
    module = importlib.import_module(f"im_lightning.commands.{arguments[0].replace('-', '_')}")
    calls: list[dict[str, Any]] = []

    @functools.wraps(module.run)
    def run(**given: Any) -> int:
        calls.append(given)
        return 0

    with mock.patch.object(module, "run", run):
        assert main(arguments) == 0 and calls


@pytest.mark.parametrize("command", ASKING)
def test_the_shared_flags_are_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = PAGE.partition("| flag |")[2].partition("\n\n")[0]
    flags = set(re.findall(r"`(--[\w-]+)`", table))
    assert len(flags) >= 12
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert flags <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
