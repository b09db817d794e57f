"""Differences between two JSON-like descriptions (indicator identities, regimes), in words a person can act on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

POOL_FIELDS = frozenset({"pool", "pool_digest", "calls and reasoning", "completion"})
"""What identities say of a pool: a rule is for other pools too, so it is recorded, not matched."""
_LABELS = {
    "weights": "model weights",
    "tokenizer": "tokenizer",
    "revision": "model revision",
    "template": "template",
    "max_length": "maximum length",
    "version": "version of the indicator",
    "base_model": "base model",
    "evaluation_set": "evaluation set",
    "evaluation_sets": "evaluation set",
    "subset_size": "subset size",
    "learning_rate": "learning rate",
}


class Difference(NamedTuple):
    """One field that differs: its dotted path and the two values (None where absent)."""

    field: str
    left: Any
    right: Any

    def text(self, left: str, right: str) -> str:
        """For example `model weights (model.weights): 3fa9… in the rule, 77c0… in the table`."""
        return f"{label(self.field)}: {short(self.left)} {left}, {short(self.right)} {right}"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one object with dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return out


def differences(left: Any, right: Any, ignore: frozenset[str] = frozenset()) -> list[Difference]:
    """Fields whose values differ, in order of appearance; `ignore` names fields by their last part."""
    a, b = flatten(left), flatten(right)
    names = [k for k in [*a, *(k for k in b if k not in a)] if k.rsplit(".", 1)[-1] not in ignore]
    return [Difference(k, a.get(k), b.get(k)) for k in names if not _same(a.get(k), b.get(k))]


def label(field: str) -> str:
    """The field in words where there are some, with its path."""
    parts = field.split(".")
    for part in (parts[-1], parts[0]):
        if part in _LABELS:
            words = _LABELS[part]
            return words if words.replace(" ", "_") == field else f"{words} ({field})"
    return field


def short(value: Any) -> str:
    """A value for a message: digests cut to eight characters, long text to forty."""
    if value is None:
        return "none"
    text = str(value)
    if len(text) >= 24 and all(c in "0123456789abcdef" for c in text):
        return text[:8] + "…"
    return text if len(text) <= 40 else text[:39] + "…"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    return bool(a == b)
