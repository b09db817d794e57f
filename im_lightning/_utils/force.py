"""What a person accepts against a refusal, by name: `--force weak-rule,other-base`, `force: true`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from im_lightning.errors import RequestError, message

RISKS = {
    "weak-rule": "a rule that its own runs find no better than the mean",
    "other-base": "a rule of another base model or template, or scores computed in another way than for its fit",
    "other-regime": "runs of several regimes in one fit",
    "seen-evaluation": "an evaluation set that the rule was fitted on",
    "worse-target": "a rule whose weights make a named target worse",
}
Force = bool | str | Sequence[str]
_SWITCH = {"true": "weak-rule", "false": ""}


def accepted(force: Force) -> frozenset[str]:
    """The risks that are accepted; True, the bare switch, accepts a weak rule and nothing else.

    Raises:
        RequestError: there is no risk of such a name.

    >>> sorted(accepted("weak-rule,other-base")), sorted(accepted(True)), sorted(accepted(False))
    (['other-base', 'weak-rule'], ['weak-rule'], [])
    """
    parts = str(force).split(",") if isinstance(force, bool | str) else force
    names = frozenset(filter(None, (_SWITCH.get(name := part.strip(), name) for part in map(str.lower, parts))))
    if unknown := names - RISKS.keys():
        remedy = f"name some of {', '.join(RISKS)}, separated by commas"
        raise RequestError(message(f"force {','.join(sorted(unknown))}", "there is no such risk", remedy))
    return names


def to_force(risks: Iterable[str], force: Force = False) -> str:
    """How to accept these risks too, for the remedy of a refusal.

    >>> to_force(["other-base"], True)
    "pass --force weak-rule,other-base (a fit: --data.force=weak-rule,other-base; Python: force='weak-rule,other-base')"
    """
    wanted = accepted(force).union(risks)
    names = ",".join(name for name in RISKS if name in wanted)
    if names == "weak-rule":
        return "pass --force (a fit: --data.force=true; Python: force=True)"
    return f"pass --force {names} (a fit: --data.force={names}; Python: force={names!r})"


def with_names(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments with `--force` as a bare switch, and the names that stood beside it: no other word is taken.

    >>> with_names(["--force", "other-base", "pool.jsonl"]), with_names(["--force", "pool.jsonl"])
    ((['--force', 'pool.jsonl'], 'other-base'), (['--force', 'pool.jsonl'], None))
    """
    out: list[str] = []
    names: str | None = None
    bare = False
    for word in arguments:
        if bare and set(word.split(",")) <= RISKS.keys():
            names, bare = word, False
            continue
        bare = word == "--force"
        if word.startswith("--force="):
            word, names = "--force", word.partition("=")[2]
        out.append(word)
    return out, names
