"""A report section of one's own is a row and a function in one file: the page takes it, in its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from report_inputs import Page, make_folder, named

from im_lightning.errors import RequestError
from im_lightning.report.charts import Dot, dots
from im_lightning.report.inputs import ReportInputs
from im_lightning.report.page import write_report
from im_lightning.report.parts import Figures, Section, Words
from im_lightning.report.sections import SECTIONS, report_section


@pytest.fixture(autouse=True)
def own() -> Iterator[None]:
    """The section: all there is to adding one."""

    @report_section("speed", "How fast <it> went", place=15)
    def speed(inputs: ReportInputs, section: Section) -> None:
        if inputs.records is None:
            section.absent = "add --ledger RUNS."
            return
        total = sum(run.tokens for run in inputs.records)
        section.short = [(f"{total:,} tokens were trained on.", "plain")]
        points = [Dot(run.run_id, float(run.tokens), None, None, "accent", run.run_id) for run in inputs.records[:3]]
        section.parts += [Words(f"{total:,} tokens & no more"), Figures([dots("speed", "Tokens", points, "tokens")])]

    yield
    SECTIONS.pop("speed")


def test_the_page_has_it_in_its_place(tmp_path: Path) -> None:
    """If it had to be made known in a second place, a user's section would be asked for and not be there."""
    make_folder(tmp_path)
    page = Page(write_report(tmp_path / "r.html", **named(tmp_path)).read_text())
    assert "tokens & no more" in page.text and "tokens were trained on." in page.text
    assert 'id="speed"' in page.raw and 'href="#speed"' in page.raw and "How fast &lt;it&gt; went" in page.raw
    order = [page.raw.index(f'id="{key}"') for key in ("rule", "speed", "runs")]
    assert order == sorted(order), "place 15 comes after the rule's 10"
    assert (tmp_path / "r_figures" / "speed.png").stat().st_size > 0


def test_it_says_what_would_add_it(tmp_path: Path) -> None:
    """A section without its input must not look like one that found nothing."""
    make_folder(tmp_path)
    page = Page(write_report(tmp_path / "r.html", rule=str(tmp_path / "rule.json")).read_text())
    assert "add --ledger RUNS." in page.text and "tokens & no more" not in page.text


def test_a_key_is_taken_once() -> None:
    """Two sections of one key: the later would silently push the earlier off the page."""
    with pytest.raises(RequestError, match="report section 'speed': it is registered already"):
        report_section("speed", "again", place=1)
