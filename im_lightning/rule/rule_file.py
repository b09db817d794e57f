"""Rule files: a rule as readable JSON with its provenance; every field is validated when it is read.

`RuleFields`: the data fields of a rule; what rule files and tables are made from.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from im_lightning import __version__
from im_lightning._utils.files import looks_like, parse_json, plain
from im_lightning._utils.hashing import digest_json
from im_lightning.errors import DataError, RequestError, message
from im_lightning.indicators.transforms import OF_SOURCE, SHARE, Transform, knots_of
from im_lightning.ledger.ledger import RULE_FORMAT
from im_lightning.ledger.targets import SCORE, is_score
from im_lightning.rule.metrics import RuleMetrics
from im_lightning.rule.validation.diagnostics import region_rank


@dataclass(eq=False, repr=False)
class RuleFields:
    """The data of a fitted or published rule.

    Args:
        name: What messages call it.
        intercept_: In log nats per token.
        coef_: float64 [p].
        feature_names_in_: [p] regressors, in the order of `coef_`: indicators, or under an additive rule their hat
            functions, named `<indicator>[k]`; shares of sources, `share of <source>`; indicators in rows of one source
            alone, `<indicator> of <source>`.
        transforms_: regressor → φ, with its hat under an additive rule.
        verified: False for coefficients that nobody here has reproduced.
        method: How it was fitted: "ols", "published", …
        evaluation: The target that it predicts: an evaluation set, or as `ledger.targets` writes it.
        mean_: float64 [p], mean of the run means; None without a fitted region.
        cov_: float64 [p, p], their covariance (n − 1).
        radius_: Radius of the fitted region in Mahalanobis distance, see `diagnostics.fitted_radius`.
        reach_: How far the tilt goes at strength 1, in sd of the runs' fitted values: the radius, at most 3. None for
            an old region, whose distances are over regressors (hat functions, under an additive rule) and whose tilt
            goes to its radius.
        lowest_: The rule's lowest prediction among its runs, in log nats per token; None for an old region.
        coef_cov_: float64 [p + 1, p + 1], covariance of the estimates, intercept first; [p + 2, p + 2] with an offset,
            which is last.
        coefficients_: One row per term, intercept first: {term, estimate, se, t, p, low, high, vif} (95 % interval).
        identities: indicator → identity part of its key.
        numerics: indicator → numerics part of its key.
        regime: The regime of the runs.
        n_runs_: Runs it was fitted on; 0 for published rules.
        metrics_: R², held-out R², candidates, baselines, permutation p, condition number, notes, ….
        ledger_digest_: Digest of those runs.
        pool_digest_: Digest of their pool, "" where there were several.
        created: ISO 8601 time of the fit.
        automatic: Whether a finetune refitted it, untested, at its end: the next one may replace it. None in the files
            of earlier versions, which do not say.
        origin: The file it was read from; messages name it.
        transfers: Evidence for other base models, see `rule.transfer`.
        offset_: c in L = c + exp(intercept + coefficients · x), in nats per token; 0 for log L = intercept + ….
        sources_: Of a rule with regressors of sources: the runs' sources, that without a share of its own last. Rows of
            others have no prediction.
    """

    name: str
    intercept_: float
    coef_: np.ndarray
    feature_names_in_: list[str]
    transforms_: dict[str, Transform]
    verified: bool = True
    method: str = "ols"
    evaluation: str = ""
    mean_: np.ndarray | None = None
    cov_: np.ndarray | None = None
    radius_: float | None = None
    reach_: float | None = None
    lowest_: float | None = None
    coef_cov_: np.ndarray | None = None
    coefficients_: list[dict[str, Any]] = field(default_factory=list)
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    numerics: dict[str, dict[str, Any]] = field(default_factory=dict)
    regime: dict[str, Any] = field(default_factory=dict)
    n_runs_: int = 0
    metrics_: RuleMetrics = field(default_factory=RuleMetrics)
    ledger_digest_: str = ""
    pool_digest_: str = ""
    created: str = ""
    automatic: bool | None = False
    origin: str = ""
    transfers: list[dict[str, Any]] = field(default_factory=list)
    offset_: float = 0.0
    sources_: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What messages call the rule: its file where it has one, else its name."""
        return self.origin or self.name

    @property
    def columns(self) -> list[str]:
        """[p] the indicator behind each regressor; "" for a share of a source."""
        return [self.transforms_[n].column(n) for n in self.feature_names_in_]

    @property
    def indicators(self) -> list[str]:
        """The indicators that the rule needs, each once."""
        return [c for c in dict.fromkeys(self.columns) if c]

    @property
    def indicator_transforms(self) -> dict[str, Transform]:
        """indicator → φ of the indicator itself, without hat functions."""
        return {c: self.transforms_[n].base() for c, n in zip(self.columns, self.feature_names_in_, strict=True) if c}

    @property
    def knots(self) -> dict[str, list[float]]:
        """indicator → knots of its hat functions; {} for a rule that is linear in its indicators."""
        if all(transform.hat is None for transform in self.transforms_.values()):
            return {}
        pairs = list(zip(self.columns, self.feature_names_in_, strict=True))
        found = {c: knots_of([self.transforms_[n] for d, n in pairs if d == c]) for c in self.indicators}
        return {c: knots for c, knots in found.items() if knots}

    @property
    def held_out_r2(self) -> float | None:
        """R² on runs that the fit had not seen: by folds of subsets, else by leaving one out; None where that would
        leave a repeat of it."""
        m = self.metrics_
        alone = None if 0 < m.n_subsets < self.n_runs_ else m.leave_one_out_r2
        return next((r2 for r2 in (m.grouped_r2, m.leave_subset_out_r2, alone) if r2 is not None), None)

    @property
    def beats_mean(self) -> bool | None:
        """Whether the permutation test found the rule better than the mean; where it was not made None, or False for
        a rule that predicts unseen runs no better than their mean does (held-out R² of 0 or less)."""
        value, r2 = self.metrics_.beats_mean, self.held_out_r2
        if isinstance(value, bool):
            return value
        return False if r2 is not None and r2 <= 0 else None

    @property
    def replaceable(self) -> bool:
        """Whether a finetune may put its refit in this rule's place: one that a finetune made and nobody tested."""
        metrics, made = self.metrics_, self.automatic
        if made is None:  # an earlier version's: those of finetunes were by least squares, without a bootstrap
            made = self.method == "ols" and not metrics.bootstrap
        return made and metrics.permutation is None

    @property
    def has_region(self) -> bool:
        """Whether the rule knows where its evidence lies; the published ones do not."""
        return self.mean_ is not None and self.cov_ is not None and self.radius_ is not None

    @property
    def old_region(self) -> bool:
        """Whether the region is that of an earlier version, under which the runs of an additive rule lie outside."""
        return self.has_region and self.reach_ is None

    @property
    def heights(self) -> np.ndarray | None:
        """What turns mean regressors […, p] into where datasets lie as distances are measured, float64 [p, q]: the mean
        φ of the indicators, but for a constant, and the shares. None where these are the regressors, as under an old
        region."""
        knots, names = self.knots, self.feature_names_in_
        axes = [column or name for column, name in zip(self.columns, names, strict=True)]
        places = list(dict.fromkeys(axes))
        if self.reach_ is None or (not knots and len(places) == len(axes)):
            return None
        heights = np.zeros((len(axes), len(places)))
        at = dict.fromkeys(axes, 0)
        for j, axis in enumerate(axes):
            at[axis] += 1
            known = knots.get(axis)
            heights[j, places.index(axis)] = 1.0 if known is None else known[at[axis]] - known[0]
        return heights

    def of_indicators(self, x: np.ndarray) -> np.ndarray:
        """Where datasets lie, float64 […, q], from their mean regressors […, p]; see `heights`."""
        heights = self.heights
        return x if heights is None else np.asarray(x @ heights)


