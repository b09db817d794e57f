"""From sums and counts to perplexities: every value that does not exist has its reason."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from im_lightning.data.example import Example, Message
from im_lightning.indicators.base import Features, Likelihood, get_indicator

ONE = np.array([False, True, True])  # a mask of one answer


def features() -> Features:
    examples = [Example((Message("user", "?"), Message("assistant", text))) for text in ("a", "", "b", "c", "d", "e")]
    sums = np.array([4.0, 0.0, np.nan, np.inf, 2000.0, 0.0])
    counts = np.array([2, 0, 1, 1, 1, 0])
    cuts = [(0, 0), (0, 0), (3, 0), (0, 2), (1, 1), (0, 0)]
    encoded = [
        SimpleNamespace(
            truncated_prompt=p,
            truncated_response=r,
            length_input=7,
            length_output=i,
            special=0,
            response_mask=ONE,
            loss_mask=ONE,
        )
        for i, (p, r) in enumerate(cuts)
    ]
    alone = Likelihood(np.array([6.0, 0.0, 1.0, 1.0, 1.0, 1.0]), np.array([2, 0, 1, 1, 1, 1]))
    uncut = [
        SimpleNamespace(truncated_prompt=0, truncated_response=0, special=0, response_mask=ONE, loss_mask=ONE)
        for _ in cuts
    ]
    return Features(examples, encoded, uncut, Likelihood(sums, counts), alone)  # type: ignore[arg-type]


def test_perplexity_and_its_reasons() -> None:
    scores = get_indicator("ppl").compute(features())
    np.testing.assert_allclose(scores.values, [np.exp(2.0)] + [np.nan] * 5)
    not_finite = "the model's loss is not finite"
    assert scores.reasons == [None, "empty response", *[not_finite] * 3, "no response token to predict"]
    assert get_indicator("ppl_unconditional").compute(features()).notes == []  # its own tokens were not cut
    assert scores.notes == [None, None, "prompt cut", "response cut", "prompt and response cut", None]


def test_ifd_is_the_ratio_and_takes_over_reasons() -> None:
    columns = {name: get_indicator(name).compute(features()) for name in ("ppl", "ppl_unconditional")}
    ifd = get_indicator("ifd").derive(columns)
    np.testing.assert_allclose(ifd.values, [np.exp(-1.0)] + [np.nan] * 5)
    assert ifd.reasons == columns["ppl"].reasons
    assert ifd.notes[3] == "response cut"


def test_lengths_come_from_the_encoding() -> None:
    assert get_indicator("length_output").compute(features()).values.tolist() == [0, 1, 2, 3, 4, 5]
    assert get_indicator("length_input").compute(features()).values.tolist() == [7.0] * 6


def test_an_answer_that_is_a_call_alone_has_a_perplexity() -> None:
    call = Example((Message("user", "?"), Message("assistant", "", fields='{"tool_calls":[{}]}')))
    uncut = [SimpleNamespace(truncated_prompt=0, truncated_response=0, special=0, response_mask=ONE, loss_mask=ONE)]
    known = Likelihood(np.array([4.0]), np.array([2]))
    scores = get_indicator("ppl").compute(Features([call], uncut, uncut, known, known))  # type: ignore[arg-type]
    assert scores.values.tolist() == [np.exp(2.0)] and scores.reasons == [None]
