"""The registry: a user's own indicator in ten lines, and names that cannot be mistaken for each other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from im_lightning.data.example import Example, Message
from im_lightning.errors import RequestError
from im_lightning.indicators import base
from im_lightning.indicators.base import (
    Features,
    Indicator,
    Missing,
    get_indicator,
    get_indicators,
    known_indicators,
    register_indicator,
)


@pytest.fixture(autouse=True)
def forget_registrations() -> Iterator[None]:
    before = set(base._registered)
    yield
    for name in set(base._registered) - before - set(base._BUILT_IN):
        del base._registered[name]


def example(response: str) -> Example:
    return Example((Message("user", "?"), Message("assistant", response)))


def test_custom_indicator() -> None:
    @register_indicator("shouting")
    class Shouting(Indicator):
        def score(self, example: Example) -> float:
            if not example.response:
                raise Missing("empty response")
            return example.response.count("!") / len(example.response)

    assert "shouting" in known_indicators()
    scores = get_indicator("shouting").compute(Features([example("hi!!"), example(""), example("a")]))
    np.testing.assert_array_equal(scores.values, [0.5, np.nan, 0.0])
    assert scores.reasons == [None, "empty response", None]


def test_not_finite_is_a_reason_not_a_value() -> None:
    @register_indicator("broken")
    class Broken(Indicator):
        def score(self, example: Example) -> float:
            return float("inf")

    scores = Broken().compute(Features([example("a")]))
    assert np.isnan(scores.values[0]) and scores.reasons == ["broken is not a finite number"]


@pytest.mark.parametrize("name", ["Quotes", "2nd", "", "has space", "row", "x_reason", "predicted_log_loss", 3])
def test_ill_formed_names_are_shown_and_refused(name: object) -> None:
    with pytest.raises(RequestError, match=r"register_indicator\(.*not usable as a column.*quote_count") as caught:
        register_indicator(name)(type("Mine", (Indicator,), {}))  # type: ignore[arg-type]
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["mtld", "reward", "knn_6"])
def test_own_names_cannot_be_taken(name: str) -> None:
    """Otherwise two people's `mtld` columns would mean different things."""
    with pytest.raises(RequestError, match="belongs to"):
        register_indicator(name)(type("Mine", (Indicator,), {"__module__": "user"}))


def test_duplicates_and_strangers_are_refused() -> None:
    register_indicator("twice")(type("First", (Indicator,), {}))
    with pytest.raises(RequestError, match=r"First.*choose another name"):
        register_indicator("twice")(type("Second", (Indicator,), {}))
    with pytest.raises(RequestError, match=r"<function.*is not a subclass of Indicator"):
        register_indicator("function")(lambda example: 0.0)  # type: ignore[type-var]
    with pytest.raises(RequestError, match=r"needs 'logits', which no pass provides.*conditional"):
        register_indicator("needy")(type("Needy", (Indicator,), {"needs": ("logits",)}))


def test_lookup_errors_help() -> None:
    with pytest.raises(RequestError, match=r"'pll'.*there are length_input.*knn_<i>.*ask for ppl"):
        get_indicator("pll")
    with pytest.raises(RequestError, match=r"'knn_0'.*ask for knn_6"):
        get_indicator("knn_0")
    with pytest.raises(RequestError, match="indicators 'ppl': is not a list of names"):
        get_indicators("ppl")


def test_names_give_indicators_once_in_order() -> None:
    found = get_indicators(["ppl", "knn_3", "mtld", "ppl"])
    assert [i.name for i in found] == ["ppl", "knn_3", "mtld"]
    assert found[1].pool_dependent and found[1].rank == 3  # type: ignore[attr-defined]
    assert get_indicator("ifd").derived_from == ("ppl", "ppl_unconditional")