SCHEMA_VERSION = 5
READS = (1, 2, 3, 4, 5)
"""1 had no hat functions: there a regressor is an indicator. 2 had no offset, 3 the old region, 4 no sources; they are
written where a rule has no more."""
_REMEDY = "write the rule again (im-lightning refit LEDGER --out rule.json)"
_QUANTITY = {False: "evaluation loss in nats per token", True: "error rate, the share of wrong answers"}
STATISTICS = ("se", "t", "p", "low", "high", "vif")


def rule_to_json(rule: RuleFields) -> dict[str, Any]:
    """The rule as a JSON object; reading it back gives the same numbers to the last bit."""
    rows = rule.coefficients_ or [{} for _ in range(len(rule.feature_names_in_) + 1)]
    regressors = [
        {
            "regressor": name,
            "indicator": column or None,
            "transform": rule.transforms_[name].to_json(),
            "coefficient": float(rule.coef_[j]),
            "statistics": {k: rows[j + 1].get(k) for k in STATISTICS} if rows[j + 1] else None,
            "identity": rule.identities.get(column),
            "numerics": rule.numerics.get(column),
        }
        for j, (name, column) in enumerate(zip(rule.feature_names_in_, rule.columns, strict=True))
    ]
    region = None
    if rule.cov_ is not None and rule.has_region:
        rank = region_rank(rule.cov_)
        region = {"mean": rule.mean_, "covariance": rule.cov_, "radius": rule.radius_, "rank": rank}
        if not rule.old_region:
            region |= {"reach": rule.reach_, "lowest": rule.lowest_}
    quantity = _QUANTITY[SCORE in rule.evaluation and is_score(rule.evaluation)]
    value = {
        "format": RULE_FORMAT,
        "schema_version": 5 if rule.sources_ else 4 if rule.reach_ is not None else 3 if rule.offset_ else 2,
        "name": rule.name,
        "verified": rule.verified,
        "predicts": f"natural logarithm of the {quantity}; lower is better",
        "method": rule.method,
        "evaluation": rule.evaluation,
        "created": rule.created,
        "made_by": f"im_lightning {__version__}",
        "automatic": rule.automatic,
        "intercept": float(rule.intercept_),
        **({"offset": rule.offset_} if rule.offset_ else {}),
        **({"sources": rule.sources_} if rule.sources_ else {}),
        "intercept_statistics": {k: rows[0].get(k) for k in STATISTICS} if rows[0] else None,
        "regressors": regressors,
        "region": region,
        "coefficient_covariance": rule.coef_cov_,
        "runs": rule.n_runs_,
        "metrics": rule.metrics_.to_json(),
        "regime": rule.regime,
        "ledger_digest": rule.ledger_digest_,
        "pool_digest": rule.pool_digest_,
        **({"transfers": rule.transfers} if rule.transfers else {}),
    }
    return plain(value)


