"""`im-lightning demo` prints results to standard output, progress to standard error, and refuses what it must."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mini_demo import MINI

from im_lightning import cli
from im_lightning.experiments.demo import settings as demo_settings


def test_demo_prints_tables_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The command is the first thing a newcomer runs."""
    monkeypatch.setattr(demo_settings, "FAST", MINI)
    monkeypatch.chdir(tmp_path)
    out = "demo-out-fast-null"
    assert cli.main(["demo", "--fast", "--null"]) == 0
    shown = capsys.readouterr()
    assert "leave-one-run-out" in shown.out and "rule's weights" in shown.out and "NULL" in shown.out
    assert f"im-lightning runs {out}/ledger" in shown.err and f"designed: {MINI.runs} finetunes" in shown.err
    assert "evaluation loss" not in shown.err  # a hundred runs do not report one by one
    assert cli.main(["demo", "--fast", "--null", "--out", out]) == 0
    again = capsys.readouterr()
    assert again.out == shown.out and "going on in" in again.err
    assert cli.main(["demo", "--fast", "--out", out]) == 2
    assert "null: True there, False asked for" in capsys.readouterr().err
    page = (Path(__file__).parents[2] / "docs" / "demo.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"^im-lightning (.*)$", page, re.MULTILINE)
    assert first == "demo --fast"
    for line in others:
        assert cli.main(line.replace("demo-out-fast", out).split()) == 0, line
    assert [line.split()[0] for line in others] == ["runs", "refit"] and (tmp_path / "rule.json").exists()
    for name in re.findall("`([a-z]+[./][a-z]*)`", page.partition("Everything stays in")[2].partition("```")[0]):
        assert (tmp_path / out / name).exists(), name


def test_help_has_an_example(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "lightning demo --fast --out demo-fast" in shown and "--null" in shown and "too small to conclude" in shown
