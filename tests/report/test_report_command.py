"""`im-lightning report`: its arguments, what it leaves out and says so, and its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from pools import write_jsonl
from report_inputs import Page, make_folder

from im_lightning import cli
from im_lightning.errors import DataError, RequestError
from im_lightning.report.page import write_demo_report, write_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("command")
    make_folder(made)
    return made


def test_the_command_takes_several_budgets_and_files(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "page.html"
    pool = str(folder / "pool.jsonl")
    half = Path(pool).read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(half[:700]))
    (tmp_path / "b.jsonl").write_text("".join(half[700:]))
    status = cli.main(
        ["report", "--out", str(out), "--rule", str(folder / "rule.json"), "--scores", str(folder / "scores.parquet"),
         "--data", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--budget", "100", "300",
         "--title", "My pool"]
    )  # fmt: skip
    assert status == 0 and "page_figures" in capsys.readouterr().err
    page = Page(out.read_text())
    assert page.sections() == ["short", "rule", "weights", "examples", "rows", "pool", "absent"]
    assert "My pool" in page.text and "The figures and shares are those of 100 rows." in page.text
    assert "--budget 100 300" in page.text


@pytest.mark.parametrize(
    ("given", "there", "said"),
    [
        ("compare", ["short", "comparison"], "The rule: add --rule rule.json (im-lightning refit"),
        ("rule", ["short", "rule"], "The weights: add --scores scores.parquet; --budget N"),
        ("scores", ["rows", "pool"], "The best and the worst rows: add --rule rule.json and --data DATA"),
        ("ledger", ["runs", "training"], "The comparison: add --compare compare.json"),
    ],
)
def test_what_is_left_out_is_said_with_the_argument_that_adds_it(folder, tmp_path, given, there, said) -> None:
    """A page without a section must not look as if there were nothing to see."""
    names = {"compare": "compare.json", "rule": "rule.json", "scores": "scores.parquet", "ledger": "ledger"}
    page = Page(write_report(tmp_path / "r.html", **{given: str(folder / names[given])}).read_text())
    assert page.sections() == [*there, "absent"] and said in page.text


def refusal(capsys, *arguments: str) -> tuple[int, str]:
    status = cli.main(["report", *arguments])
    return status, capsys.readouterr().err


def test_wrong_requests_are_refused_with_a_remedy(folder, tmp_path, capsys) -> None:
    out, rule, scores = str(tmp_path / "r.html"), str(folder / "rule.json"), str(folder / "scores.parquet")
    for arguments, texts in (
        (["--out", out], ["nothing to report on", "--ledger, --rule, --scores, --data, --compare"]),
        (["--out", str(tmp_path / "r.pdf"), "--rule", rule], ["r.pdf", "HTML page", "end its name in .html"]),
        (["--out", out, "--rule", rule, "--budget", "0"], ["--budget 0", "give 1 or more"]),
        (["--out", out, "--data", "pool.jsonl"], ["--data", "no score table", "add --scores"]),
        (["--out", out, "--compare", "no.json"], ["--compare no.json", "cannot be read", "im-lightning compare"]),
        (["--out", out, "--ledger", "nowhere"], ["--ledger nowhere", "no such ledger", "check the path"]),
        (["--out", out, "--ledger", str(tmp_path)], ["there are no runs in this folder"]),
        (["--out", out, "--scores", "no.parquet"], ["no.parquet", "no such score table"]),
        (["--out", out, "--rule", "no.json"], ["no.json"]),
    ):
        status, shown = refusal(capsys, *arguments)
        assert status == 2 and all(text in shown for text in texts), (arguments, shown)
    rows = [{"instruction": "Another", "output": "pool"}] * 1500
    write_jsonl(tmp_path / "other.jsonl", rows)
    status, shown = refusal(
        capsys, "--out", out, "--rule", rule, "--scores", scores, "--data", str(tmp_path / "other.jsonl")
    )
    assert status == 2 and "do not belong together" in shown and "other.jsonl:" in shown and "--format" in shown
    write_jsonl(tmp_path / "short.jsonl", rows[:3])
    status, shown = refusal(
        capsys, "--out", out, "--rule", rule, "--scores", scores, "--data", str(tmp_path / "short.jsonl")
    )
    assert status == 2 and ("the table has 1500 rows, the data 3" in shown or "has id" in shown)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"arms": []}', '{"arms": [{"arm": "x"}]}', '{"arms": [3]}'])
def test_a_torn_or_foreign_comparison_is_named(tmp_path, capsys, text) -> None:
    path = tmp_path / "compare.json"
    path.write_text(text)
    status, shown = refusal(capsys, "--out", str(tmp_path / "r.html"), "--compare", str(path))
    assert status == 1 and str(path) in shown and "im-lightning compare wrote" in shown
    assert "not whole JSON" in shown or "no arms of a comparison" in shown


def test_the_demo_ends_in_a_page_of_what_it_kept(folder: Path) -> None:
    (folder / "comparison.json").write_text((folder / "compare.json").read_text())
    page = write_demo_report(folder, 200)
    assert page == folder / "report.html"
    assert Page(page.read_text()).sections()[-2:] == ["runs", "training"]


def test_a_page_that_cannot_be_written_is_an_error(folder, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot be written") as caught:
        write_report(tmp_path / "file" / "r.html", rule=str(folder / "rule.json"))
    assert not isinstance(caught.value, RequestError | DataError)


def test_help_shows_an_example(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("\\\n", " ").split())
    assert (
        ended.value.code == 0 and "--scores scores.parquet --out report.html" in shown and "docs/statistics.md" in shown
    )


def test_data_that_were_not_scored_are_refused_even_without_a_rule(folder: Path, tmp_path: Path, capsys) -> None:
    """As `select` does: a page on other rows than the scores' would be read as if it were on these."""
    lines = (folder / "pool.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join([*lines[:5], lines[6], lines[5], *lines[7:]]))
    given = ["--scores", str(folder / "scores.parquet"), "--data", str(tmp_path / "other.jsonl")]
    status, said = refusal(capsys, *given, "--out", str(tmp_path / "r.html"))
    assert status == 2 and "--scores and --data do not belong together: row 5 (" in said
    assert not (tmp_path / "r.html").exists()
