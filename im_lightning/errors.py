"""The errors a user can reach. Each message names the file or value, the cause and the remedy."""

from __future__ import annotations


class InstructMiningError(Exception):
    """Something this package refuses or cannot do; the command line ends with status 1."""


class RequestError(InstructMiningError, ValueError):
    """The request itself was wrong (an argument, a missing file, a rule that does not fit); status 2."""


class DataError(InstructMiningError, ValueError):
    """The content of an input was wrong (a bad row, a torn file); status 1."""


def message(what: str, cause: str, remedy: str) -> str:
    """Joins the three parts that every error message of this package has.

    >>> message("pool.jsonl", "line 3 is not a JSON object", "mend the line or pass --on-bad-row quarantine")
    'pool.jsonl: line 3 is not a JSON object. Fix: mend the line or pass --on-bad-row quarantine.'
    """
    return f"{what}: {cause.rstrip('.')}. Fix: {remedy.rstrip('.')}."


def first_line(error: Exception) -> str:
    """The beginning of what an error of another package says, for a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
