"""Measurements of this package; not part of the wheel."""

from __future__ import annotations

import sys
from collections.abc import Callable

from im_lightning.errors import InstructMiningError, RequestError


def status_of(script: str, work: Callable[[], int | None]) -> int:
    """The status that a script ends with: its work's, 2 for a wrong request, 1 for a failure, 130 after Ctrl-C."""
    try:
        return work() or 0
    except InstructMiningError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted; run the same command to go on", file=sys.stderr)
        return 130
