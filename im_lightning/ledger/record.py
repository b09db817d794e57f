"""`RunRecord`: what one finetune run leaves behind for the fit of a rule, with its schema and its validation."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from im_lightning._utils.files import plain
from im_lightning._utils.hashing import digest_json
from im_lightning.errors import DataError, RequestError, message
from im_lightning.ledger.targets import SCORE, error_rate, set_of, terms_of
from im_lightning.models.cost import Cost, operations

SCHEMA_VERSION = 1
WANDB_RECORD = "im/record"  # the key of the whole record in a wandb summary, whatever the prefix of the others
WANDB_CONFIG = "im"
FORMAT = "im_lightning.run"
STATUSES = ("complete", "incomplete", "failed", "interrupted")
PURPOSES = ("designed", "weighted", "search", "compare", "block")
TRAINED, MERGED = KINDS = ("trained", "merged")
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
COMPUTE = ("parameters", "tokens_trained", "tokens_evaluated")
_REMEDY = "restore the file from a copy, or delete it if the run can be made again"


@dataclass
class RunRecord:
    """One finetune run. Everything is JSON-like; a mean that does not exist is NaN (null in the file).

    Args:
        run_id: Unique in its ledger; letters, digits, dot, dash and underscore.
        status: "complete" once the evaluation loss on the final weights is known, else "incomplete", "failed" or
            "interrupted".
        purpose: "designed" (made for a fit), "weighted" (drawn by a rule), "search", "compare", or "block" (finetuned
            to be merged, on fewer or more rows than the runs of a fit).
        created: ISO 8601 time; without an offset it is read as UTC.
        subset: digest of the rows trained on, size (rows), seed, mixture, tilt, source_shares {source: share}, …
        pool_digest: Digest of the pool's ids, in order.
        indicator_means: Exposure-weighted means of the raw indicators.
        phi_means: Exposure-weighted means of the transformed indicators: the x of a fit.
        transforms: indicator → {kind, low, high}, the φ behind `phi_means`.
        basis_means: indicator → {"knots": […], "means": […]}, exposure-weighted means of the hat functions of φ at
            these knots (they sum to 1): the x of an additive fit. {} in the files of earlier versions.
        source_phi_means: source → indicator → the part of `phi_means` that the rows of the source make up: φ counted as
            0 in the others. {} in the files of earlier versions.
        keys: indicator → {"identity": {…}, "numerics": {…}} as in the ScoreTable.
        evaluation: set → {loss (nats per token), tokens, examples, log_loss, and where known instructions, example_loss
            (instructions counting alike), inner_loss (without the first and last token of every answer), base_loss,
            best_loss, exact_match with answers}.
        regime: What must be equal for runs to share a rule: base_model, method, template, max_length, subset_size,
            epochs, learning_rate, evaluation_sets {set: digest}, … Seeds do not belong here.
        tokens: Supervised tokens seen.
        steps: Optimiser steps.
        seeds: {"training": …, "subset": …, …}.
        seconds: Wall time of the fit.
        numerics: device, precision, token_budget of the fit: they change its numbers by rounding alone. {} in the files
            of earlier versions.
        compute: parameters (that a token is multiplied with, null where not known), tokens_trained and tokens_evaluated
            (prompts included; over all evaluation sets, each time they were measured after the start): what `cost` is
            reckoned from. {} in the files of earlier versions.
        versions: Package versions.
        loggers: Logger name → run id or path.
        weights: method, strength, ess, … of the weights the rows were drawn by.
        note: Anything a person should know, for example why the run failed.
        scores: task → {exact_match (share of right answers, 0 to 1), answers (their number)}, measured elsewhere.
        curve: Where the evaluation was measured before the end, or the run was stopped: {"steps": optimiser steps of
            the full run, "points": [what the record of a run stopped there holds, …]}; see `ledger.curve`. {} for
            other runs.
        made: How the run was made; {} for a finetune. Of a merged one kind ("merged"), alpha {block: share}, s, blocks
            {block: {digest of its rows, run_id}}.

    >>> losses = {"held-out": {"loss": 1.25, "tokens": 1000, "examples": 50}}
    >>> RunRecord("run-1", "complete", "designed", "2026-01-01T00:00:00Z", evaluation=losses).loss("held-out")
    1.25
    """

    run_id: str
    status: str
    purpose: str
    created: str
    subset: dict[str, Any] = field(default_factory=dict)
    pool_digest: str = ""
    indicator_means: dict[str, float] = field(default_factory=dict)
    phi_means: dict[str, float] = field(default_factory=dict)
    transforms: dict[str, dict[str, Any]] = field(default_factory=dict)
    basis_means: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    source_phi_means: dict[str, dict[str, float]] = field(default_factory=dict)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    regime: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    steps: int = 0
    seeds: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    numerics: dict[str, Any] = field(default_factory=dict)
    compute: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    curve: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def when(self) -> datetime:
        """`created` as an aware time, for sorting."""
        return parse_time(self.created)

    @property
    def subset_key(self) -> str:
        """Equal for runs on the same subset; a run without a subset digest is alone in its group."""
        return str(self.subset.get("digest") or f"run:{self.run_id}")

    @property
    def measured(self) -> list[str]:
        """The targets that it has a number of: losses by set, then scores as em:TASK."""
        scored = [name for name, one in self.evaluation.items() if one.get("exact_match") is not None]
        return [*self.evaluation, *dict.fromkeys(f"{SCORE}{name}" for name in (*scored, *self.scores))]

    @property
    def cost(self) -> Cost:
        """What the run took; operations that were not recorded are NaN."""
        found = [self.compute.get(name) for name in COMPUTE]
        known = [math.nan if value is None else float(value) for value in found]
        return Cost(operations(known[0], read=known[2], trained=known[1]), self.seconds)

    @property
    def kind(self) -> str:
        """How the run was made: "trained", or "merged" of adapters that were trained on blocks."""
        return str(self.made.get("kind", TRAINED))

    @property
    def mixture_key(self) -> str:
        """Equal for a merged run and for its twins, which drew their rows in its shares; "" for runs without blocks."""
        blocks, shares = self.subset.get("blocks"), self.subset.get("shares_wanted") or {}
        if not blocks:
            return ""
        return digest_json([blocks, {name: round(float(share), 6) for name, share in shares.items() if share > 0}])

    def loss(self, evaluation: str) -> float:
        """What a rule on a target predicts the logarithm of; lower is better, and NaN where it was not measured.

        Of a set its evaluation loss in nats per token: the mean over all tokens; of "NAME:example" over instructions,
        of each the mean over its reference outputs. Of "em:TASK" the error rate of its answers. Of a weighted sum
        (`ledger.targets`) the sum of these.
        """
        if evaluation in self.evaluation:
            return self._value(evaluation)
        return sum(weight * self._value(term) for term, weight in terms_of(evaluation).items() if weight)

    def _value(self, term: str) -> float:
        if term in self.evaluation:
            value = self.evaluation[term].get("loss")
        elif term.startswith(SCORE):
            return error_rate(self.scores.get(set_of(term)) or self.evaluation.get(set_of(term), {}))
        else:
            value = self.evaluation.get(set_of(term), {}).get("example_loss")
        return math.nan if value is None else float(value)

    def has_loss(self, evaluation: str) -> bool:
        """Whether the run has a finite positive loss on the target; a diverged one has not."""
        loss = self.loss(evaluation)
        return math.isfinite(loss) and loss > 0

    def validate(self, place: str | None = None) -> RunRecord:
        """Checks every field and returns the record itself.

        Raises:
            DataError: naming `place` (a file; by default the run) and the field.
        """
        where = place or f"run {self.run_id}"
        _check(where, "schema_version", self.schema_version, isinstance(self.schema_version, int), "an integer")
        _check(where, "run_id", self.run_id, _is_run_id(self.run_id), "letters, digits, dot, dash and underscore")
        _check(where, "status", self.status, self.status in STATUSES, f"one of {', '.join(STATUSES)}")
        _check(where, "purpose", self.purpose, self.purpose in PURPOSES, f"one of {', '.join(PURPOSES)}")
        _check(where, "created", self.created, _is_time(self.created), "an ISO 8601 time")
        for name in ("pool_digest", "note"):
            _check(where, name, getattr(self, name), isinstance(getattr(self, name), str), "a string")
        for name in ("tokens", "steps"):
            value = getattr(self, name)
            _check(where, name, value, _is_number(value) and float(value).is_integer() and value >= 0, "a count")
        _check(where, "seconds", self.seconds, self.seconds is None or _is_number(self.seconds), "a number or null")
        for name in _OBJECTS:
            value = getattr(self, name)
            good = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
            _check(where, name, value, good, "an object with string keys")
        for name in ("indicator_means", "phi_means"):
            for key, value in getattr(self, name).items():
                _check(where, f"{name}.{key}", value, value is None or _is_number(value), "a number or null")
        for key in COMPUTE:
            value = self.compute.get(key)
            _check(where, f"compute.{key}", value, value is None or _is_number(value), "a number or null")
        for name in ("transforms", "keys", "evaluation", "source_phi_means", "scores"):
            for key, value in getattr(self, name).items():
                _check(where, f"{name}.{key}", value, isinstance(value, Mapping), "an object")
        for key, value in self.basis_means.items():
            good = isinstance(value, Mapping) and _same_length(value.get("knots"), value.get("means"))
            _check(where, f"basis_means.{key}", value, good, "an object with as many means as knots")
        for key, value in self.evaluation.items():
            loss = value.get("loss")
            _check(where, f"evaluation.{key}.loss", loss, loss is None or _is_number(loss), "a number or null")
        for key, value in self.scores.items():
            _check(where, f"scores.{key}", value, _is_score(value), "{exact_match: 0 to 1, answers: 1 or more}")
        _check(where, "curve", self.curve, _is_curve(self.curve), "the steps of the full run and a list of points")
        _check(where, "made.kind", self.kind, self.kind in KINDS, f"one of {', '.join(KINDS)}")
        if self.status == "complete":
            _check(where, "evaluation", self.evaluation, bool(self.evaluation), "at least one set on a complete run")
        return self

    def to_json(self) -> dict[str, Any]:
        """JSON object of the record, `format` first; values that are not finite become null."""
        out = {"format": FORMAT, "schema_version": self.schema_version}
        out.update({k: v for k, v in asdict(self).items() if k != "schema_version"})
        for name in ("basis_means", "numerics", "compute", "curve", "made", "source_phi_means", "scores"):
            if not out[name]:  # so that files of earlier versions keep their digest
                del out[name]
        return plain(out)

    @classmethod
    def from_json(cls, value: Any, place: str) -> RunRecord:
        """Reads and validates what `to_json` wrote; fields this version does not know are ignored.

        Args:
            value: The parsed JSON.
            place: The file, for messages.

        Raises:
            DataError: not a record, another schema version, or a field of the wrong type; names file and field.
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT:
            cause = f'it is not a run record ("format" is not "{FORMAT}")'
            raise DataError(message(place, cause, "keep other files out of the ledger's folder"))
        version = value.get("schema_version")
        if version != SCHEMA_VERSION:
            cause = f"its schema_version is {version!r}, and this version of im-lightning reads {SCHEMA_VERSION}"
            raise DataError(message(place, cause, "use the version of im-lightning that wrote it"))
        known = {f.name for f in fields(cls)}
        for name in ("run_id", "status", "purpose", "created"):
            if name not in value:
                raise DataError(message(place, f"the field {name} is missing", _REMEDY))
        record = cls(**{k: v for k, v in value.items() if k in known})
        record.validate(place)
        for name in ("indicator_means", "phi_means"):
            means = {k: math.nan if v is None else v for k, v in getattr(record, name).items()}
            setattr(record, name, means)
        record.seconds = math.nan if record.seconds is None else record.seconds
        return record


