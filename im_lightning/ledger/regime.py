"""Regimes: which runs may share one rule. Base model, method, template, sizes, epochs, learning rate, evaluation set,
the indicators' identities and their φ must agree; seeds may differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from im_lightning._utils.json_diff import POOL_FIELDS, Difference, differences, flatten, label, short
from im_lightning.indicators.transforms import Transform
from im_lightning.ledger.record import RunRecord, plain

# Seeds and subsets vary by design; identities are compared indicator by indicator, from the keys, instead.
_VARYING = frozenset({"seed", "seeds", "training_seed", "subset_seed", "data_seed", "identities", "identities_digest"})
_EVALUATION_FIELDS = ("evaluation_sets", "evaluation_set", "evaluation")


@dataclass
class Regime:
    """Runs that may share one rule.

    Args:
        records: Its runs, in the order given.
        description: What they agree on: the regime's fields, identities and φ of the indicators used.
        transforms: φ of the first run.
    """

    records: list[RunRecord]
    description: dict[str, Any]
    transforms: dict[str, Transform]

    def takes(self, description: Mapping[str, Any], transforms: Mapping[str, Transform]) -> bool:
        """Whether a run so described belongs here; φ may differ by rounding."""
        return (
            self.transforms.keys() == transforms.keys()
            and all(t.close_to(transforms[n]) for n, t in self.transforms.items())
            and not differences(self.description, description)
        )


def comparable(regime: Mapping[str, Any], evaluation: str | None = None) -> dict[str, Any]:
    """The fields of a regime that must agree, in JSON types; of several evaluation sets only the named one."""
    out: dict[str, Any] = {}
    for name, value in plain(dict(regime)).items():
        if name in _VARYING:
            continue
        if name in _EVALUATION_FIELDS and isinstance(value, Mapping) and evaluation in value:
            value = {evaluation: value[evaluation]}
        out[name] = value
    return out


def group_regimes(records: Iterable[RunRecord], indicators: Sequence[str], evaluation: str | None) -> list[Regime]:
    """Splits runs into regimes, the largest first.

    Args:
        records: Runs.
        indicators: Those whose identities and φ matter; one that a run lacks makes it another regime.
        evaluation: The evaluation set whose loss is fitted.

    Raises:
        DataError: a record's transform is not one.
    """
    groups: list[Regime] = []
    for record in records:
        description, transforms = describe(record, indicators, evaluation)
        for group in groups:
            if group.takes(description, transforms):
                group.records.append(record)
                break
        else:
            groups.append(Regime([record], description, transforms))
    return sorted(groups, key=lambda g: -len(g.records))


def describe(
    record: RunRecord, indicators: Sequence[str], evaluation: str | None
) -> tuple[dict[str, Any], dict[str, Transform]]:
    """(comparable description, φ) of one run."""
    place = f"run {record.run_id}: the field transforms."
    transforms = {n: Transform.from_json(record.transforms[n], place + n) for n in indicators if n in record.transforms}
    identities = {n: plain((record.keys.get(n) or {}).get("identity") or {}) for n in indicators}
    identities = {n: {k: v for k, v in i.items() if k not in POOL_FIELDS} for n, i in identities.items()}
    return {"regime": comparable(record.regime, evaluation), "indicators": identities}, transforms


def regime_differences(a: Regime, b: Regime) -> list[Difference]:
    """What keeps two regimes apart: fields, identities, then φ."""
    found = differences(a.description, b.description)
    for name in [*a.transforms, *(n for n in b.transforms if n not in a.transforms)]:
        left, right = a.transforms.get(name), b.transforms.get(name)
        if left is None or right is None or not left.close_to(right):
            found.append(Difference(f"φ of {name}", phi_text(left), phi_text(right)))
    return found


def phi_text(transform: Transform | None) -> str | None:
    """A transform for a message: `log in [0.3, 5.1]`."""
    return None if transform is None else f"{transform.kind} in [{transform.low:.4g}, {transform.high:.4g}]"


def list_regimes(groups: Sequence[Regime]) -> str:
    """One line per regime: its runs (any id names it) and the fields in which regimes differ."""
    varying: dict[str, None] = {}
    for other in groups[1:]:
        varying.update({d.field: None for d in regime_differences(groups[0], other)})
    lines = []
    for group in groups:
        values = flatten(group.description)
        values.update({f"φ of {n}": phi_text(t) for n, t in group.transforms.items()})
        shown = ", ".join(f"{_field_label(f)} = {short(values.get(f))}" for f in varying)
        lines.append(f"  {run_names(group.records)}{': ' + shown if shown else ''}")
    return "\n".join(lines)


def run_names(records: Sequence[RunRecord], most: int = 3) -> str:
    """`24 runs (a, b, c, …)`."""
    names = ", ".join(r.run_id for r in records[:most]) + (", …" if len(records) > most else "")
    return f"{len(records)} run{'s' if len(records) != 1 else ''} ({names})"


def _field_label(field: str) -> str:
    for prefix in ("regime.", "indicators."):
        if field.startswith(prefix):
            return label(field[len(prefix) :])
    return field
