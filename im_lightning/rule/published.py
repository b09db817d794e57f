"""The published InstructMining rules, and `load_rule`, which finds a rule by name or file.

Coefficients of arXiv 2307.06290 as quoted. Nobody here has reproduced them: they come without the identities of their
models and without the region they were fitted in, and their reward scale is that of one reward model.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np

from im_lightning._utils.progress import log
from im_lightning.errors import RequestError, message
from im_lightning.indicators.built_in import models_of
from im_lightning.indicators.transforms import Transform
from im_lightning.rule.linear_rule import LinearRule
from im_lightning.rule.metrics import RuleMetrics

PUBLISHED: dict[str, tuple[float, dict[str, float], str, dict[str, float]]] = {
    "instructmining-v1": (
        1.0694,
        {"reward": -0.1498, "length_output": 8.257e-5, "knn_6": -0.9350},
        "LLaMA-7B, sets of 2,000 rows (arXiv 2307.06290v1, as quoted by users; that it is v1's is inferred)",
        {},
    ),
    "instructmining-v3": (
        0.0274,
        {"reward": -0.0078, "understandability": 0.4421, "naturalness": -0.3212, "coherence": -0.1520},
        "LLaMA-2-7B, 129 sets of 1,000 rows (arXiv 2307.06290v3)",
        {"r2": 0.522},
    ),
}
PAPER_MODELS = {
    "reward_model": "OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5",
    "unieval_model": "MingZhong/unieval-dialog",
}
"""The models that the paper computed its indicators with, by the argument that names them."""
_warned: set[str] = set()


def published_rule(name: str) -> LinearRule:
    """A published rule: raw indicators (identity, not clipped), unverified, without a fitted region.

    Raises:
        RequestError: there is no rule of this name; lists the known ones.
    """
    if name not in PUBLISHED:
        raise RequestError(_unknown(name))
    intercept, coefficients, source, metrics = PUBLISHED[name]
    return LinearRule(
        name=name,
        intercept_=intercept,
        coef_=np.array(list(coefficients.values())),
        feature_names_in_=list(coefficients),
        transforms_={indicator: Transform("identity") for indicator in coefficients},
        verified=False,
        method="published",
        metrics_=RuleMetrics.from_json({**metrics, "source": source}),
    )


def judge_models(
    rule: str | os.PathLike[str] | None,
    reward_model: str | os.PathLike[str] | None,
    unieval_model: str | os.PathLike[str] | None,
) -> dict[str, str | None]:
    """Reward and UniEval model by argument: those named, else under a published rule the paper's that it needs.

    A published rule's coefficients belong to the scale of the paper's models, hence these and no replacements. What
    was not named and is taken is reported, once per process.
    """
    named = {"reward_model": reward_model, "unieval_model": unieval_model}
    models = {argument: None if model is None else os.fspath(model) for argument, model in named.items()}
    name = None if rule is None else os.fspath(rule)
    for argument, model in PAPER_MODELS.items():
        if models[argument] is None and name in PUBLISHED and argument in models_of(PUBLISHED[name][1]):
            models[argument] = model
            if f"{argument} {name}" not in _warned:
                _warned.add(f"{argument} {name}")
                log(f"{name}: {argument} is {model}, the paper's (none was named)")
    return models


def load_rule(name_or_path: str | os.PathLike[str]) -> LinearRule:
    """A rule by published name or from a rule file; an unverified one warns, once per process.

    Args:
        name_or_path: "instructmining-v1", "instructmining-v3", or the path of a rule file.

    Raises:
        RequestError: neither a known name nor a file.
        DataError: the file is not a valid rule; names file and field.

    >>> load_rule("instructmining-v1").indicators
    ['reward', 'length_output', 'knn_6']
    """
    text = os.fspath(name_or_path)
    if text in PUBLISHED:
        rule = published_rule(text)
    elif Path(text).is_file():
        rule = LinearRule.load(text)
    else:
        raise RequestError(_unknown(text))
    if not rule.verified:
        warn_unverified(rule)
    return rule


def warn_unverified(rule: LinearRule) -> None:
    """Says once per process and rule what an unverified rule may do wrong."""
    if rule.name in _warned:
        return
    _warned.add(rule.name)
    source = rule.metrics_.source or "unknown runs"
    warnings.warn(
        f"THE RULE {rule.name} IS UNVERIFIED. Its coefficients are quoted from a paper and were fitted on {source}: "
        "another base model, other indicator models, another evaluation set. Coefficients do not transfer across "
        "these, least of all the reward's, whose scale is the reward model's own. It also has no fitted region, so "
        "nothing tells when it extrapolates. Prefer a rule fitted on runs of your own (im-lightning refit).",
        stacklevel=3,
    )


def _unknown(name: str) -> str:
    cause = f"it is neither a published rule ({', '.join(PUBLISHED)}) nor an existing rule file"
    return message(f"rule {name!r}", cause, "name one of these, or the path of a file written by im-lightning refit")