def rule_digest(rule: RuleFields) -> str:
    """Digest of what the rule says, not of when and by what it was written, nor of evidence for other bases."""
    beside = ("created", "made_by", "automatic", "transfers")
    return digest_json({k: v for k, v in rule_to_json(rule).items() if k not in beside})


def read_fields(path: str | os.PathLike[str]) -> RuleFields:
    """Reads and validates a rule file.

    Raises:
        RequestError: there is no such file.
        DataError: it is not a rule of this schema, or a field is wrong; names file and field.
    """
    file = Path(path)
    if not file.is_file():
        cause = "there is no such rule file"
        raise RequestError(message(str(path), cause, "check the path, or make one with `im-lightning refit`"))
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(message(str(path), f"cannot be read: {error.strerror}", "check the path")) from error
    except ValueError as error:
        raise DataError(message(str(path), f"it is not whole JSON{looks_like(path)} ({error})", _REMEDY)) from error
    rule = fields_from_json(value, str(path))
    rule.origin = str(path)
    return rule


def fields_from_json(value: Any, place: str) -> RuleFields:
    """The rule in a parsed rule file, as data; `place` is the file, for messages."""
    if not isinstance(value, dict) or value.get("format") != RULE_FORMAT:
        raise DataError(message(place, f'it is not a rule file ("format" is not "{RULE_FORMAT}")', _REMEDY))
    version = value.get("schema_version")
    if version not in READS or isinstance(version, bool):
        cause = (
            f"its schema_version is {version!r}, and this version of im-lightning reads {' and '.join(map(str, READS))}"
        )
        raise DataError(message(place, cause, "use the version of im-lightning that wrote it"))
    top = _Fields(place, value)
    regressors = [_Fields(place, r, f"regressors[{i}].") for i, r in enumerate(top.get("regressors", list))]
    if not regressors:
        raise DataError(message(place, "the field regressors is empty", _REMEDY))
    columns = [r.get("indicator", str) if version < 5 else r.optional("indicator", str) or "" for r in regressors]
    names = columns if version == 1 else [r.get("regressor", str) for r in regressors]
    if len(set(names)) < len(names):
        raise DataError(message(place, "the field regressors names a regressor twice", _REMEDY))
    p, where = len(names), f"{place}: the field "
    transforms = [Transform.from_json(r.value.get("transform"), f"{where}{r.prefix}transform") for r in regressors]
    rule = RuleFields(
        name=top.get("name", str),
        intercept_=top.number("intercept"),
        coef_=np.array([r.number("coefficient") for r in regressors]),
        feature_names_in_=names,
        transforms_=dict(zip(names, transforms, strict=True)),
        verified=top.get("verified", bool),
        method=top.get("method", str),
        evaluation=top.get("evaluation", str),
        coefficients_=_coefficients(top, names, regressors),
        identities={n: i for n, r in zip(columns, regressors, strict=True) if (i := r.optional("identity", dict))},
        numerics={n: i for n, r in zip(columns, regressors, strict=True) if (i := r.optional("numerics", dict))},
        regime=top.get("regime", dict),
        n_runs_=top.get("runs", int),
        metrics_=RuleMetrics.from_json(top.get("metrics", dict)),
        ledger_digest_=top.get("ledger_digest", str),
        pool_digest_=top.get("pool_digest", str),
        created=top.get("created", str),
        offset_=top.number("offset") if "offset" in value else 0.0,
        automatic=top.optional("automatic", bool),
        transfers=[
            _Fields(place, e, f"transfers[{i}].").value for i, e in enumerate(top.optional("transfers", list) or [])
        ],
        sources_=[str(name) for name in top.get("sources", list)] if version > 4 else [],
    )
    terms = p + 1 + (rule.offset_ > 0)
    for j, (name, column) in enumerate(zip(names, columns, strict=True)):
        if not _is_regressor(name, column, rule.transforms_[name], rule.sources_):
            what = f"no hat of {column}" if column else "no share of a source"
            cause = f"the field regressors[{j}].regressor is {name!r}, which is {what}"
            raise DataError(message(place, cause, _REMEDY))
    if top.optional("region", dict) is not None:
        region = _Fields(place, value["region"], "region.")
        rule.mean_, rule.cov_ = region.array("mean", (p,)), region.array("covariance", (p, p))
        rule.radius_ = region.number("radius")
        if version > 3:
            rule.reach_, rule.lowest_ = region.number("reach"), region.number("lowest")
    if top.optional("coefficient_covariance", list) is not None:
        rule.coef_cov_ = top.array("coefficient_covariance", (terms, terms))
    return rule


