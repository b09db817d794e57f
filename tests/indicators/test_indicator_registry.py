"""The registry: a user's own indicator in ten lines, and names that cannot be mistaken for each other."""

from __future__ import annotations

import sys
from types import ModuleType

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
from im_lightning.indicators.built_in import IndicatorInfo

pytestmark = pytest.mark.usefixtures("forget_registrations")


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


def test_needs_that_no_pass_provides_together_are_refused() -> None:
    """One that reads likelihoods before and after the finetune got the same of both: those of the base model."""

    def register(**attributes: object) -> None:
        register_indicator("needy")(type("Needy", (Indicator,), attributes))

    for needs in (("text", "tokens", "conditional", "unconditional"), ("tokens", "tuned"), ("text", "reward"), ()):
        register(needs=needs)
    register(needs=("tuned", "conditional"), derived_from=("ppl",))
    cause = r"register_indicator\('needy'\): needs 'conditional' and 'tuned', which no pass provides together"
    with pytest.raises(RequestError, match=cause + r"\. Fix: register an indicator for each, .* derived_from of this"):
        register(needs=("tuned", "text", "conditional"))
    with pytest.raises(RequestError, match="needs 'reward' and 'unieval', which no pass provides together"):
        register(needs=("reward", "unieval"))


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


def test_a_new_built_in_indicator_is_one_row_and_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row in a second table that somebody forgot would leave it without transform, default or report."""
    from im_lightning.indicators.transforms import default_kind, default_regressors
    from im_lightning.report.sections.pool import meaning
    from im_lightning.rule.linear_rule import LinearRule
    from im_lightning.rule.published import published_rule
    from im_lightning.scoring.api import default_indicators
    from im_lightning.scoring.settings import ScorerModels, Setup

    name = "honesty"
    row = IndicatorInfo(name, "made_for_this_test", "unieval_model", "log1p", 10, "UniEval, made for this test")
    monkeypatch.setitem(base.BUILT_IN, name, row)
    monkeypatch.setattr(base, "_registered", dict(base._registered))
    module = ModuleType("im_lightning.indicators.made_for_this_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    Honesty = type("Honesty", (Indicator,), {"__module__": module.__name__, "needs": ("unieval",)})
    register_indicator(name)(Honesty)

    assert isinstance(get_indicator(name), Honesty) and name in known_indicators()
    with pytest.raises(RequestError, match="belongs to an indicator of im_lightning"):
        register_indicator(name)(type("Mine", (Indicator,), {"__module__": "user"}))
    assert default_kind(name) == "log1p" and default_regressors([name, "mtld"]) == ["mtld", name]
    assert name in default_indicators(Setup(models=ScorerModels(unieval_model="m")))
    assert name not in default_indicators(Setup(models=ScorerModels(reward_model="m")))
    assert meaning(name) == "UniEval, made for this test"
    rule = published_rule("instructmining-v3")
    rule = LinearRule(name, 0.0, rule.coef_[:1], [name], {name: rule.transforms_["reward"]})
    assert "--unieval-model MODEL --indicators honesty" in rule.score_command()
