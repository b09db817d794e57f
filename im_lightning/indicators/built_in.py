"""The built-in indicators, a row each: what other rooms have to know of one without loading it.

A new one is a row here and a class in a module of this folder (`register_indicator`). Nothing else names it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class IndicatorInfo:
    """A built-in indicator.

    Args:
        name: Its column.
        module: The module of this folder that registers it.
        model: The argument that names the model it reads (or the target rows); None for those of the text alone.
        kind: Its transform in rules: "log", "log1p" or "identity".
        regressor: Its place among the paper's regressors, which a rule takes by default; None: on request.
        meaning: What it is, for the report.
        default: Whether it is scored where no indicators are named, once its model is.
    """

    name: str
    module: str
    model: str | None
    kind: str
    regressor: int | None
    meaning: str
    default: bool = True


_PPL = "perplexity: how surprising the base model finds the response"
_PPL_ALONE = "perplexity of the response without its instruction"
_IFD = "perplexity with the instruction, divided by that without it"
_NEIGHBOUR = "distance to a neighbour: how unlike other rows it is"
_MTLD = "lexical diversity: words until the vocabulary repeats itself"
_UNIEVAL = "UniEval, 0 to 1"
_TUNED = "perplexity of the base model after a short finetune on the target rows"
_DROP = "share of its loss that a short finetune on the target rows takes away"
_GRADIENT = "cosine of its gradient with that of the target rows' loss"
BUILT_IN: dict[str, IndicatorInfo] = {
    row.name: row
    for row in (
        IndicatorInfo("length_input", "lengths", "model", "log1p", 2, "tokens of the instruction"),
        IndicatorInfo("length_output", "lengths", "model", "log1p", 3, "tokens of the response"),
        IndicatorInfo("mtld", "mtld", None, "log1p", 5, _MTLD),
        IndicatorInfo("mtld_lexicalrichness", "mtld", None, "identity", None, "", default=False),
        IndicatorInfo("ppl", "likelihood", "model", "log", 4, _PPL),
        IndicatorInfo("ppl_unconditional", "likelihood", "model", "log", None, _PPL_ALONE),
        IndicatorInfo("ifd", "likelihood", "model", "log", None, _IFD),
        IndicatorInfo("knn_6", "knn", "embedding_model", "identity", 6, _NEIGHBOUR),
        IndicatorInfo("reward", "reward", "reward_model", "identity", 1, "score of the reward model"),
        IndicatorInfo("naturalness", "unieval", "unieval_model", "identity", 7, _UNIEVAL),
        IndicatorInfo("coherence", "unieval", "unieval_model", "identity", 8, _UNIEVAL),
        IndicatorInfo("understandability", "unieval", "unieval_model", "identity", 9, _UNIEVAL),
        IndicatorInfo("ppl_tuned", "influence", "targets", "log", None, _TUNED, default=False),
        IndicatorInfo("loss_drop", "influence", "targets", "identity", None, _DROP),
        IndicatorInfo("gradient_similarity", "influence", "targets", "identity", None, _GRADIENT),
    )
}
"""By name; knn_6 stands for knn_<i>."""
KNN = re.compile(r"knn_([0-9]+)\Z")
"""A `knn_<i>`: `knn_density` is an indicator of one's own, or of another tool."""
DESIGNED_INDICATORS = ("length_input", "length_output", "ppl", "mtld", "knn_6")
"""What a designed run is scored for unless told otherwise: the paper's regressors that need no other models."""


def info_of(name: str) -> IndicatorInfo | None:
    """The row of an indicator; None for one that is not built in."""
    return BUILT_IN.get("knn_6" if KNN.match(name) else name)


def names_of(model: str) -> list[str]:
    """The indicators that read the model of this argument."""
    return [row.name for row in BUILT_IN.values() if row.model == model]


def default_names(models: Collection[str]) -> list[str]:
    """The indicators of the text, and those whose model is named; the base model's states serve as embeddings, too.

    >>> default_names(["embedding_model"])
    ['mtld', 'knn_6']
    """
    named = {None, *models, *(["embedding_model"] if "model" in models else [])}
    return [row.name for row in BUILT_IN.values() if row.default and row.model in named]


def models_of(names: Iterable[str]) -> list[str]:
    """The arguments that name the models, beside the base model, which these indicators read."""
    read = {row.model for name in names if (row := info_of(name)) is not None}
    return [model for model in ("reward_model", "unieval_model", "embedding_model", "targets") if model in read]
