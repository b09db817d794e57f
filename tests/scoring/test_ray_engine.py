"""`--engine ray` with the real Ray on this machine: the local engine's table, also when workers are killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pools import make_pool, same_table

from im_lightning.cli import main
from im_lightning.data.loading import write_rows
from im_lightning.data.score_table import ScoreTable
from im_lightning.scoring.api import score_examples

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ADDRESS": "",
}


def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """`im-lightning score` in a process of its own: this one forks children, which does not go with Ray's threads."""
    code = "import sys; from im_lightning.cli import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", code, "score", *map(str, arguments)]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)


def child(what: str, folder: Path, model: str) -> dict[str, Any]:
    line = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "ray_child.py"), what, str(folder), model]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    [told] = [line for line in done.stdout.splitlines() if line.startswith("{")]  # a Ray of one's own prints there too
    return json.loads(told)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"instruction": e.instruction, "input": e.input, "output": e.response} for e in make_pool(80)]
    write_rows(tmp_path / "pool.jsonl", [*rows, {"instruction": "Say nothing.", "output": ""}, rows[3]])
    return tmp_path / "pool.jsonl"


def test_the_command_writes_the_local_engines_table(data: Path, tmp_path: Path, tiny_llama: str) -> None:
    """Otherwise scores of a cluster could not be mixed with, or compared to, those of a workstation."""
    asked = ["--model", tiny_llama, "--indicators", "ppl,ifd,knn_2", "--device", "cpu"]
    assert main(["score", str(data), *asked, "--out", f"{tmp_path}/a.parquet", "--cache-dir", f"{tmp_path}/a"]) == 0
    here = ["--out", f"{tmp_path}/b.parquet", "--cache-dir", f"{tmp_path}/b", "--engine", "ray"]
    done = command(data, *asked, *here, "--ray-workers", 2)
    assert done.returncode == 0, done.stderr[-4000:]
    same_table(ScoreTable.read(tmp_path / "a.parquet"), ScoreTable.read(tmp_path / "b.parquet"))
    assert re.search(r"ray: .*ppl.*: 81 rows in .* rows/s, .* tokens/s; 2 workers, busy \d+% of the time", done.stderr)
    assert "coverage of 82 rows (81 distinct)" in done.stderr and "ppl: 81 scored; 1 missing" in done.stderr
    assert done.stdout.startswith("wrote ") and done.stdout.count("\n") == 1, "standard output belongs to results"

    # with everything in the store Ray is not even started: no cluster answers at this address
    assert main(["score", str(data), *asked, *here, "--ray-address", "127.0.0.1:1"]) == 0


def test_no_cluster_at_the_address(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray itself tries for two minutes and then ends the process without a word about the address."""
    asked = ["score", str(data), "--out", f"{tmp_path}/a.parquet", "--engine", "ray", "--ray-address", "127.0.0.1:1"]
    assert main(asked) == 2
    assert "--ray-address 127.0.0.1:1: no Ray answers there" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_workers_lose_and_repeat_nothing(tmp_path: Path, tiny_llama: str) -> None:
    """SIGKILL of three workers' processes in the middle: the table and the store of the undisturbed scoring."""
    told = child("killed", tmp_path, tiny_llama)
    assert len(set(told["kills"])) == 3 and len(told["workers"]) >= 4, told  # two, and those that came in their place
    pool = make_pool(150)
    from im_lightning.scoring.passes import language_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "FIRST_ROWS", 8)
        patch.setattr(language_model, "PART_ROWS", 8)
        whole = score_examples(
            [*pool, *pool[:3]], ["mtld", "ppl", "knn_2"], tiny_llama, batch_tokens=512, device="cpu",
            cache_dir=tmp_path / "whole",
        )  # fmt: skip
    same_table(whole, ScoreTable.read(tmp_path / "killed.parquet"))
    for folder in (tmp_path / "cache").iterdir():
        ids = [
            id
            for part in folder.glob("part-*.parquet")
            for id in pq.read_table(part, columns=["id"]).column("id").to_pylist()
        ]
        assert not ids or sorted(ids) == sorted({e.id for e in pool}), folder.name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_that_kill_their_workers_end_the_work(tmp_path: Path, tiny_llama: str) -> None:
    """Ray would start workers for ever; and what was there before, the user's own Ray, stays."""
    told = child("deadly", tmp_path, tiny_llama)
    assert "3 workers died over the same" in told["error"] and told["left alone"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dry_run_is_measured_on_a_worker(data: Path, tmp_path: Path, tiny_llama: str) -> None:
    asked = ["--model", tiny_llama, "--indicators", "mtld,ppl", "--device", "cpu", "--engine", "ray"]
    out = tmp_path / "s.parquet"
    done = command(data, *asked, "--out", out, "--cache-dir", tmp_path / "cache", "--ray-workers", 2, "--dry-run")
    assert done.returncode == 0, done.stderr[-4000:]
    said = r"ppl: 81 rows to compute, about [\d,]+ tokens and .* FLOPs, about .* on one of 2 workers"
    assert re.search(said, done.stdout)
    assert not out.exists() and not list((tmp_path / "cache").rglob("*.parquet"))
