"""The study's sets share no prompt, are the same for everybody, and are never drawn again over what is there."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.study.__main__ import main
from benchmarks.study.sets import FAST, KINDS, POOL, Sizes, split
from im_lightning import load_examples

SMALL = replace(FAST, unopened=0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files of 40 rows; every fifth prompt is in two of them, once with a capital and a full stop."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for k, source in enumerate(sorted({*KINDS, *POOL})):
        rows = []
        for i in range(40):
            shared = i % 5 == 0
            text = f"shared task {i}" if shared and k % 2 else f"Shared task {i}." if shared else f"{source} task {i}"
            rows.append({"id": f"{source}-{i}", "instruction": text, "input": "", "output": f"answer {i} of {source}"})
        with gzip.open(folder / f"{source}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def test_no_prompt_is_in_two_sets(data: Path, tmp_path: Path) -> None:
    counts = split(data, tmp_path / "out", SMALL)
    prompts = []
    for name, of in counts.items():
        examples = load_examples(tmp_path / "out" / f"{name}.jsonl")
        assert len(examples) == sum(of.values())
        prompts += [example.prompt.casefold().rstrip(".") for example in examples]
    assert len(set(prompts)) == len(prompts)
    assert counts["verdict"] == dict.fromkeys(sorted(KINDS), SMALL.verdict)
    assert set(counts["pool"]) == set(POOL) and "seed_tasks" not in counts["pool"]


def test_sets_are_the_same_for_everybody_and_kept(data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        split(data, tmp_path / name, SMALL)
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*.jsonl"))]
    assert len(files) == 2 + 2 * len(KINDS)
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    (tmp_path / "a" / "pool.jsonl").write_text("mine\n")
    split(data, tmp_path / "a", SMALL)
    assert (tmp_path / "a" / "pool.jsonl").read_text() == "mine\n"


def test_a_file_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["split", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "alpaca.jsonl.gz: there is no such file. Fix: give the folder of alpaca.jsonl.gz" in said


def test_a_trial_sees_no_row_that_the_study_is_judged_by(data: Path, tmp_path: Path) -> None:
    judged = replace(SMALL, verdict=5)
    split(data, tmp_path / "study", judged)
    split(data, tmp_path / "trial", replace(SMALL, unopened=judged.verdict))
    opened = {example.prompt for example in load_examples(tmp_path / "study" / "verdict.jsonl")}
    for file in (tmp_path / "trial").rglob("*.jsonl"):
        assert not opened & {example.prompt for example in load_examples(file)}, file.name
    assert FAST.unopened == Sizes().verdict
