"""The benchmark on RegMix's files reads them as they are, and finds what a law of its kind made them by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.refit_regmix import TARGET, best_index, main

SOURCES = ["web", "books", "code", "talk"]
SIZES = {"train_1m": 60, "test_1m": 30, "test_60m": 30}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Mixtures of four sources whose loss is exactly 2 + exp(a + b · shares), as RegMix writes them."""
    rng, b = np.random.default_rng(0), np.array([0.5, -1.5, 1.0, 0.0])
    for part, n in SIZES.items():
        kind, size = part.split("_")
        shares = rng.dirichlet(np.ones(4), n)
        names = ",".join(f"train_the_pile_{name}" for name in SOURCES)
        rows = [",".join(map(repr, [float(i), *map(float, row)])) for i, row in enumerate(shares)]
        (tmp_path / f"{kind}_mixture_{size}.csv").write_text("\n".join([f"index,{names}", *rows]) + "\n")
        loss = 2.0 + np.exp(shares @ b - 1.0)
        rows = [f"{float(i)!r},{float(v)!r}" for i, v in enumerate(loss)]
        (tmp_path / f"{kind}_pile_loss_{size}.csv").write_text("\n".join([f"index,{TARGET}", *rows]) + "\n")
    return tmp_path


@pytest.mark.slow
def test_the_law_ranks_and_picks_what_it_made(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(files), "--runs", "40", "--draws", "1"]) == 0
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if " auto " in line]
    assert float(line[3]) > 0.99 and float(line[4]) > 0.99
    assert main([str(files), "--runs", "40", "--draws", "2", "--picks"]) == 0
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if "mixture law" in line]
    assert line[-2:] == ["1.0", "1"]


def test_what_is_missing_is_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(files), "--target", "metric/nothing"]) == 2
    assert f"there are {TARGET}. Fix: name one of these" in capsys.readouterr().err
    (files / "test_pile_loss_60m.csv").unlink()
    assert main([str(files), "--picks"]) == 2
    assert "test_pile_loss_60m.csv: there is no such file. Fix: give the folder" in capsys.readouterr().err


def test_the_best_index_orders_what_is_a_function_of_one(files: Path) -> None:
    lines = best_index(files, TARGET, starts=1, steps=300).splitlines()
    found = {line.split()[0]: float(line.split()[1]) for line in lines if line.split()[0] in ("1M", "60M")}
    assert set(found) == {"1M", "60M"} and min(found.values()) > 0.99
