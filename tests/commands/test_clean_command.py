"""`im-lightning clean`: what a user never asked for can be found and removed, and nothing of theirs goes with it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from fitting import make_world, trainer, write_pool

from im_lightning.cli import main
from im_lightning.training.callback import InstructMiningCallback


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_a_fit_and_a_scoring_leave_is_listed_then_removed(
    small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real fit and a real scoring; a user's files of like names stay."""
    monkeypatch.chdir(tmp_path)
    world = make_world(small_base, tmp_path)
    write_pool(Path("small.jsonl"), n=6)
    mine = Path("mine") / "im-lightning"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    (mine / ("a" * 32)).mkdir()
    (mine / ("a" * 32) / "photo.jpg").write_text("mine")
    Path("trip.cost.json").write_text('{"hotel": 80}')
    Path(".new.tmp").write_text("being written")
    before = contents(tmp_path)
    wanted = ["--indicators", "length_output", "--model", small_base]
    assert main(["score", "small.jsonl", *wanted, "--out", "s.parquet"]) == 0
    mining = InstructMiningCallback("ledger", evaluate_base=False)
    trainer(tmp_path, callbacks=[mining]).fit(world.tuner(), datamodule=world.data(rule=world.rule, budget=12))
    Path(".left.tmp").write_text("torn")
    os.utime(".left.tmp", (time.time() - 90_000,) * 2)
    made = contents(tmp_path)
    assert list(Path("im-lightning").glob("*/inputs.json")) and Path("s.parquet.cost.json").exists()

    capsys.readouterr()
    assert main(["clean"]) == 0
    shown = capsys.readouterr()
    listed = [line.split("  ")[0] for line in shown.out.splitlines()]
    assert sorted(map(str, [".left.tmp", *Path("im-lightning").glob("*"), "s.parquet.cost.json"])) == sorted(listed)
    assert "--remove removes it" in shown.err and contents(tmp_path) == made, "listing removes nothing"

    assert main(["clean", "--remove"]) == 0
    after = contents(tmp_path)
    assert not Path("im-lightning").exists() and not Path("s.parquet.cost.json").exists()
    assert {name: after.get(name) for name in before} == before and "s.parquet" in after
    assert any(name.startswith("ledger/") for name in after)
    assert main(["clean"]) == 0 and "nothing found" in capsys.readouterr().err
    assert main(["clean", "--folder", "nope"]) == 2
    assert "--folder nope: there is no such folder. Fix: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "ours"),
    [
        ("job.cost.json", '{"seconds": 12}', False),
        ("job.cost.json", '{"seconds": {"train": 12}}', False),
        ("job.parquet.cost.json", '{"seconds": 12}', False),
        ("job.parquet.cost.json", '{"seconds": {"train": 12}, "euros": 3}', False),
        ("job.parquet.cost.json", '["seconds"]', False),
        ("s.parquet.cost.json", '{"seconds": {"nll": 12.5}}', True),  # of earlier versions
        ("s.PARQUET.cost.json", '{"pool": null, "seconds": {}, "flops": {}}', True),
    ],
)
def test_notes_of_ones_own_jobs_stay(name: str, text: str, ours: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert main(["clean", "--folder", str(tmp_path), "--remove"]) == 0
    assert (tmp_path / name).exists() is not ours


def test_the_overview_names_the_files_that_nobody_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = " ".join(capsys.readouterr().out.split())
    page = (Path(__file__).parents[2] / "docs" / "your_data.md").read_text(encoding="utf-8")
    for text in (overview, page):
        assert all(name in text for name in ("im-lightning/", ".cost.json", "sweeps/", "im-lightning clean"))