def new_run_id() -> str:
    """A run id that sorts by time and that no two processes share: `20260131-174501-3fa94c1e`."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def checked_run_id(run_id: str) -> str:
    """The id, if a ledger can keep a run of it.

    Raises:
        RequestError: it cannot.
    """
    if not _is_run_id(run_id) or run_id.endswith(".statistics"):
        remedy = "use letters, digits, dot, dash and underscore, a letter or a digit first, 128 at most"
        raise RequestError(message("run_id", f"no ledger can keep a run called {run_id!r}", remedy))
    return run_id


def now() -> str:
    """The present time as `created` wants it: ISO 8601, UTC, to the microsecond."""
    return datetime.now(UTC).isoformat()


def parse_time(text: str) -> datetime:
    """ISO 8601 time as an aware datetime; "Z" and an absent offset mean UTC."""
    value = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return value if value.tzinfo else value.replace(tzinfo=UTC)


_OBJECTS = tuple(f.name for f in fields(RunRecord) if str(f.type).startswith("dict"))


def _check(place: str, name: str, value: Any, good: bool, wanted: str) -> None:
    if not good:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise DataError(message(place, f"the field {name} is {shown}; it must be {wanted}", _REMEDY))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float) or (hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0)


def _same_length(knots: Any, means: Any) -> bool:
    return (
        all(isinstance(v, list | tuple) and len(v) > 0 for v in (knots, means))
        and len(knots) == len(means)
        and all(_is_number(k) for k in knots)
        and all(m is None or _is_number(m) for m in means)
    )


def _is_score(value: Mapping[str, Any]) -> bool:
    share, answers = value.get("exact_match"), value.get("answers")
    if not (_is_number(share) and _is_number(answers)):
        return False
    return 0 <= float(share) <= 1 and float(answers).is_integer() and float(answers) >= 1  # type: ignore[arg-type]


_OF_A_POINT = ("evaluation", "indicator_means", "phi_means", "basis_means", "subset")


def _is_curve(value: Mapping[str, Any]) -> bool:
    points = value.get("points", [])
    return not value or (
        _is_number(value.get("steps"))
        and isinstance(points, list)
        and all(isinstance(p, Mapping) and _is_number(p.get("steps")) for p in points)
        and all(isinstance(p.get(name), Mapping) for p in points for name in _OF_A_POINT)
    )


def _is_run_id(value: Any) -> bool:
    return isinstance(value, str) and RUN_ID.fullmatch(value) is not None and value != "rule"


def _is_time(value: Any) -> bool:
    try:
        parse_time(value)
    except (TypeError, ValueError, AttributeError):
        return False
    return True
