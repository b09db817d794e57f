"""How tables, ledgers and rules show themselves in a notebook: as a pandas table, and in axes of matplotlib."""

from __future__ import annotations

from html import escape
from typing import Any

ROWS = 20
"""Rows of a table that a notebook shows at once."""


class Displayed:
    """For a class with `to_pandas`: an HTML table under its `repr`, as notebooks show it."""

    def to_pandas(self) -> Any:
        """The content as a `pandas.DataFrame`."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        table = self.to_pandas().to_html(max_rows=ROWS, border=0, na_rep="–", float_format="{:.4g}".format)
        return f"<p>{escape(repr(self))}</p>\n{table}"


def panels(count: int, axes: Any, share_y: bool = False) -> list[Any]:
    """Axes to draw in, one per panel, at most three beside each other.

    Args:
        count: How many panels.
        axes: The caller's own, one or an array of as many; None for a new figure of pyplot.
        share_y: Whether new panels have one scale of y.

    Returns:
        `count` axes of matplotlib.

    Raises:
        RequestError: the caller's axes are too few.
    """
    import numpy as np

    from im_lightning.errors import RequestError, message

    if axes is None:
        import matplotlib.pyplot as plt

        columns = max(1, min(3, count))
        rows = -(-count // columns)
        size = (4.0 * columns, 2.8 * max(1, rows))
        _, grid = plt.subplots(max(1, rows), columns, squeeze=False, figsize=size, layout="constrained", sharey=share_y)
        for spare in grid.ravel()[count:]:
            spare.set_axis_off()
        axes = grid
    given = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(given) < count:
        cause = f"there are {len(given)} for {count} panels"
        raise RequestError(message("axes", cause, f"pass {count} axes, or none for a new figure"))
    return given[:count]
