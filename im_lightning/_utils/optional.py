"""Packages that only some work needs: each belongs to an extra of this package, and is asked for when first used."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from im_lightning.errors import RequestError, message


def install_command(extra: str) -> str:
    """What a user types to get an extra."""
    return f"pip install 'im-lightning[{extra}]'"


def require(module: str, extra: str, what: str, otherwise: str = "") -> Any:
    """The module, imported, which the extra of `pyproject.toml` installs.

    Raises:
        RequestError: `what` needs it and it is not installed; has the one command that installs it, and `otherwise`.

    >>> require("json", "ray", "scoring on a cluster").dumps([1])
    '[1]'
    """
    try:
        __import__(module)
    except ImportError as error:
        cause = f"it needs {module}, which is not installed ({error})"
        remedy = install_command(extra) + (f", or {otherwise}" if otherwise else "")
        raise RequestError(message(what, cause, remedy)) from error
    return sys.modules[module]


def package_folder(module: str, what: str, install: str) -> Path:
    """Folder of an installed package whose files are read; the package itself is not imported.

    Raises:
        RequestError: it is not installed; has the command that installs it.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise RequestError(message(what, f"it needs {module}, which is not installed", install))
    return Path(next(iter(spec.submodule_search_locations)))
