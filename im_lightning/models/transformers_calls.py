"""What every call of transformers needs: its bars off the terminal, its renamed arguments, its errors in a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' own loading bars off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def dtype_argument() -> str:
    """transformers 4.56 renamed `torch_dtype` to `dtype`."""
    from importlib.metadata import version

    major, minor = (int(part) for part in version("transformers").split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def first_line(error: Exception) -> str:
    """The beginning of what an error of another package says, for a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
