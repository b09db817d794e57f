"""The recipes of docs/sampler.md, run as they stand there: one stream, on one process and on two, stopped or not.

If one failed, a reader who copied it would train on rows twice after a restart, or on all ranks on the same rows.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from killing import child, wait

from im_lightning.sampling.draws.sampler import QualityWeightedSampler

PAGE = Path(__file__).parents[2] / "docs" / "sampler.md"
WEIGHTS = np.random.default_rng(0).gamma(0.7, size=60)
EPOCHS, DRAWS, BATCH, STOP = 2, 20, 4, 6  # 5 batches per epoch on one process; stopped in the second epoch

LAUNCHED = {"TORCHELASTIC_RUN_ID": "test", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1"}


def recipes() -> dict[str, str]:
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    found = {}
    for section in sections:
        blocks = re.findall(r"^```python\n(.*?)^```$", section, flags=re.M | re.S)
        assert len(blocks) == 1, section
        found[section.split("\n", 1)[0]] = blocks[0]
    return found


RECIPES = recipes()


class Stopped(Exception):
    """As if the machine had gone down."""


class Net(torch.nn.Module):
    """One weight; notes the rows it sees. Takes and returns what the Hugging Face Trainer wants."""

    def __init__(self, stop: int | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []
        self.stop = stop

    def forward(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.stop is not None and len(self.seen) == self.stop:
            raise Stopped
        self.seen.append(row.tolist())
        return {"loss": (self.weight - row.float() / 60).square().mean()}


def collate(rows: list[int]) -> dict[str, torch.Tensor]:
    return {"row": torch.tensor(rows)}


def run(name: str, devices: int = 1, stop: int | None = None, resume: bool = False) -> list[list[int]]:
    """Runs a recipe in the current folder; returns the rows of each batch."""
    net = Net(stop)
    space: dict[str, Any] = {
        "__name__": "recipe", "dataset": range(60), "collate": collate, "weights": WEIGHTS, "model": net,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1), "epochs": EPOCHS, "devices": devices, "resume": resume,
    }  # fmt: skip
    space["step"] = lambda batch: space["model"](**batch)["loss"]
    try:
        exec(compile(RECIPES[name], str(PAGE), "exec"), space)
        assert stop is None
    except Stopped:
        pass
    return net.seen


def expected(world: int = 1, rank: int = 0) -> list[list[int]]:
    sampler = QualityWeightedSampler(WEIGHTS, DRAWS, num_replicas=world, rank=rank, seed=0)
    batches = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        batches += [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    return batches


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for state in (AcceleratorState, PartialState):  # it remembers the processes of the test before
        state._reset_state()


def test_the_page_has_them_all() -> None:
    assert list(RECIPES) == ["A plain loop", "Fabric", "Accelerate", "The Hugging Face Trainer"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_stopped_and_started_again(name: str) -> None:
    seen = run(name, stop=STOP)
    assert seen == expected()[:STOP]
    assert seen + run(name, resume=True) == expected()


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "A plain loop"])
def test_a_recipe_on_two_processes(name: str, tmp_path: Path) -> None:
    """Each sees its half of the one draw, also after all were stopped and started again."""
    for attempt, stop in (("first", 4), ("again", None)):
        port = free_port()

        def work(rank: int, port: str = port, attempt: str = attempt, stop: int | None = stop) -> None:
            os.environ.update(LAUNCHED, MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0")
            seen = run(name, devices=2, stop=stop, resume=attempt == "again")
            (tmp_path / f"{attempt}{rank}").write_text(repr(seen))
            if torch.distributed.is_initialized() and stop is None:
                torch.distributed.destroy_process_group()

        children = [child(lambda rank=rank: work(rank), tmp_path / f"report{rank}") for rank in range(2)]  # type: ignore[misc]
        for rank, pid in enumerate(children):
            assert wait(pid) == 0, (tmp_path / f"report{rank}").read_text()[-3000:]
    for rank in range(2):
        first, again = (eval((tmp_path / f"{attempt}{rank}").read_text()) for attempt in ("first", "again"))
        assert first == expected(2, rank)[:4] and first + again == expected(2, rank)
