"""What a command answers, once: a text for a person, or with --json one document for a program; and what stands beside
it on standard error.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from im_lightning._utils.files import plain
from im_lightning._utils.numbers import time_text
from im_lightning._utils.progress import silence

FLAGS = {
    "--json": "the result as one JSON document",
    "--quiet": "(-q) no progress and no notes: the result and errors alone",
    "--verbose": "(-v) also the warnings of libraries, the time taken, and where an error came from",
}
"""What every command takes, before its name or after it."""
_SHORT = {"-q": "--quiet", "-v": "--verbose"}

_document: dict[str, Any] | None = None


def answer(record: Mapping[str, Any], text: str | None = None) -> None:
    """Gives the result of the command under way: prints the text or, under --json, puts the record into the document.

    Args:
        record: Plain values, arrays, paths; NaN and infinities become null.
        text: The same for a person; None where there is nothing to read.
    """
    if _document is not None:
        _document.update(plain(record))
    elif text is not None:
        print(text)


@dataclass(frozen=True)
class Manner:
    """How a command answers."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    @classmethod
    def taken(cls, arguments: Sequence[str]) -> tuple[Manner, list[str]]:
        """The manner that arguments ask for, and the other arguments.

        >>> Manner.taken(["-q", "runs", "runs/", "--json"])
        (Manner(json=True, quiet=True, verbose=False), ['runs', 'runs/'])
        """
        asked = {_SHORT.get(word, word) for word in arguments} & FLAGS.keys()
        others = [word for word in arguments if _SHORT.get(word, word) not in FLAGS]
        return cls(**{name[2:]: name in asked for name in FLAGS}), others

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Around a command; at its end the document is printed. Meanwhile what libraries print goes to standard
        error."""
        global _document, _manner
        before, start, out = (_document, _manner), time.monotonic(), sys.stdout
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.showwarning = self._show_warning
            if self.verbose:
                warnings.simplefilter("default")
            if self.quiet:
                stack.enter_context(silence())
                stack.callback(logging.disable, logging.root.manager.disable)
                logging.disable(logging.WARNING)
            if self.json:
                stack.enter_context(redirect_stdout(sys.stderr))
            _document = found = dict[str, Any]() if self.json else None
            _manner = self
            try:
                yield
            finally:
                _document, _manner = before
        if found:  # on further ranks of a fit it is empty
            print(json.dumps(found, indent=2, allow_nan=False), file=out)
        if self.verbose:
            print(f"it took {time_text(time.monotonic() - start)}", file=sys.stderr)

    def failed(self, who: str, text: str, status: int, error: BaseException | None = None) -> int:
        """Says what went wrong, and returns the exit status. A document keeps what was answered before."""
        if self.verbose and error is not None:
            traceback.print_exception(error, file=sys.stderr)
        print(f"{who}: {text}", file=sys.stderr)
        answer({"error": text, "status": status})
        return status

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        """Our own warnings are sentences for the user; those of libraries keep their place, which a report needs."""
        ours = Path(filename).absolute().is_relative_to(_PACKAGE)
        text = f"warning: {message}" if ours else f"{category.__name__} in {filename}:{lineno}: {message}"
        if not self.quiet:
            print(text, file=sys.stderr)


_PACKAGE = Path(__file__).parents[1]
_manner = Manner()


def manner() -> Manner:
    """That of the command under way."""
    return _manner
