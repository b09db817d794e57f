"""SmolLM2 and MiniLM, from the packages of the extra local-models; without them these tests fail, and skip nothing."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

CITIES = {
    "Paris": "France", "Rome": "Italy", "Madrid": "Spain", "Vienna": "Austria", "Lisbon": "Portugal", "Oslo": "Norway",
    "Athens": "Greece", "Dublin": "Ireland", "Prague": "Czechia", "Warsaw": "Poland", "Helsinki": "Finland",
}  # fmt: skip
GOODS = ["apples", "pencils", "books", "candles", "shirts", "bottles", "tickets", "stamps"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all: SmolLM2 is dequantised once, which takes a minute."""
    return tmp_path_factory.mktemp("real")


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IM_LIGHTNING_CACHE", str(cache))
    return cache


@pytest.fixture(scope="session")
def smollm2(cache: Path) -> str:
    """The folder that the name stands for."""
    from im_lightning.models.fingerprint import local_folder

    before = os.environ.get("IM_LIGHTNING_CACHE")
    os.environ["IM_LIGHTNING_CACHE"] = str(cache)
    try:
        return str(local_folder("smollm2"))
    finally:
        os.environ.pop("IM_LIGHTNING_CACHE") if before is None else os.environ.update(IM_LIGHTNING_CACHE=before)


def rows_of(count: int, seed: int) -> list[dict[str, str]]:
    """Instruction rows of three kinds and of the lengths that data sets have: a sentence to some hundred words."""
    draw = random.Random(seed)
    rows = []
    for at in range(count):
        kind = at % 3
        if kind == 0:
            city, country = draw.choice(list(CITIES.items()))
            question = f"Which country is {city} the capital of? Answer in the form of a small card."
            answer = f"CITY: {city}\nCOUNTRY: {country}\nKIND: capital\nSOURCE: atlas, page {draw.randint(10, 99)}"
        elif kind == 1:
            goods, each, count_, paid = draw.choice(GOODS), draw.randint(2, 9), draw.randint(3, 12), draw.randint(1, 3)
            total = each * count_
            question = f"A shop sells {goods} at {each} coins. Mia buys {count_}, and a bag for {paid}. Total?"
            answer = (
                f"1. The {goods} cost {each} * {count_} = {total} coins.\n2. With the bag it is {total} + {paid} = "
                f"{total + paid} coins.\n#### {total + paid}"
            )
        else:
            names = draw.sample(sorted(CITIES), draw.randint(3, 8))
            question = f"Write a short travel diary through {', '.join(names)}."
            days = [
                f"Day {k}: in {n} we saw the old town and ate {draw.choice(GOODS)}." for k, n in enumerate(names, 1)
            ]
            answer = "\n".join(days) + "\nWe were tired, and glad to be home."
        rows.append({"instruction": question, "input": "", "output": answer, "source": f"kind{kind}"})
    return rows
