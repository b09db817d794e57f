"""The command line: what a person meets first. Exit statuses and texts are promises to scripts and to people."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import shlex
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

import im_lightning
from im_lightning import cli
from im_lightning._utils.answer import Manner, answer
from im_lightning._utils.progress import log, progress
from im_lightning.errors import DataError, RequestError, message


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Puts a command `toy` beside the real ones; returns the module so that a test can shape it."""
    module = types.ModuleType("im_lightning.commands.toy")
    module.SUMMARY, module.EXAMPLE, module.POSITIONAL = "toy", "im-lightning toy a b --out c", ("data",)  # type: ignore[attr-defined]
    seen: dict[str, object] = {}

    def run(data: list[str], out: str, budget: int | None = None, dry_run: bool = False) -> int:
        """Does a thing.

        Args:
            data: The files.
            out: Where to write.
            budget: Rows to take.
            dry_run: Only look.
        """
        seen.update(data=data, out=out, budget=budget, dry_run=dry_run)
        return 0

    module.run, module.seen = run, seen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "im_lightning.commands.toy", module)
    monkeypatch.setitem(cli.COMMANDS, "toy", "a toy")
    return module


def test_arguments_reach_the_command(command) -> None:
    assert cli.main(["toy", "a", "b", "--out", "c", "--budget", "3", "--dry-run"]) == 0
    assert command.seen == {"data": ["a", "b"], "out": "c", "budget": 3, "dry_run": True}


@dataclass(frozen=True)
class Settings:
    """As those that commands share."""

    model: str | None = None
    """The base model."""
    max_length: int = 1024
    """Tokens per example."""


def test_settings_are_flat_flags_with_a_default_of_the_command(command, capsys: pytest.CaptureFixture[str]) -> None:
    """One dataclass serves several commands; what is optional in one may be required or have another default in
    the next, and a user sees plain flags."""
    seen = []

    def run(out: str, settings: Settings = Settings(max_length=512)) -> int:
        """Does a thing.

        Args:
            out: Where to write.
        """
        seen.append((out, settings))
        return 0

    command.run, command.POSITIONAL, command.REQUIRED = run, (), ("model",)
    assert cli.main(["toy", "--out", "c", "--model", "m"]) == 0
    assert cli.main(["toy", "--out", "c", "--model", "m", "--max-length", "7"]) == 0
    assert seen == [("c", Settings("m", 512)), ("c", Settings("m", 7))]
    assert cli.main(["toy", "--out", "c"]) == 2
    assert capsys.readouterr().err == "im-lightning toy: --model: must be given. Fix: see im-lightning toy --help.\n"
    with pytest.raises(SystemExit):
        cli.main(["toy", "--help"])
    shown = capsys.readouterr().out
    assert "Tokens per example. (type: int, default: 512)" in shown and "The base model. (required, type: str)" in shown


def test_help_shows_each_argument_and_an_example(command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["toy", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "im-lightning toy a b --out c" in out
    assert "--dry-run" in out and "Rows to take." in out


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "DATA, --out: must be given"),
        ("a --out c --budget lots", "--budget: 'lots' is not a whole number"),
        ("a --out c --budget=2.5", "--budget: '2.5' is not a whole number"),
        ("a --out c --bugdet 3", "--bugdet: there is no such option (did you mean --budget?)"),
        ("a --out c --dry_run", "--dry_run: there is no such option (did you mean --dry-run?)"),
        ("a --ouput c", "--ouput: there is no such option (did you mean --out?)"),
        ("a --out c --shade red", "--shade: there is no such option"),
        ("a --out c --budget", "--budget: a value is missing after it"),
        ("a --out c --dry-run=1", "--dry-run: it is a switch, and takes no value"),
    ],
)
def test_a_wrong_argument_gets_one_line_and_status_2(command, typed: str, said: str, capsys) -> None:
    """Twenty lines of usage would hide which argument it was."""
    assert cli.main(["toy", *typed.split()]) == 2
    assert capsys.readouterr().err == f"im-lightning toy: {said}. Fix: see im-lightning toy --help.\n"


