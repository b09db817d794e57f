"""docs/targets.md as it stands: its code and commands run, and what it quotes is what is printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from simulated_ledger import AGAINST, with_targets

from im_lightning import cli
from im_lightning.ledger.ledger import RunLedger
from im_lightning.ledger.targets import read_targets
from im_lightning.rule.fit import fit_rule
from im_lightning.rule.linear_rule import LinearRule

PAGE = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")


def test_the_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    book = RunLedger("runs")
    for record in with_targets(b=AGAINST):
        record.evaluation["dialogue"] = record.evaluation.pop("b")
        record.regime["evaluation_sets"]["dialogue"] = "d" * 32
        record.scores = {}
        book.add(record)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    varied = {r.run_id: 0.2 + 0.001 * k for k, r in enumerate(book.records())}  # as a harness would give
    exec(compile(code, "docs/targets.md", "exec"), {})
    assert {r.scores["gsm8k"]["exact_match"] for r in book.records()} == {0.25}
    exec(compile(code.replace("= {record.run_id: 0.25 for record in ledger.records()}", f"= {varied}"), "", "exec"), {})
    (block,) = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        assert cli.main(shlex.split(line)[1:]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    quoted = " ".join(re.findall(r"^> (.*)$", PAGE, flags=re.MULTILINE))
    assert quoted.split(":")[0] in printed and re.search(
        r"dialogue by \+0\.\d+ \(0\.\d+ to 0\.\d+\), in log loss", printed
    )
    assert "follows the exact match on gsm8k at ρ" in Path("report.html").read_text(encoding="utf-8")
    assert LinearRule.load("runs/rule.json").evaluation == "held-out=1,dialogue=0,em:gsm8k=0"


def test_every_target_of_the_table_is_one() -> None:
    """Each row of the page's table, fitted."""
    records = with_targets(20)
    for record in records:
        held = record.evaluation["held-out"]
        record.evaluation |= {name: {"loss": held["loss"]} for name in "abc"}
        held["example_loss"] = held["loss"]
        record.scores |= dict.fromkeys(("gsm8k", "bbh"), record.scores["task"])
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE)
    assert rows.pop(0) == "--target" and len(rows) == 6
    targets = [one for text in rows for one in read_targets(text)]
    found = [fit_rule(records, "ols", evaluation=one, permutations=0, bootstrap=0) for one in targets]
    assert len(found) == 8 and found[-1].evaluation == "a=0,b=0,em:gsm8k=1"


def test_the_width_of_the_interval_is_as_the_page_has_it() -> None:
    from scipy.stats import t

    rule = fit_rule(with_targets(26, b=AGAINST), "ols", evaluation="held-out=1,b=0", permutations=0, bootstrap=0)
    other = fit_rule(with_targets(26, b=AGAINST), "ols", evaluation="b", permutations=0, bootstrap=0)
    row = rule.metrics_.targets[1]
    half = t.ppf(0.975, 26 - 4) * other.metrics_.residual_sd * rule.reach_ / 5.0
    assert (row["high"] - row["low"]) / 2 == pytest.approx(half, rel=1e-9)