def _is_regressor(name: str, column: str, transform: Transform, sources: list[str]) -> bool:
    """Whether a regressor's name, indicator and φ belong together."""
    if transform.source is not None:
        whose = SHARE if transform.kind == SHARE else column
        return transform.source in sources and name == f"{whose}{OF_SOURCE}{transform.source}"
    return name == column or (transform.hat is not None and bool(column) and name.startswith(f"{column}["))


def _coefficients(top: _Fields, names: list[str], regressors: list[_Fields]) -> list[dict[str, Any]]:
    statistics = [top.optional("intercept_statistics", dict)]
    statistics += [r.optional("statistics", dict) for r in regressors]
    if any(s is None for s in statistics):
        return []
    terms = [("intercept", top.number("intercept"))]
    terms += [(n, r.number("coefficient")) for n, r in zip(names, regressors, strict=True)]
    rows = []
    for (term, estimate), values in zip(terms, statistics, strict=True):
        rows.append({"term": term, "estimate": estimate, **{k: (values or {}).get(k) for k in STATISTICS}})
    return rows


class _Fields:
    """An object of the file whose fields are read with their types checked."""

    def __init__(self, place: str, value: Any, prefix: str = "") -> None:
        self.place, self.value, self.prefix = place, value, prefix
        if not isinstance(value, dict):
            raise self._wrong("", value, "an object")

    def get(self, name: str, kind: type) -> Any:
        value = self.value.get(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._wrong(name, value, _KINDS[kind])
        return value

    def optional(self, name: str, kind: type) -> Any:
        return None if self.value.get(name) is None else self.get(name, kind)

    def number(self, name: str) -> float:
        value = self.value.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(name, value, "a finite number")
        return float(value)

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        value = self.value.get(name)
        try:
            out = np.array(value, dtype=np.float64)
        except (TypeError, ValueError):
            out = np.array(np.nan)
        if out.shape != shape or not np.isfinite(out).all():
            raise self._wrong(name, value, f"{' × '.join(map(str, shape))} finite numbers")
        return out

    def _wrong(self, name: str, value: Any, wanted: str) -> DataError:
        shown = repr(value) if not name or name in self.value else "missing"
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        field = (self.prefix + name).rstrip(".")
        return DataError(message(self.place, f"the field {field} is {shown}; it must be {wanted}", _REMEDY))


_KINDS = {str: "a string", bool: "true or false", dict: "an object", list: "a list", int: "a whole number"}
