"""Runs by what decides them: found in the ledger by their key, or made.

A key is a digest of everything that decides a run's numbers. So an interrupted experiment goes on where it was, and
nothing that was made under other settings is ever taken over.
"""

from __future__ import annotations

from collections.abc import Callable

from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.record import RunRecord


class KeyedRuns:
    """The keyed runs of one purpose in a ledger.

    Args:
        ledger: Where they are kept.
        purpose: compare or search.
        whole: Whether a run has all that is asked for; one that has not is made anew.

    Attributes:
        made: How many were made.
        replayed: How many were found.
    """

    def __init__(
        self, ledger: RunLedger, purpose: str, whole: Callable[[RunRecord], bool] = lambda record: True
    ) -> None:
        known = ((r.subset.get("key"), r) for r in ledger.records(purpose) if whole(r))
        self._by_key: dict[str, RunRecord] = {str(key): r for key, r in known if key}
        self.made = self.replayed = 0

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def find_or_make(self, key: str, make: Callable[[], RunRecord]) -> RunRecord:
        """The run of this key; `make` must leave it in the ledger with `subset["key"] == key`."""
        record = self._by_key.get(key)
        if record is not None:
            self.replayed += 1
            return record
        record = self._by_key[key] = make()
        self.made += 1
        return record
