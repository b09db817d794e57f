"""Indicators of one's own through the public path: made of others, of many rows at once, of odd values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from pools import alpaca, make_pool

from im_lightning.data.settings import Encoding
from im_lightning.indicators.base import Features, Indicator, Scores, get_indicators, register_indicator
from im_lightning.scoring.api import score_examples
from im_lightning.scoring.plan import ScoringPlan
from im_lightning.scoring.settings import Setup

pytestmark = pytest.mark.usefixtures("forget_registrations")


def twice(name: str, part: str) -> None:
    """Registers an indicator that is twice another."""

    class Twice(Indicator):
        derived_from = (part,)

        def derive(self, columns: Mapping[str, Scores]) -> Scores:
            return Scores(2 * columns[part].values, columns[part].reasons)

    register_indicator(name)(Twice)


def test_what_is_derived_may_be_derived_from_what_is_derived(tiny_llama: str) -> None:
    """It ended in a KeyError of `ppl`, unless that was asked for, too."""
    twice("twice_ifd", "ifd")
    twice("four_times_ifd", "twice_ifd")
    table = score_examples(make_pool(4), ["four_times_ifd", "ifd"], tiny_llama)
    np.testing.assert_array_equal(table.values["four_times_ifd"], 4 * table.values["ifd"])
    assert table.keys["four_times_ifd"]["numerics"] == table.keys["ifd"]["numerics"]
    setup, (own,) = Setup(Encoding(tiny_llama)), get_indicators(["four_times_ifd"])
    assert setup.numerics_of(own) == setup.model_numerics


def test_what_is_derived_of_neighbours_says_among_which(tiny_llama: str) -> None:
    twice("twice_knn", "knn_1")
    pool, names = make_pool(6), ["knn_1", "twice_knn"]
    keys = [score_examples(rows, names, tiny_llama).keys for rows in (pool, pool[:5])]
    assert [one["twice_knn"]["pool"] for one in keys] == [one["knn_1"]["pool"] for one in keys]
    assert keys[0]["twice_knn"]["pool"] != keys[1]["twice_knn"]["pool"]
    among = [score_examples(pool, names, tiny_llama, knn_reference=rows).keys for rows in (pool, pool[:5])]
    told = [one["twice_knn"]["identity"]["reference"] for one in among]
    assert told == [one["knn_1"]["identity"]["reference"] for one in among] and told[0] != told[1]


def test_derived_values_say_how_those_were_computed_that_they_are_made_of(tiny_llama: str, tmp_path: Path) -> None:
    """`ifd` of perplexities stored in bf16 said fp32, so that no rule told of the difference."""
    pool = make_pool(4)
    score_examples(pool, ["ifd"], tiny_llama, precision="bf16", cache_dir=tmp_path)
    known = score_examples(pool, ["ppl", "ifd"], tiny_llama, cache_dir=tmp_path)
    assert known.keys["ifd"]["numerics"] == known.keys["ppl"]["numerics"]
    assert known.keys["ifd"]["numerics"]["precision"] == "bf16"
    mixed = score_examples(make_pool(5), ["ifd"], tiny_llama, cache_dir=tmp_path).keys["ifd"]["numerics"]
    assert [kind["precision"] for kind in mixed["several"]] == ["bf16", "fp32"]
    plan = ScoringPlan(pool, get_indicators(["ifd"]), Setup(Encoding(tiny_llama, cache_dir=str(tmp_path / "new"))))
    assert not plan.key(plan.indicators[0])["numerics"], "nothing is known before the work"


def test_an_indicator_with_all_its_values_is_not_asked_beside_another(tmp_path: Path, tiny_llama: str) -> None:
    """It was asked for the values of no rows, which may be an error, and the store kept an empty file of each time."""

    class Characters(Indicator):
        def compute(self, features: Features) -> Scores:
            values = np.stack([np.float64(len(one.response)) for one in features.examples])
            return Scores(values, [None] * len(values))

    register_indicator("characters")(Characters)
    pool, names = make_pool(4), ["characters", "length_input"]
    score_examples(pool, names, tiny_llama, cache_dir=tmp_path)
    more = score_examples(pool, [*names, "mtld", "length_output"], tiny_llama, cache_dir=tmp_path)
    assert more.values["characters"].tolist() == [len(one.response) for one in pool]
    assert {len(list(tmp_path.glob(f"{name}-*/part-*"))) for name in more.indicators} == {1}


def test_an_infinite_value_is_missing_however_it_was_made(tmp_path: Path) -> None:
    """From `score` it was; from `compute` and `derive` it was a value, the best or worst row of every ranking."""

    class PerComma(Indicator):
        def compute(self, features: Features) -> Scores:
            with np.errstate(divide="ignore"):
                values = 1.0 / np.array([one.response.count(",") for one in features.examples])
            return Scores(values, [None] * len(values))

    class Inverse(Indicator):
        derived_from = ("per_comma",)

        def derive(self, columns: Mapping[str, Scores]) -> Scores:
            with np.errstate(divide="ignore"):
                return Scores(1.0 / (columns["per_comma"].values - 0.5), [None] * len(columns["per_comma"].values))

    register_indicator("per_comma")(PerComma)
    register_indicator("inverse")(Inverse)
    pool = [alpaca("List.", text) for text in ("red", "red, blue", "red, blue, green")]
    table = score_examples(pool, ["per_comma", "inverse"], cache_dir=tmp_path)
    np.testing.assert_array_equal(table.values["per_comma"], [np.nan, 1.0, 0.5])
    np.testing.assert_array_equal(table.values["inverse"], [np.nan, 2.0, np.nan])
    assert table.reasons["per_comma"] == ["per_comma is not a finite number", None, None]
    assert table.reasons["inverse"][2] == "inverse is not a finite number"
    plan = ScoringPlan(pool, get_indicators(["per_comma"]), Setup(Encoding(cache_dir=str(tmp_path / "old"))))
    plan.works["per_comma"].store.append([pool[0].id], np.array([np.inf]), [None])  # as earlier versions did
    again = score_examples(pool, ["per_comma"], cache_dir=tmp_path / "old")
    assert again.reasons["per_comma"] == table.reasons["per_comma"] and np.isnan(again.values["per_comma"][0])


def test_an_indicator_that_takes_seconds_a_row_has_few_rows_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had 1,024: hours without progress, and lost where they were interrupted."""
    from im_lightning.scoring.passes import base

    now, sizes = 0.0, list[int]()

    class Slow(Indicator):
        def compute(self, features: Features) -> Scores:
            nonlocal now
            sizes.append(len(features.examples))
            now += 1.0 * len(features.examples)
            if sum(sizes) > 200:
                raise KeyboardInterrupt
            return Scores(np.ones(len(features.examples)), [None] * len(features.examples))

    register_indicator("slow")(Slow)
    pool = make_pool(300)
    with monkeypatch.context() as patch:
        patch.setattr(base.time, "monotonic", lambda: now)
        with pytest.raises(KeyboardInterrupt):
            score_examples(pool, ["slow"])
    assert sizes[:6] == [64, 32, 16, 8, 4, 2] and set(sizes[6:]) == {2}
    left = ScoringPlan(pool, get_indicators(["slow"]), Setup()).works["slow"].missing
    assert left.sum() == len({one.id for one in pool}) - sum(sizes[:-1]), "what was done is kept"
