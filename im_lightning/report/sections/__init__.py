"""The sections of the report, one file each: a function under `@report_section(…)` is all that adds one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from im_lightning.errors import RequestError, message
from im_lightning.report.inputs import ReportInputs
from im_lightning.report.parts import Section

SECTIONS: dict[str, tuple[int, Callable[[ReportInputs], Section]]] = {}
"""Anchor → place on the page, and the function that makes the section."""


def report_section(
    key: str, title: str, place: int
) -> Callable[[Callable[[ReportInputs, Section], None]], Callable[[ReportInputs], Section]]:
    """Registers the function below, which fills an empty section; or says in it what is absent.

    Args:
        key: Its anchor on the page.
        title: Its heading.
        place: The sections come in the order of these.

    Raises:
        RequestError: there is a section of this key.
    """
    if key in SECTIONS:
        raise RequestError(message(f"report section {key!r}", "it is registered already", "give it another key"))

    def register(fill: Callable[[ReportInputs, Section], None]) -> Callable[[ReportInputs], Section]:
        def make(inputs: ReportInputs) -> Section:
            section = Section(key, title)
            fill(inputs, section)
            return section

        SECTIONS[key] = (place, make)
        return make

    return register


def make_sections(inputs: ReportInputs) -> list[Section]:
    """Every section that has something to say, in the order of the page; of all files in this folder, and of those that
    registered one."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    made = [make(inputs) for _, make in sorted(SECTIONS.values(), key=lambda row: row[0])]
    return [section for section in made if section.lead or section.parts or section.absent]