@pytest.mark.parametrize(("error", "status"), [(RequestError, 2), (DataError, 1)])
def test_errors_become_one_line_and_a_status(command, error, status, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        raise error(message("pool.jsonl", "line 3 is torn", "mend it"))

    command.run, command.POSITIONAL = run, ()
    assert cli.main(["toy"]) == status
    assert capsys.readouterr().err == "im-lightning toy: pool.jsonl: line 3 is torn. Fix: mend it.\n"


def test_warnings_are_sentences(command, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        exec(compile("import warnings; warnings.warn('unverified rule')", im_lightning.__file__, "exec"))
        return 0

    command.run, command.POSITIONAL = run, ()
    assert cli.main(["toy"]) == 0
    assert capsys.readouterr().err == "warning: unverified rule\n"


def test_control_c_says_that_nothing_is_lost(command, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        raise KeyboardInterrupt

    command.run, command.POSITIONAL = run, ()
    assert cli.main(["toy"]) == 130
    assert "run the same command to go on" in capsys.readouterr().err


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scor"]) == 2
    said = capsys.readouterr().err
    assert "there is no command 'scor'; the commands are run, demo, score" in said and "did you mean score?" in said


def test_without_a_command_the_overview_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert "usage: im-lightning COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", *(name for name in cli.COMMANDS if name != "fit")])
def test_help_keeps_to_the_width_of_a_terminal(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the example can still be copied. Usage lines are argparse's, which breaks no option; `fit` is Lightning's."""
    monkeypatch.setenv("COLUMNS", "60")
    if name == "recipe":
        assert cli.main(["recipe"]) == 0
        listed = capsys.readouterr().out
        assert "hardware/one_gpu\n    One GPU: LoRA" in listed and max(map(len, listed.splitlines())) <= 60
    with contextlib.suppress(SystemExit):
        cli.main([name, "--help"] if name else ["--help"])
    shown = capsys.readouterr().out
    lines = shown.partition("\n\n")[2].splitlines()
    assert lines and [line for line in lines if len(line) > 60 and len(line.split()) > 1] == []
    if name:
        words = shlex.split(shown.partition("example:\n")[2].partition("\n\n")[0].replace("\\\n", ""))
        module = importlib.import_module(f"im_lightning.commands.{name.replace('-', '_')}")
        assert words == shlex.split(module.EXAMPLE)


def test_help_lists_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    """Each name that an option takes stands in its help, in every command that has the option."""
    from im_lightning.data.formats import FORMATS
    from im_lightning.data.loading import ANSWERS, ON_BAD_ROW
    from im_lightning.data.tokenization import TEMPLATES
    from im_lightning.experiments.compare.equal_tokens import POOL_DRAWS
    from im_lightning.experiments.search import proposals
    from im_lightning.experiments.search.run import OBJECTIVES
    from im_lightning.models.device import PRECISIONS
    from im_lightning.rule.fit import METHODS as FITS
    from im_lightning.sampling.selection.methods import METHODS
    from im_lightning.sampling.weights.quality_weights import METHODS as WEIGHTINGS
    from im_lightning.scoring.settings import ENGINES

    reading = {"--format": FORMATS, "--on-bad-row": ON_BAD_ROW, "--answer": ANSWERS}
    tuning = {"--dtype": PRECISIONS, "--template": TEMPLATES, "--weighting": WEIGHTINGS[:-2]}
    wanted = {
        "score": {**reading, "--precision": PRECISIONS, "--engine": ENGINES, "--template": TEMPLATES},
        "select": {**reading, "--method": METHODS, "--weighting": WEIGHTINGS},
        "refit": {"--method": FITS},
        "search": {**reading, **tuning, "--method": proposals.METHODS, "--objective": OBJECTIVES},
        "compare": {**reading, **tuning, "--pool-draw": POOL_DRAWS},
        "fit": {"--data.weighting": WEIGHTINGS, "--data.format": FORMATS, "--model.dtype": PRECISIONS},
    }
    for name, options in wanted.items():
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        text = capsys.readouterr().out
        for option, choices in options.items():
            (one,) = re.findall(rf"^  {option} .*?(?=^  --|\Z)", text, re.MULTILINE | re.DOTALL)
            missing = [
                choice for choice in choices if not re.search(rf"\b{re.escape(choice)}\b", " ".join(one.split()))
            ]
            assert not missing, f"{name} {option} does not name {missing}"


def test_quiet_leaves_the_result_and_the_errors(command, capsys: pytest.CaptureFixture[str]) -> None:
    """A script that reads results wants no progress between them; before the command or after it."""

    def run() -> int:
        log("on the way")
        with progress("scoring", 2) as work:
            work._wait = 0.0
            work.advance()
        exec(compile("import warnings; warnings.warn('unverified rule')", im_lightning.__file__, "exec"))
        logging.getLogger("library").warning("of a library")
        answer({"rows": 3}, "3 rows")
        return 0

    command.run, command.POSITIONAL = run, ()
    for words in (["-q", "toy"], ["toy", "--quiet"]):
        assert cli.main(words) == 0
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("3 rows\n", "")
    assert cli.main(["toy"]) == 0
    shown = capsys.readouterr().err
    assert "on the way" in shown and "scoring: 1 of 2 rows" in shown and "warning: unverified rule" in shown
    assert cli.main(["-q", "toy", "--shade"]) == 2
    assert "there is no such option" in capsys.readouterr().err


def test_a_library_under_a_folder_of_our_name_is_none_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """A clone called im_lightning has its libraries in .venv beside the package."""
    Manner()._show_warning("old", DeprecationWarning, "/home/me/im_lightning/.venv/lib/torch/x.py", 3)
    assert capsys.readouterr().err.startswith("DeprecationWarning in /home/me/im_lightning/.venv/lib/torch/x.py:3: ")


def test_a_recipe_that_is_not_there_is_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an install without a clone, the commands of the pages name files that are one command away."""
    monkeypatch.chdir(tmp_path)
    for words in (["sweep", "recipes/x.yaml"], ["fit", "--config", "recipes/x.yaml"]):
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert "recipes/x.yaml: there is no such file. Fix: write the recipes here (im-lightning recipe --out" in said


def test_verbose_adds_where_an_error_came_from_and_the_time(command, capsys: pytest.CaptureFixture[str]) -> None:
    """What a report of a bug needs; without it, one line."""

    def run() -> int:
        exec(compile("import warnings; warnings.warn('old', DeprecationWarning)", "/library/a.py", "exec"))
        try:
            raise OSError("the disk said no")
        except OSError as error:
            raise DataError(message("pool.jsonl", "line 3 is torn", "mend it")) from error

    command.run, command.POSITIONAL = run, ()
    assert cli.main(["toy", "-v"]) == 1
    shown = capsys.readouterr().err
    assert "DeprecationWarning in /library/a.py:1: old" in shown and "OSError: the disk said no" in shown
    assert "direct cause" in shown and "im-lightning toy: pool.jsonl: line 3 is torn" in shown
    assert re.search(r"it took \d+ s", shown)
