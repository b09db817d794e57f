"""The recipes are at hand wherever the package is installed, and copying them loses nothing of the user's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from im_lightning.cli import main

RECIPES = Path(__file__).parents[2] / "recipes"


def test_a_recipe_is_printed_byte_for_byte(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "designed_run"]) == 0
    assert capsys.readouterr().out == (RECIPES / "02_designed_runs" / "designed_run.yaml").read_text()
    assert main(["recipe", "models/llama-2-7b"]) == 0
    assert capsys.readouterr().out == (RECIPES / "models" / "llama-2-7b.yaml").read_text()


def test_without_a_name_every_recipe_is_listed_with_what_it_is_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["recipe"]) == 0
    listed, _, how = capsys.readouterr().out.partition("\n\n")
    lines = listed.splitlines()
    assert [line.split()[0] for line in lines] == sorted(
        path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")
    )
    assert all(len(line.split()) > 4 for line in lines)
    assert how == "im-lightning recipe NAME prints one, im-lightning recipe --out recipes writes them all.\n"


def test_an_unknown_recipe_is_refused_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "designed"]) == 2
    assert "recipe 'designed': there is none of this name. Fix: take one of designed_run, " in capsys.readouterr().err


def test_all_are_copied_and_a_changed_file_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's commands name `recipes/...`; an own edit of a copy is not written over."""
    out = tmp_path / "recipes"
    assert main(["recipe", "--out", str(out)]) == 0
    copied = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert copied == {path.relative_to(RECIPES): path.read_bytes() for path in RECIPES.rglob("*") if path.is_file()}
    for page in out.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists() and target.count("../") < 2, f"{page}: {target}"
    mine = out / "hardware" / "one_gpu.yaml"
    mine.write_text("trainer: {devices: 2}\n")
    (out / "README.md").unlink()
    assert main(["recipe", "--out", str(out)]) == 2
    assert f"{mine}: it is there and is not the recipe that would be written. Fix: " in capsys.readouterr().err
    assert mine.read_text() == "trainer: {devices: 2}\n" and not (out / "README.md").exists()


def test_one_recipe_is_not_written_with_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its name was ignored: whoever wanted one got them all."""
    assert main(["recipe", "designed_run", "--out", str(tmp_path / "recipes")]) == 2
    assert "all recipes are written there, and one is named. Fix: leave out its name" in capsys.readouterr().err
    assert not (tmp_path / "recipes").exists()
