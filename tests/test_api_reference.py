"""docs/api.md is what the docstrings say now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_api_reference_is_current() -> None:
    """A page that describes arguments of last month costs a reader more than none."""
    command = [sys.executable, "scripts/api_reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"run scripts/api_reference: {done.stderr[-500:]}"
