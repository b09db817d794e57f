"""A user's own indicators from the command line: `FILE.py:NAME` or `package.module:NAME` names one wherever names do.

The file or module is imported, which runs it: its `@register_indicator` makes the name known.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from im_lightning._utils.hashing import digest_bytes
from im_lightning.errors import InstructMiningError, RequestError, message

_TEN_LINES = "name a Python file or module with an indicator, such as my_indicators.py:questions"

_loaded: dict[str, ModuleType] = {}


def load_plugin(where: str) -> None:
    """Imports a Python file (`.py`) or module, once per process; the RequestError of one that fails says where."""
    path = Path(where).expanduser()
    try:
        if path.suffix == ".py":
            _load_file(path)
        else:
            importlib.import_module(where)
    except InstructMiningError:
        raise
    except ModuleNotFoundError as error:
        cause = f"there is no module {error.name}" + ("" if error.name == where else " (which it imports)")
        raise RequestError(message(f"indicators {where}", cause, _TEN_LINES)) from error
    except Exception as error:  # whatever the user's code raises
        cause = f"it cannot be imported ({type(error).__name__}: {error}{_line(error)})"
        remedy = "mend it; python FILE.py shows the whole error"
        raise RequestError(message(f"indicators {where}", cause, remedy)) from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RequestError(message(f"indicators {path}", "there is no such file", _TEN_LINES))
    name = f"im_lightning_plugin_{path.stem}_{digest_bytes(str(path.resolve()).encode())[:8]}"
    if name in _loaded:
        return _loaded[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RequestError(message(f"indicators {path}", "it cannot be imported", _TEN_LINES))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # while it runs: dataclasses look there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]  # so that cloudpickle sends its classes to other machines whole, not by this name
    _loaded[name] = module
    return module


def _line(error: Exception) -> str:
    """The last line of the user's code that the error passed through."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and not file.startswith("<frozen"):
            place = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return place
